"""Request bodies and errors of OpenAI's API (https://platform.openai.com/docs/api-reference/chat and /completions).

A request may have the fields declared here, whichever engine answers. SDKs send many others with a neutral value, one
that changes nothing: those are dropped. Any other field or value is refused by name: those that would change the
answer, and those that only the server may set (``cache_salt``, ``priority``, ``lora_request``, …).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from tunewright.core.unicode import mark_fault, normalize
from tunewright.data.examples import Message
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.parsing import Part
from tunewright.serving.gateway.structured import AnswerFormat, Choices, Form, StructuredOutputs, one_form

_ANSWER_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    # False and 0 are not neutral here: in vLLM and TGI these options are on, or 1, by default.
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
    "web_search_options": (),  # {} turns web search on
}
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
}


def _no_image(kind: Any) -> Any:
    if "image" in str(kind):
        raise PydanticCustomError("image", "images are not supported, only text: remove the image")
    return kind


class TextPart(Part):
    """One part of a message's content."""

    type: Annotated[Literal["text"], BeforeValidator(_no_image)]
    text: str


def _one_part(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _refuse_mark_runs(text: str) -> str:
    if fault := mark_fault(text):
        raise PydanticCustomError("combining_marks", "{fault}: remove the marks", {"fault": fault})
    return text


def _as_system(role: Any) -> Any:
    return "system" if role == "developer" else role


class ChatMessage(Part):
    """One message; a plain string becomes a single part, and the role ``developer`` becomes ``system``."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_as_system)]
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_one_part)]
    name: str | None = None  # not rendered: no chat template of Llama or Mistral has a place for it

    @model_validator(mode="after")
    def _few_marks(self) -> Self:
        _refuse_mark_runs(self._text)  # joined, since a run may continue in the next part
        return self

    def as_message(self) -> Message:
        """Return the message in the form of training data: Unicode NFC, as in datasets."""
        return Message(self.role, normalize(self._text))

    @property
    def _text(self) -> str:
        return "".join(part.text for part in self.content)


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool | None = None


MAX_PROMPTS = 128
"""Maximum number of prompts in one completion request."""

Label = Annotated[str, Field(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Stored with a tenant's usage: PostgreSQL takes no NUL."""

StopString = Annotated[str, Field(min_length=1, max_length=1000)]


MAX_BIASES = 300
MAX_TOP_LOGPROBS = 20
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]


def _one_stop(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _BaseRequest(Part):
    """The fields of both routes.

    One default differs from OpenAI's: the temperature is 0, since a domain model should give its best answer unless
    variety is requested. So ``top_p`` without a temperature has no effect, and is refused.
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
    n: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,7}$")], Bias], Field(max_length=MAX_BIASES)] | None
    ) = None
    response_format: AnswerFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: Choices | None = None
    # Labels, and hints for OpenAI's storage and cache: no answer depends on them.
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Every request has the same priority here, and the response says "default".
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> Self:
        if self.temperature is None and self.top_p not in (None, 1.0):
            message = "top_p has no effect at temperature 0, the default: set temperature too."
            raise ApiError(message, param="top_p", code="invalid_value")
        return self

    @model_validator(mode="after")
    def _valid_form(self) -> Self:
        self.form  # noqa: B018 - it raises
        return self

    @cached_property
    def form(self) -> Form | None:
        """The form that the answer must have; None: any text.

        Raises:
            ApiError: 400, there are several forms, or one is not valid or over a limit.
        """
        guided = {"json": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice}
        return one_form(self.response_format, self.structured_outputs, guided)

    @property
    def choices(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Token ids with what is added to their logits."""
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())

    @property
    def end_user(self) -> str | None:
        """The client's label for its user; ``safety_identifier`` is OpenAI's newer name of ``user``."""
        return self.safety_identifier or self.user or None

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with its usage; other responses always have it."""
        return self.stream_options is not None and self.stream_options.include_usage is True


class ChatRequest(_BaseRequest):
    """The body of ``POST /v1/chat/completions``."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _ANSWER_NEUTRAL | _CHAT_NEUTRAL
    default_tokens: ClassVar[None] = None

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = "max_tokens and max_completion_tokens differ, and mean the same: set only one of them."
            raise ApiError(message, param="max_tokens", code="invalid_value")
        return self

    @model_validator(mode="after")
    def _logprobs_on(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs requires logprobs: true.", param="top_logprobs", code="invalid_value")
        return self

    @property
    def likeliest(self) -> int | None:
        """The number of likeliest tokens to report with each token's log probability; None: report none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens the answer may have; None: as many as the context has room for."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def conversation(self) -> list[Message]:
        """The messages in the form of training data, with one system message at most at the beginning.

        Some frameworks send several there, for example pydantic-ai its system prompt and its instructions. They are
        joined by a blank line.
        """
        messages = [message.as_message() for message in self.messages]
        system = list(takewhile(lambda message: message.role == "system", messages))
        if len(system) > 1:
            messages[: len(system)] = [Message("system", "\n\n".join(message.content for message in system))]
        return messages

    @property
    def beginning(self) -> list[list[str]]:
        """The conversation up to the first user message, which all its requests have in common."""
        beginning = []
        for message in self.conversation:
            beginning.append([message.role, message.content])
            if message.role == "user":
                break
        return beginning


def _prompts(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and all(isinstance(one, int | list) for one in prompt):
        raise PydanticCustomError("token_ids", "token ids are not supported: send text")
    return [prompt] if isinstance(prompt, str) else prompt


class CompletionRequest(_BaseRequest):
    """The body of ``POST /v1/completions``: texts to continue, without the chat template."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _ANSWER_NEUTRAL | _COMPLETION_NEUTRAL
    default_tokens: ClassVar[int] = 16
    """OpenAI's default of ``max_tokens`` on this route."""

    prompt: Annotated[
        list[Annotated[str, Field(min_length=1), AfterValidator(_refuse_mark_runs)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_prompts),
    ]
    logprobs: Annotated[TopLogprobs | None, BeforeValidator(lambda value: None if value is False else value)] = None

    @property
    def likeliest(self) -> int | None:
        """The number of likeliest tokens to report with each token's log probability; None: report none."""
        return self.logprobs

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens each answer may have; None: :attr:`default_tokens`."""
        return self.max_tokens

    @property
    def texts(self) -> list[str]:
        """The prompts in Unicode NFC, as in datasets."""
        return [normalize(text) for text in self.prompt]

    @property
    def beginning(self) -> list[list[str]]:
        """All prompts: no later request is known to continue them."""
        return [["prompt", text] for text in self.texts]


RequestBody = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Usage:
    """The token counts of one request."""

    prompt_tokens: int
    completion_tokens: int

    def as_dict(self) -> dict[str, int]:
        """Return OpenAI's ``usage`` object."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }
