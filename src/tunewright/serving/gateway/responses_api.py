"""OpenAI's responses API (https://platform.openai.com/docs/api-reference/responses), without stored state.

A request is answered as the chat request with the same messages: the same prompt, limits and quota.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from tunewright.chat.call_stream import CallDelta
from tunewright.serving.gateway.errors import ApiError, Part, as_request, one_as_list
from tunewright.serving.gateway.request import GenerationRequest, TextChunk
from tunewright.serving.gateway.responses import Document, new_id, now
from tunewright.serving.gateway.schemas import (
    ANSWER_NEUTRAL,
    ChatRequest,
    OptionText,
    RequestFields,
    TokenUsage,
    as_system,
    no_image,
    refuse_mark_runs,
)
from tunewright.serving.gateway.tools import FunctionDeclaration, is_object


class InputText(Part):
    """A part of an input message; ``output_text`` is a part of an earlier response."""

    type: Annotated[Literal["input_text", "output_text"], BeforeValidator(no_image)]
    text: str


class InputMessage(Part):
    """A message of the input, or of an earlier response's output."""

    type: Literal["message"] | None = None
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(as_system)]
    content: Annotated[
        list[InputText], Field(min_length=1), one_as_list(lambda text: {"type": "input_text", "text": text})
    ]
    id: str | None = None
    status: str | None = None

    @model_validator(mode="after")
    def _few_marks(self) -> Self:
        refuse_mark_runs(self.text)
        return self

    @property
    def text(self) -> str:
        """The parts' texts, joined."""
        return "".join(part.text for part in self.content)


class TextFormat(Part):
    """The form of the answer: as ``response_format`` of chat completions, the schema's fields next to the type."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @property
    def response_format(self) -> dict[str, Any]:
        """The same form in a chat request."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name, "description": self.description, "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": schema}


class TextOptions(Part):
    """Options of the answer's text."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}
    format: TextFormat | None = None


class ResponsesChatRequest(ChatRequest):
    """The chat request in place of a request for a response; its errors name the response request's fields."""

    prompt_param: ClassVar[str] = "input"
    parameters_param: ClassVar[str] = "tools.{}.parameters"
    form_param: ClassVar[str | None] = "text.format.schema"
    effort_param: ClassVar[str] = "reasoning.effort"


class ReasoningOptions(Part):
    """Options of the answer's thinking."""

    effort: OptionText | None = None


class FunctionCallItem(Part):
    """A call of an earlier response's output."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionOutputItem(Part):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


def _item_type(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "function_call":
        return "[call]"
    return "[output]" if kind == "function_call_output" else "[message]"


InputItem = Annotated[
    Annotated[InputMessage, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[call]")]
    | Annotated[FunctionOutputItem, Tag("[output]")],
    Discriminator(_item_type),
]


class ResponsesTool(FunctionDeclaration):
    """A declared function."""

    type: Literal["function"]


class ResponsesRequest(RequestFields):
    """The body of ``POST /v1/responses``."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**ANSWER_NEUTRAL, "truncation": ("disabled",)}

    input: Annotated[list[InputItem], Field(min_length=1), one_as_list(lambda text: {"role": "user", "content": text})]
    tools: list[ResponsesTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_stored(cls, data: Any) -> Any:
        for field in ("previous_response_id", "conversation"):
            if isinstance(data, dict) and data.get(field) is not None:
                message = f"{field} is not supported, since no response is stored: send the earlier items in input."
                raise ApiError(message, param=field, code="unsupported_parameter")
        return data

    @model_validator(mode="after")
    def _named_schema(self) -> Self:
        form = self.text and self.text.format
        if form and (form.type == "json_schema") is (form.schema_ is None or form.name is None):
            message = "text.format: name and schema go with the type json_schema, and with no other."
            raise ApiError(message, param="text.format", code="invalid_value")
        return self

    def as_chat(self) -> ResponsesChatRequest:
        """Return the chat request with the same messages."""
        messages = _chat_messages(self.input)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        fields = {name: getattr(self, name) for name in (*RequestFields.model_fields, "parallel_tool_calls")}
        fields["reasoning_effort"] = self.reasoning and self.reasoning.effort
        if self.text and self.text.format:
            fields["response_format"] = self.text.format.response_format
        if self.tools:
            declared = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in self.tools]
            fields["tools"] = [{"type": "function", "function": function} for function in declared]
        choice = self.tool_choice
        if isinstance(choice, dict):
            name = {key: value for key, value in choice.items() if key != "type"}
            choice = {"type": choice.get("type"), "function": name}
        limit = {"max_completion_tokens": self.max_output_tokens, "tool_choice": choice}
        names = {"messages": "input", "response_format.json_schema": "text.format.schema"}
        return as_request(ResponsesChatRequest, {**fields, **limit, "messages": messages}, names)


def _chat_messages(items: Sequence[InputMessage | FunctionCallItem | FunctionOutputItem]) -> list[dict[str, Any]]:
    """Return the messages of a chat request; calls in a row, and a text before them, are one turn of the assistant."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": item.text})
        elif isinstance(item, FunctionOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages


class ResponsesFormat:
    """The documents of one response, complete or as the events of a stream."""

    end = ""

    def __init__(self, body: ResponsesRequest) -> None:
        self._body = body
        self.response_id, self._created = f"resp_{new_id()}", now()
        self._numbers = count()
        self._answer: GenerationRequest | None = None
        self._items: list[Document] = []
        self._parts: list[str] | None = None  # pieces of the last item's text or arguments, while it is in progress

    def response(self, answers: Sequence[GenerationRequest], usage: TokenUsage) -> Document:
        (answer,) = answers
        if answer.text:
            self._add(answer.text)
        for place, (name, arguments) in enumerate(answer.calls):
            self.call_chunk(0, CallDelta(place, name, arguments))
        self.finish_chunks(0, answer)
        return self._document(usage)

    def first_chunks(self, usage: TokenUsage) -> list[Document]:  # noqa: ARG002 - it comes last
        return [
            self._event("response.created", response=self._document(None)),
            self._event("response.in_progress", response=self._document(None)),
        ]

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:  # noqa: ARG002 - there is one answer
        """Return an event with some text; the first has the beginning of the message before it."""
        return self._add(chunk.text)

    def reasoning_chunk(self, index: int, text: str) -> list[Document]:  # noqa: ARG002
        """Return nothing: thinking is left out, and counted in the usage."""
        return []

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:  # noqa: ARG002 - there is one answer
        """Return the events with a piece of a call; the first has the end of the item before it."""
        events = []
        if delta.name is not None:
            call = {"call_id": f"call_{new_id()[:24]}", "name": delta.name, "arguments": ""}
            events = [*self._end(), *self._begin({"id": f"fc_{new_id()}", "type": "function_call", **call})]
        if delta.arguments:
            assert self._parts is not None, "a call begins with its name"
            self._parts.append(delta.arguments)
            events.append(self._item_event("response.function_call_arguments.delta", delta=delta.arguments))
        return events

    def finish_chunks(self, index: int, answer: GenerationRequest) -> list[Document]:  # noqa: ARG002 - there is one answer
        """Return the events that end the last item: an empty message if there was none."""
        events = [] if self._items else self._begin_message()
        self._answer = answer
        return [*events, *self._end()]

    def last_chunks(self, usage: TokenUsage) -> list[Document]:
        return [self._event(f"response.{self._status}", response=self._document(usage))]

    def error_chunk(self, error: ApiError) -> Document:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    @property
    def _status(self) -> Literal["in_progress", "completed", "incomplete"]:
        if self._answer is None:
            return "in_progress"
        return "completed" if self._answer.finish == "stop" else "incomplete"

    def _add(self, text: str) -> list[Document]:
        begun = self._parts is not None and self._items[-1]["type"] == "message"
        events = [] if begun else [*self._end(), *self._begin_message()]
        assert self._parts is not None
        self._parts.append(text)
        return [*events, self._part_event("response.output_text.delta", delta=text, logprobs=[])]

    def _begin_message(self) -> list[Document]:
        message = {"id": f"msg_{new_id()}", "type": "message", "role": "assistant", "content": []}
        return [*self._begin(message), self._part_event("response.content_part.added", part=_output_text(""))]

    def _begin(self, item: Document) -> list[Document]:
        self._parts = []
        self._items.append({**item, "status": "in_progress"})
        return [self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._items[-1])]

    def _end(self) -> list[Document]:
        """Return the events that end the item in progress, if there is one."""
        if self._parts is None:
            return []
        text, self._parts, item = "".join(self._parts), None, self._items[-1]
        cut = self._status == "incomplete"
        if item["type"] == "message":
            events = [
                self._part_event("response.output_text.done", text=text, logprobs=[]),
                self._part_event("response.content_part.done", part=_output_text(text)),
            ]
            item = {**item, "content": [_output_text(text)]}
        else:
            cut = cut and not is_object(text)
            done = "response.function_call_arguments.done"
            events = [self._item_event(done, name=item["name"], arguments=text)]
            item = {**item, "arguments": text}
        self._items[-1] = item | {"status": "incomplete" if cut else "completed"}
        return [
            *events,
            self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._items[-1]),
        ]

    def _event(self, kind: str, **fields: Any) -> Document:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _item_event(self, kind: str, **fields: Any) -> Document:
        """Return an event of the last item."""
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _part_event(self, kind: str, **fields: Any) -> Document:
        return self._item_event(kind, content_index=0, **fields)

    def _document(self, usage: TokenUsage | None) -> Document:
        body = self._body
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._items if self._answer else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,  # regardless of the request
            "temperature": body.temperature or 0.0,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": body.tool_choice or "auto",
            "tools": [
                {"parameters": None, "strict": None, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()
            ],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage
            and {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }


def _output_text(text: str) -> Document:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
