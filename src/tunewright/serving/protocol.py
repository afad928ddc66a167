"""The part of OpenAI's chat completions protocol that is spoken here: requests in, answers and errors out.

https://platform.openai.com/docs/api-reference/chat. A field that would be ignored is refused by name instead.
"""

from __future__ import annotations

import time
import unicodedata
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

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


class TextPart(_Part):
    """One part of a message's content."""

    type: Literal["text"]
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


class ChatRequest(_Part):
    """The body of ``POST /v1/chat/completions``.

    Two defaults differ from OpenAI's: the temperature is 0 (a domain model gives its one best answer unless asked for
    variety), and so ``top_p`` says nothing without a temperature and is refused then.
    """

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopString] | None, Field(max_length=4), BeforeValidator(_one_stop)] = None
    n: Literal[1] | None = None  # one answer per request
    user: str | None = None  # the caller's own label: by definition without effect

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = "max_tokens and max_completion_tokens mean the same and differ here: give one of them."
            raise ApiError(message, param="max_tokens", code="invalid_value")
        if self.temperature is None and self.top_p not in (None, 1.0):
            message = "top_p has no effect without a temperature, which is 0 here unless given: give both."
            raise ApiError(message, param="top_p", code="invalid_value")
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only for requests with stream: true."
            raise ApiError(message, param="stream_options", code="invalid_value")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have; None: as many as the context has room for."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


def parse_request(body: bytes) -> ChatRequest:
    """Validate a request's body.

    Raises:
        ApiError: 400, naming the fields at fault.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        faults = [_fault(details) for details in error.errors(include_url=False)]
        message = " ".join(fault.message for fault in faults)
        raise ApiError(message, param=faults[0].param, code=faults[0].code) from error


def _fault(details: ErrorDetails) -> ApiError:
    param = ".".join(map(str, details["loc"])) or None
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


@dataclass(frozen=True)
class Envelope:
    """What all documents about one answer have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """A whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": finish,
        }
        return self._document("chat.completion", [choice], usage=usage.as_dict())

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """One piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._document("chat.completion.chunk", [choice])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The piece after the last, for who asked for it."""
        return self._document("chat.completion.chunk", [], usage=usage.as_dict())

    def _document(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }
