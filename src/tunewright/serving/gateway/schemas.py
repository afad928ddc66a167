"""Request bodies and errors of OpenAI's API (https://platform.openai.com/docs/api-reference/chat and /completions).

A request may have the fields declared here, whichever engine answers. SDKs send many others with a neutral
value, which changes nothing: these are dropped. Any other field or value is refused by name: it would
change the answer, or only the server may set it (``cache_salt``, ``priority``, ``lora_request``, …).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from tunewright.core.text import mark_fault, normalize
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.serving.gateway.errors import ApiError, Part, one_as_list
from tunewright.serving.gateway.structured import AnswerFormat, Choices, Form, Schema, StructuredOutputs, one_form
from tunewright.serving.gateway.tools import AssistantCall, Choice, Tool, ToolChoice, declarations

ANSWER_NEUTRAL: dict[str, tuple[Any, ...]] = {
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
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
}


def no_image(kind: Any) -> Any:
    """Refuse the type of an image; the other types are checked elsewhere."""
    if "image" in str(kind):
        raise PydanticCustomError("image", "images are not supported, only text: remove the image")
    return kind


class TextPart(Part):
    """One part of a message's content."""

    type: Annotated[Literal["text"], BeforeValidator(no_image)]
    text: str


def refuse_mark_runs(text: str) -> str:
    """Return the text; refuse more combining marks in a row than any script needs."""
    if fault := mark_fault(text):
        raise PydanticCustomError("combining_marks", "{fault}: remove the marks", {"fault": fault})
    return text


def as_system(role: Any) -> Any:
    """Return the role, "system" for OpenAI's newer name of it."""
    return "system" if role == "developer" else role


class ChatMessage(Part):
    """One message; a plain string becomes a single part, and the role ``developer`` becomes ``system``."""

    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(as_system)]
    content: Annotated[list[TextPart], Field(min_length=1), one_as_list(lambda text: {"type": "text", "text": text})]
    name: str | None = None  # not rendered: no chat template of Llama or Mistral has a place for it
    parsed: Any = None  # OpenAI's client adds it to a turn that it has parsed: the same as ``content``
    tool_calls: list[AssistantCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # an earlier turn's thinking: the base's chat template uses or drops it

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("content") is None and data.get("tool_calls"):
            return {**data, "content": ""}
        return data

    @model_validator(mode="after")
    def _few_marks(self) -> Self:
        refuse_mark_runs(self._text)  # joined, since a run may continue in the next part
        refuse_mark_runs(self.reasoning_content or "")
        return self

    @model_validator(mode="after")
    def _calls_in_their_place(self) -> Self:
        if (self.role == "tool") is (self.tool_call_id is None):
            raise PydanticCustomError("tool_call_id", "tool_call_id goes with the role tool, and with no other")
        for field in ("tool_calls", "reasoning_content"):
            if getattr(self, field) and self.role != "assistant":
                raise PydanticCustomError(field, f"{field} goes with the role assistant, and with no other")
        return self

    def as_message(self, *, calls: tuple[ToolCall, ...] = (), call_id: str | None = None) -> Message:
        """Return the message in the form of training data: Unicode NFC, as in datasets."""
        reasoning = normalize(self.reasoning_content).strip() if self.reasoning_content else ""
        return Message(self.role, normalize(self._text), calls=calls, call_id=call_id, reasoning=reasoning)

    @property
    def _text(self) -> str:
        return "".join(part.text for part in self.content)


def numbered(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return the messages with calls named by their places."""
    turns: list[Message] = []
    places: dict[str, str] = {}
    unanswered: dict[str, str] = {}
    count = 0
    for number, message in enumerate(messages):
        param = f"messages.{number}"
        if message.role == "tool":
            if message.tool_call_id not in unanswered:
                text = f"{param}.tool_call_id: {message.tool_call_id!r} is no call of the assistant's turn before it."
                raise ApiError(text, param=f"{param}.tool_call_id", code="invalid_tool_call")
            unanswered.pop(message.tool_call_id)
            turns.append(message.as_message(call_id=places[message.tool_call_id]))
            continue
        _require_answered(unanswered)
        calls = []
        for call in message.tool_calls or ():
            if call.id in unanswered:
                text = f"{param}: two calls have the id {call.id!r}."
                raise ApiError(text, param=f"{param}.tool_calls", code="invalid_tool_call")
            places[call.id] = call_id(count)
            unanswered[call.id] = param
            calls.append(ToolCall(call.function.name, call.function.arguments, call_id(count)))
            count += 1
        turns.append(message.as_message(calls=tuple(calls)))
    _require_answered(unanswered)
    return turns


def _require_answered(unanswered: dict[str, str]) -> None:
    if unanswered:
        ids, param = ", ".join(map(repr, unanswered)), next(iter(unanswered.values()))
        message = f"{param}: the calls {ids} have no result: send a message of role tool for each."
        raise ApiError(message, param=param, code="invalid_tool_call")


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool | None = None


MAX_TOOLS = 128
"""As in OpenAI's API."""
MAX_PROMPTS = 128
"""Maximum number of prompts in one completion request."""

Label = Annotated[str, Field(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Stored with a tenant's usage: PostgreSQL takes no NUL."""

ServiceTier = Literal["auto", "default", "flex", "priority", "scale"]

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1)]
StopStrings = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=4)]

OptionText = Annotated[str, Field(max_length=40)]

MAX_BIASES = 300
MAX_TOP_LOGPROBS = 20
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]


class RequestFields(Part):
    """The fields of all routes: model, stream, sampling and labels.

    One default differs from OpenAI's: the temperature is 0, since a domain model should give its best answer unless
    variety is requested. So ``top_p`` without a temperature has no effect, and is refused.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = ANSWER_NEUTRAL

    model: str
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    # Labels, and hints for OpenAI's storage and cache: no answer depends on them.
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Every request has the same priority here, and the response says "default".
    service_tier: ServiceTier | None = None

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> Self:
        if self.temperature is None and self.top_p not in (None, 1.0):
            message = "top_p has no effect at temperature 0, the default: set temperature too."
            raise ApiError(message, param="top_p", code="invalid_value")
        return self


class _CompletionFields(RequestFields):
    """The further fields of chat completions and completions."""

    form_param: ClassVar[str | None] = None  # of a route where a single field sets the form of the answer

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[StopStrings | None, one_as_list()] = None
    n: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,7}$")], Bias], Field(max_length=MAX_BIASES)] | None
    ) = None
    response_format: AnswerFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: Choices | None = None

    @model_validator(mode="after")
    def _valid_form(self) -> Self:
        self.form  # noqa: B018 - it raises
        return self

    @cached_property
    def form(self) -> Form | None:
        """The form that the answer must have; None means any text."""
        guided = {"json": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice}
        return one_form(self.response_format, self.structured_outputs, guided, self.form_param)

    @property
    def choices(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Token ids with the values added to their logits."""
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())

    @property
    def end_user(self) -> str | None:
        """The client's label for its user; ``safety_identifier`` is OpenAI's newer name of ``user``."""
        return self.safety_identifier or self.user or None

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with its usage; other responses always have it."""
        return self.stream_options is not None and self.stream_options.include_usage is True


class ChatRequest(_CompletionFields):
    """The body of ``POST /v1/chat/completions``."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = ANSWER_NEUTRAL | _CHAT_NEUTRAL
    default_tokens: ClassVar[None] = None
    prompt_param: ClassVar[str] = "messages"
    parameters_param: ClassVar[str] = "tools.{}.function.parameters"
    effort_param: ClassVar[str] = "reasoning_effort"

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    # Only the base's chat template can say which of these it takes.
    reasoning_effort: OptionText | None = None
    chat_template_kwargs: Annotated[dict[OptionText, bool | OptionText] | None, Field(max_length=8)] = None

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
        """The number of likeliest tokens to report with each token's log probability; None means no report."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens the answer may have; None: as many as the context has room for."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _valid_calls(self) -> Self:
        if not self.tools and self.tool_choice not in (None, "auto", "none"):
            raise ApiError("tool_choice requires tools.", param="tool_choice", code="invalid_value")
        # Other conversations have no such faults, and are normalised only once their length is known to fit.
        if self.tools or any(message.role == "tool" or message.tool_calls for message in self.messages):
            self.conversation  # noqa: B018 - it raises
        return self

    @property
    def may_call(self) -> bool:
        """True if the answer may be calls of functions."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def chosen(self) -> str:
        """The choice of functions: "auto", "required" or a function's name."""
        choice = self.tool_choice
        return choice.function.name if isinstance(choice, ToolChoice) else choice or "auto"

    @property
    def constrains_calls(self) -> bool:
        """True if calls must match the functions' schemas.

        That is so if a function is strict, a call is required, parallel calls are off, or text must have a form.
        """
        strict = any(tool.function.strict for tool in self.tools or ()) or self.form is not None
        return self.may_call and (strict or self.chosen != "auto" or self.parallel_tool_calls is False)

    @cached_property
    def conversation(self) -> list[Message]:
        """The messages in the form of training data: functions first, then at most one system message.

        Some frameworks send several system messages, for example pydantic-ai its system prompt and its instructions.
        They are joined by a blank line. Functions that the answer must not call are left out, if no message calls them.
        """
        messages = numbered(self.messages)
        system = list(takewhile(lambda message: message.role == "system", messages))
        if len(system) > 1:
            messages[: len(system)] = [Message("system", "\n\n".join(message.content for message in system))]
        if self.tools and (self.may_call or any(message.calls for message in messages)):
            messages.insert(0, declarations(self.tools))
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


class CompletionRequest(_CompletionFields):
    """The body of ``POST /v1/completions``: texts to continue, without the chat template."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = ANSWER_NEUTRAL | _COMPLETION_NEUTRAL
    default_tokens: ClassVar[int] = 16
    """OpenAI's default of ``max_tokens`` on this route."""
    prompt_param: ClassVar[str] = "prompt"

    prompt: Annotated[
        list[Annotated[str, Field(min_length=1), AfterValidator(refuse_mark_runs)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_prompts),
    ]
    logprobs: Annotated[TopLogprobs | None, BeforeValidator(lambda value: None if value is False else value)] = None

    @property
    def likeliest(self) -> int | None:
        """The number of likeliest tokens to report with each token's log probability; None means no report."""
        return self.logprobs

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens each answer may have; None means :attr:`default_tokens`."""
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

MAX_FEEDBACK_BYTES = 131_072
"""Maximum size of a feedback's body: two texts of full length, in characters of three bytes."""
FeedbackText = Annotated[str, Field(min_length=1, max_length=16_384, pattern=r"^[^\x00]*$")]
"""Long enough for an answer, and short enough to be searched for secrets in half a second."""


class FeedbackRequest(Part):
    """The body of ``POST /v1/feedback``."""

    id: Label
    thumb: Literal["up", "down"] | None = None
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    correction: FeedbackText | None = None
    reason: FeedbackText | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_dump(exclude={"id"}, exclude_none=True):
            message = "The feedback is empty: send thumb, score, correction or reason."
            raise ApiError(message, code="missing_required_parameter")
        return self


@dataclass(frozen=True)
class TokenUsage:
    """The token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    thinking_tokens: int = 0
    """Tokens of thinking, which are among the completion's."""

    def as_dict(self) -> dict[str, Any]:
        """Return OpenAI's ``usage`` object."""
        total = self.prompt_tokens + self.completion_tokens
        details = {"completion_tokens_details": {"reasoning_tokens": self.thinking_tokens}}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            **(details if self.thinking_tokens else {}),
        }
