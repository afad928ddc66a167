"""The part of OpenAI's protocol that is spoken here: requests in, errors out (answers: envelopes.py).

https://platform.openai.com/docs/api-reference/chat and /completions. A request may have the fields that are declared
here, whichever engine answers. SDKs send many others with a value that changes nothing: those are dropped. Any other
field or value is refused by name: one that would change the answer, and one that only the server may set
(``cache_salt``, ``priority``, ``lora_request``, …).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
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


_EMPTY: tuple[Any, ...] = (False, 0, [], {})
"""What any undeclared field may say, and null: an option that is off, or a list of nothing."""

_ANSWER_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "service_tier": ("auto", "default"),
    # False and 0 mean something here: in vLLM and TGI these are on, or 1, unless a request says otherwise.
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "detokenize": (True,),
    "do_sample": (),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "top_k": (0, -1),
    "truncate_prompt_tokens": (),
    # And {} here: it is a schema that any JSON fits, and switches a search on.
    "guided_json": (),
    "structured_outputs": (),
    "web_search_options": (),
}
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logprobs": (False,),  # 0 asks for the log probability of each token of the answer
}


class _Part(BaseModel):
    """A part of a request; undeclared fields must have a value that changes nothing.

    ``neutral`` lists these values for the fields to which :data:`_EMPTY` does not apply; null always changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            field: value for field, value in data.items() if field in cls.model_fields or not cls._neutral(field, value)
        }

    @classmethod
    def _neutral(cls, field: str, value: Any) -> bool:
        # In Python False == 0, which differ as `logprobs`.
        return value is None or any(
            value == known and isinstance(value, bool) is isinstance(known, bool)
            for known in cls.neutral.get(field, _EMPTY)
        )


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


def _as_system(role: Any) -> Any:
    return "system" if role == "developer" else role


class ChatMessage(_Part):
    """One turn of the conversation; a plain string is a single part, and a developer's turn a system turn."""

    role: Annotated[Role, BeforeValidator(_as_system)]
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_one_part)]
    name: str | None = None  # not rendered: no chat template of Llama or Mistral has a place for it

    def as_message(self) -> Message:
        """Return the turn as training would have it: Unicode's composed form, as in datasets."""
        return Message(self.role, unicodedata.normalize("NFC", "".join(part.text for part in self.content)))


class StreamOptions(_Part):
    """What a stream carries besides the text."""

    include_usage: bool | None = None


MAX_PROMPTS = 128
"""The most prompts of one completion request."""

Label = Annotated[str, Field(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Stored with a tenant's usage: PostgreSQL takes no NUL."""

StopString = Annotated[str, Field(min_length=1, max_length=1000)]


def _one_stop(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _AnyRequest(_Part):
    """The fields of both routes.

    Two defaults differ from OpenAI's: the temperature is 0 (a domain model gives its one best answer unless asked for
    variety), and so ``top_p`` says nothing without a temperature and is refused then.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _ANSWER_NEUTRAL

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopString] | None, Field(max_length=4), BeforeValidator(_one_stop)] = None
    n: Literal[1] | None = None  # one answer per prompt
    # The caller's own labels, and hints for OpenAI's storage and cache: no answer depends on them.
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> Self:
        if self.temperature is None and self.top_p not in (None, 1.0):
            message = "top_p has no effect without a temperature, which is 0 here unless given: give both."
            raise ApiError(message, param="top_p", code="invalid_value")
        return self

    @property
    def end_user(self) -> str | None:
        """Whom the client asks for, in its own words; ``safety_identifier`` is OpenAI's newer name of ``user``."""
        return self.safety_identifier or self.user or None

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with its usage; an answer that is not streamed always has it."""
        return self.stream_options is not None and self.stream_options.include_usage is True


class ChatRequest(_AnyRequest):
    """The body of ``POST /v1/chat/completions``."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _ANSWER_NEUTRAL | _CHAT_NEUTRAL
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
    def turns(self) -> list[Message]:
        """The conversation as training would have it, whose only system turn is the first.

        Some frameworks send several, for example pydantic-ai its system prompt and its instructions; those at the
        beginning become one, a blank line between them.
        """
        turns = [message.as_message() for message in self.messages]
        system = list(takewhile(lambda turn: turn.role == "system", turns))
        if len(system) > 1:
            turns[: len(system)] = [Message("system", "\n\n".join(turn.content for turn in system))]
        return turns

    @property
    def beginning(self) -> list[list[str]]:
        """The conversation up to the user's first turn: all its later requests have it in common."""
        beginning = []
        for turn in self.turns:
            beginning.append([turn.role, turn.content])
            if turn.role == "user":
                break
        return beginning


def _prompts(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and all(isinstance(one, int | list) for one in prompt):
        raise PydanticCustomError("token_ids", "token ids are not supported: send text")
    return [prompt] if isinstance(prompt, str) else prompt


class CompletionRequest(_AnyRequest):
    """The body of ``POST /v1/completions``: texts to continue, without the chat template."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _ANSWER_NEUTRAL | _COMPLETION_NEUTRAL
    usual_tokens: ClassVar[int] = 16
    """As OpenAI's own, where the request does not say how many."""

    prompt: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_prompts),
    ]

    @property
    def token_limit(self) -> int | None:
        """The most tokens that each answer may have; None: :attr:`usual_tokens`."""
        return self.max_tokens

    @property
    def texts(self) -> list[str]:
        """The prompts in Unicode's composed form, as in datasets."""
        return [unicodedata.normalize("NFC", text) for text in self.prompt]

    @property
    def beginning(self) -> list[list[str]]:
        """All of it: no later request is known to continue it."""
        return [["prompt", text] for text in self.texts]


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
        message = f"{param} is not supported here: leave it out."
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
