"""The part of OpenAI's protocol that is spoken here: requests in, errors out (answers: envelopes.py).

https://platform.openai.com/docs/api-reference/chat and /completions. Only the fields that are listed here are taken, by
whichever engine. Any other is refused by name: one that would be ignored, and one that is the server's alone to set
(``cache_salt``, ``priority``, ``lora_request``, …).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from tunewright.data.examples import Message, Role


class ApiError(Exception):
    """A refusal in OpenAI's shape.

    Args:
        message: what is wrong and what to do.
        status: the HTTP status.
        param: the request's field that is at fault.
        code: a word for programs.
        kind: what OpenAI calls the type, where the status does not say it.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document to answer with."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _no_image(kind: Any) -> Any:
    if "image" in str(kind):
        raise PydanticCustomError("image", "images are not read here, only text: leave the image out")
    return kind


class TextPart(_Part):
    """One part of a message's content."""

    type: Annotated[Literal["text"], BeforeValidator(_no_image)]
    text: str


def _one_part(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(_Part):
    """One turn of the conversation; a plain string is a single part."""

    role: Role
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_one_part)]

    def as_message(self) -> Message:
        """The turn as training would have it: Unicode's composed form, as in datasets."""
        return Message(self.role, unicodedata.normalize("NFC", "".join(part.text for part in self.content)))


class StreamOptions(_Part):
    """What a stream carries besides the text."""

    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1, max_length=1000)]


def _one_stop(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _AnyRequest(_Part):
    """What both routes take.

    Two defaults differ from OpenAI's: the temperature is 0 (a domain model gives its one best answer unless asked for
    variety), and so ``top_p`` says nothing without a temperature and is refused then.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopString] | None, Field(max_length=4), BeforeValidator(_one_stop)] = None
    n: Literal[1] | None = None  # one answer per request
    user: str | None = None  # the caller's own label: by definition without effect

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> Self:
        if self.temperature is None and self.top_p not in (None, 1.0):
            message = "top_p has no effect without a temperature, which is 0 here unless given: give both."
            raise ApiError(message, param="top_p", code="invalid_value")
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only for requests with stream: true."
            raise ApiError(message, param="stream_options", code="invalid_value")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_AnyRequest):
    """The body of ``POST /v1/chat/completions``."""

    usual_tokens: ClassVar[None] = None

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = "max_tokens and max_completion_tokens mean the same and differ here: give one of them."
            raise ApiError(message, param="max_tokens", code="invalid_value")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have; None: as many as there is room for."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def beginning(self) -> list[list[str]]:
        """The conversation up to the user's first turn: all its later requests have it in common."""
        beginning = []
        for message in self.messages:
            beginning.append([message.role, message.as_message().content])
            if message.role == "user":
                break
        return beginning


def _one_prompt(prompt: Any) -> Any:
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


class CompletionRequest(_AnyRequest):
    """The body of ``POST /v1/completions``: text to go on from, without the chat template."""

    usual_tokens: ClassVar[int] = 16
    """As OpenAI's own, where the request does not say how many."""

    prompt: Annotated[str, Field(min_length=1), BeforeValidator(_one_prompt)]

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have; None: :attr:`usual_tokens`."""
        return self.max_tokens

    @property
    def text(self) -> str:
        """The prompt in Unicode's composed form, as in datasets."""
        return unicodedata.normalize("NFC", self.prompt)

    @property
    def beginning(self) -> list[list[str]]:
        """All of it: nothing is known to go on from it."""
        return [["prompt", self.text]]


AnyRequest = ChatRequest | CompletionRequest

R = TypeVar("R", bound=_AnyRequest)

_TOLD_FAULTS = 10
_TOLD_CHARACTERS = 100


def parse_request(kind: type[R], body: bytes) -> R:
    """Validate a request's body.

    Raises:
        ApiError: 400, naming the fields at fault.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        faults = [_fault(details) for details in errors[:_TOLD_FAULTS]]
        message = " ".join(fault.message for fault in faults)
        if len(errors) > _TOLD_FAULTS:
            message += f" And {len(errors) - _TOLD_FAULTS} more."
        raise ApiError(message, param=faults[0].param, code=faults[0].code) from error


def _fault(details: ErrorDetails) -> ApiError:
    param = ".".join(map(str, details["loc"])) or None
    if param is not None and len(param) > _TOLD_CHARACTERS:  # a client's own words: no answer is longer than it asked
        param = f"{param[:_TOLD_CHARACTERS]}…"
    if details["type"] == "json_invalid":
        return ApiError(f"The body is not valid JSON: {details['msg']}.", code="invalid_json")
    if details["type"] == "extra_forbidden":
        message = f"{param} is not supported here, and nothing is ignored silently: leave it out."
        return ApiError(message, param=param, code="unsupported_parameter")
    if details["type"] == "missing":
        return ApiError(f"{param} is missing.", param=param, code="missing_required_parameter")
    where = param or "The body"
    return ApiError(f"{where}: {details['msg']}.", param=param, code="invalid_value")


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    def as_dict(self) -> dict[str, int]:
        """OpenAI's ``usage`` object."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }
