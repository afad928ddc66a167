"""Anthropic's messages API (https://docs.anthropic.com/en/api/messages), for texts and functions.

A request is answered as the chat request with the same messages: the same prompt, limits and quota.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from tunewright.chat.call_stream import CallDelta
from tunewright.serving.gateway.errors import ApiError, Part, as_request, one_as_list
from tunewright.serving.gateway.request import GenerationRequest, TextChunk
from tunewright.serving.gateway.responses import Document, new_id
from tunewright.serving.gateway.schemas import (
    ANSWER_NEUTRAL,
    MAX_TOOLS,
    ChatRequest,
    Label,
    StopStrings,
    Temperature,
    TokenUsage,
    TopP,
)
from tunewright.serving.gateway.tools import FunctionName, is_object


def _supported(kind: Any) -> Any:
    if kind != "text":
        message = "{kind} is not supported, only text, tool_use and tool_result: remove the block"
        raise PydanticCustomError("block", message, {"kind": str(kind)[:50]})
    return kind


class _Block(Part):
    cache_control: Any = None  # a hint for Anthropic's cache


class TextBlock(_Block):
    """Some text."""

    type: Annotated[Literal["text"], BeforeValidator(_supported)]
    text: str


_one_block = one_as_list(lambda text: {"type": "text", "text": text})


class ToolUseBlock(_Block):
    """A call in an assistant's turn."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"caller": ({"type": "direct"},)}

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Block):
    """The result of a call, in a user's turn."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[TextBlock] | None, _one_block] = None
    is_error: bool | None = None  # not rendered: no chat template of Llama or Mistral has a place for it


def _block_type(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "tool_use":
        return "[use]"
    return "[result]" if kind == "tool_result" else "[text]"


Block = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ToolUseBlock, Tag("[use]")]
    | Annotated[ToolResultBlock, Tag("[result]")],
    Discriminator(_block_type),
]


class InputMessage(Part):
    """A turn; a plain string becomes a single block."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Block], Field(min_length=1), _one_block]

    @model_validator(mode="after")
    def _blocks_in_their_place(self) -> Self:
        for kind, role in ((ToolUseBlock, "assistant"), (ToolResultBlock, "user")):
            if self.role != role and any(isinstance(block, kind) for block in self.content):
                message = "tool_use goes with the role assistant, and tool_result with the role user"
                raise PydanticCustomError("blocks", message)
        return self

    def as_chat(self) -> list[dict[str, Any]]:
        """Return the same turn as messages of a chat request: each result is a message of its own."""
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        if self.role == "assistant":
            uses = [block for block in self.content if isinstance(block, ToolUseBlock)]
            calls = [
                {
                    "id": block.id,
                    "type": "function",
                    "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
                }
                for block in uses
            ]
            return [{"role": "assistant", "content": _joined(texts), "tool_calls": calls or None}]
        messages: list[dict[str, Any]] = []
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                result = _joined(block.content or ())
                messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
            elif isinstance(block, TextBlock) and messages and messages[-1]["role"] == self.role:
                messages[-1]["content"].append(_chat_part(block))
            elif isinstance(block, TextBlock):
                messages.append({"role": self.role, "content": [_chat_part(block)]})
        return messages


def _joined(texts: Sequence[TextBlock]) -> str:
    return "".join(block.text for block in texts)


def _chat_part(block: TextBlock) -> dict[str, str]:
    return {"type": "text", "text": block.text}


class MessagesTool(Part):
    """A declared function; ``input_schema`` is the JSON schema of its arguments."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"allowed_callers": (["direct"],)}

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None  # arguments are always streamed as they are generated

    def as_chat(self) -> dict[str, Any]:
        """Return the same function in a chat request."""
        schema = {"parameters": self.input_schema, "strict": self.strict}
        return {"type": "function", "function": {"name": self.name, "description": self.description, **schema}}


class MessagesToolChoice(Part):
    """The choice of functions."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.type == "tool") is (self.name is None):
            raise PydanticCustomError("name", "name goes with the type tool, and with no other")
        return self

    def as_chat(self) -> dict[str, Any]:
        """Return the same choice in a chat request."""
        named = {"type": "function", "function": {"name": self.name}}
        choice = named if self.type == "tool" else "required" if self.type == "any" else self.type
        return {"tool_choice": choice, "parallel_tool_calls": not self.disable_parallel_tool_use}


class JsonFormat(Part):
    """The form of the answer: JSON of a schema."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Part):
    """Options of the answer."""

    format: JsonFormat | None = None


class Metadata(Part):
    """A label of the request."""

    user_id: Label | None = None


class MessagesChatRequest(ChatRequest):
    """The chat request in place of a request for a message; its errors name the message request's fields."""

    parameters_param: ClassVar[str] = "tools.{}.input_schema"
    form_param: ClassVar[str | None] = "output_config.format.schema"


class MessagesRequest(Part):
    """The body of ``POST /v1/messages``. The temperature is 0 by default, as on the other routes."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ANSWER_NEUTRAL,
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
    }

    model: str
    max_tokens: Annotated[int, Field(ge=1)]
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: Annotated[list[TextBlock] | None, _one_block] = None
    tools: Annotated[list[MessagesTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: MessagesToolChoice | None = None
    output_config: OutputConfig | None = None
    stop_sequences: StopStrings | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    cache_control: Any = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_stored(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("thread") is not None:  # sent by the SDK's tool_runner by default
            message = "The field thread is not supported, since nothing is stored: send all messages (thread=False)."
            raise ApiError(message, param="thread", code="unsupported_parameter")
        return data

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> Self:
        if self.messages[-1].role == "assistant":
            message = "The last of messages is the assistant's turn, and continuing it is not supported: remove it."
            raise ApiError(message, param="messages", code="unsupported_parameter")
        return self

    def as_chat(self) -> MessagesChatRequest:
        """Return the chat request with the same messages."""
        same = ("model", "max_tokens", "temperature", "top_p", "stream")
        fields = {name: getattr(self, name) for name in same} | {"stop": self.stop_sequences}
        fields |= self.tool_choice.as_chat() if self.tool_choice else {}
        if self.metadata:
            fields["user"] = self.metadata.user_id
        if self.tools:
            fields["tools"] = [tool.as_chat() for tool in self.tools]
        if self.output_config and self.output_config.format:
            schema = {"name": "answer", "schema": self.output_config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        system = [{"role": "system", "content": _joined(self.system)}] if self.system else []
        fields["messages"] = [*system, *(chat for message in self.messages for chat in message.as_chat())]
        names = {"messages": "messages", "response_format": "output_config.format.schema"}
        return as_request(MessagesChatRequest, fields, names)


_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""https://docs.anthropic.com/en/api/errors"""


def error_document(error: ApiError) -> Document:
    """Return an error in Anthropic's format."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessagesFormat:
    """The documents of one message, complete or as the events of a stream."""

    end = ""

    def __init__(self, body: MessagesRequest) -> None:
        self._model = body.model
        self.response_id = f"msg_{new_id()}"
        self._index = -1  # index of the last block
        self._block: Literal["text", "tool_use"] | None = None  # in progress
        self._answer: GenerationRequest | None = None

    def response(self, answers: Sequence[GenerationRequest], usage: TokenUsage) -> Document:
        (answer,) = answers
        text = [{"type": "text", "text": answer.text}] if answer.text else []
        uses = [_tool_use(name, _input(arguments)) for name, arguments in answer.calls]
        return self._message([*text, *uses], answer, usage)

    def first_chunks(self, usage: TokenUsage) -> list[Document]:
        return [{"type": "message_start", "message": self._message([], None, usage)}]

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:  # noqa: ARG002 - there is one answer
        """Return an event with some text; the first has the beginning of the block before it."""
        events = [] if self._block == "text" else self._begin("text", {"type": "text", "text": ""})
        return [*events, self._delta({"type": "text_delta", "text": chunk.text})]

    def reasoning_chunk(self, index: int, text: str) -> list[Document]:  # noqa: ARG002
        """Return nothing: thinking is left out, as with Anthropic's models unless a request turns it on."""
        return []

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:  # noqa: ARG002 - there is one answer
        """Return the events with a piece of a call; the first has the beginning of the block before it."""
        events = [] if delta.name is None else self._begin("tool_use", _tool_use(delta.name, {}))
        if delta.arguments:
            events.append(self._delta({"type": "input_json_delta", "partial_json": delta.arguments}))
        return events

    def finish_chunks(self, index: int, answer: GenerationRequest) -> list[Document]:  # noqa: ARG002 - there is one answer
        """Return the event that ends the last block, if there is one."""
        self._answer = answer
        return self._end()

    def last_chunks(self, usage: TokenUsage) -> list[Document]:
        return [
            {"type": "message_delta", "delta": _stop(self._answer), "usage": _usage(usage)},
            {"type": "message_stop"},
        ]

    error_chunk = staticmethod(error_document)

    def _begin(self, kind: Literal["text", "tool_use"], block: Document) -> list[Document]:
        ended = self._end()
        self._index, self._block = self._index + 1, kind
        return [*ended, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: Document) -> Document:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _end(self) -> list[Document]:
        open_block, self._block = self._block, None
        return [] if open_block is None else [{"type": "content_block_stop", "index": self._index}]

    def _message(self, content: list[Document], answer: GenerationRequest | None, usage: TokenUsage) -> Document:
        head = {
            "id": self.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
        }
        return {**head, **_stop(answer), "usage": {**_usage(usage), "service_tier": "standard"}}


def _tool_use(name: str, arguments: Document) -> Document:
    return {"type": "tool_use", "id": f"toolu_{new_id()[:24]}", "name": name, "input": arguments}


def _input(arguments: str) -> Document:
    """Return a call's arguments; a text that is not an object (cut or malformed) gets Anthropic's wrapping.

    https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/fine-grained-tool-streaming
    """
    if is_object(arguments):
        found: Document = json.loads(arguments)
        return found
    return {"INVALID_JSON": arguments} if arguments else {}


def _stop(answer: GenerationRequest | None) -> Document:
    reason = None
    if answer is not None:
        ended = "stop_sequence" if answer.stop is not None else "tool_use" if answer.calls else "end_turn"
        reason = "max_tokens" if answer.finish == "length" else ended
    return {"stop_reason": reason, "stop_sequence": answer and answer.stop}


def _usage(usage: TokenUsage) -> Document:
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": usage.prompt_tokens, **cached, "output_tokens": usage.completion_tokens}
