"""Functions in chat requests: declarations, calls and results (https://platform.openai.com/docs/guides/function-calling).

The model never sees a client's call ids, which are random: they are replaced by their place, as in datasets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_message
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.generation.requests import Completion, Finish
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.parsing import Part

if TYPE_CHECKING:
    from tunewright.serving.gateway.schemas import ChatMessage

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class FunctionDeclaration(Part):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """A declared function."""

    type: Literal["function"]
    function: FunctionDeclaration


class ChosenFunction(Part):
    """The name of a function."""

    name: FunctionName


class ToolChoice(Part):
    """The choice of one function, which the answer must call."""

    type: Literal["function"]
    function: ChosenFunction


def _choice(choice: Any) -> Any:
    if choice is None or choice in ("auto", "none", "required"):
        return choice
    try:
        return ToolChoice.model_validate(choice)
    except ValidationError:
        raise PydanticCustomError("tool_choice", "must be auto, none, required, or name a function") from None


Choice = Annotated[str | ToolChoice | None, BeforeValidator(_choice)]


def _canonical(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
        if isinstance(value, dict):
            return canonical_json(value)
    except (ValueError, RecursionError):
        pass
    raise PydanticCustomError("arguments", "must be the text of a JSON object")


class CalledFunction(Part):
    """A function with the arguments of a call, as text."""

    name: FunctionName
    arguments: Annotated[str, BeforeValidator(_canonical)]


class AssistantCall(Part):
    """A call in an assistant's turn."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["function"] = "function"
    function: CalledFunction


def declarations(tools: Sequence[Tool]) -> Message:
    """Return the message that declares functions.

    Raises:
        ApiError: 400, two functions have the same name.
    """
    names = [tool.function.name for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            message = f"tools.{number}: the function {name} is declared twice."
            raise ApiError(message, param=f"tools.{number}", code="invalid_value")
    declared = [
        {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}
        for tool in tools
    ]
    return Message("tools", canonical_json(declared))


def numbered(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return the messages with calls named by their places.

    Raises:
        ApiError: 400, a result answers no open call, or a call has no result.
    """
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


class CallReader:
    """Reads the calls of one answer, and says while it is generated what is certain to be content.

    Args:
        chat: the base's format.
        conversation: the answered messages, which declare functions.
    """

    def __init__(self, chat: ChatFormat, conversation: Sequence[Message]) -> None:
        self._chat = chat
        self._conversation = conversation
        self._start = chat.tool_form.form.start
        self._ids: list[int] = []
        self._mark: int | None = None

    def push(self, token: int, decoded: int) -> None:
        """Take the next token, after which ``decoded`` characters of the answer's text came."""
        self._ids.append(token)
        if token in self._start.ids and self._mark is None:
            self._mark = decoded

    def certain(self, text: str) -> int:
        """Return how much of the text so far is certain to be content; the rest may be the beginning of calls."""
        marks, first = self._start.texts, text.lstrip()
        if self._start.first_only:
            marked = self._mark is not None and not text[: self._mark].strip()
            may_begin = not first or any(first.startswith(mark) or mark.startswith(first) for mark in marks)
            return 0 if marked or may_begin else len(text)
        begins = [place for mark in marks if (place := text.find(mark)) >= 0]
        begins += [] if self._mark is None else [self._mark]
        if not begins:
            lengths = range(min(len(text), max(map(len, marks), default=0)), 0, -1)
            half = next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in marks)), 0)
            begins = [len(text) - half]
        return len(text[: min(begins)].rstrip())  # some forms have white space before calls

    def read(self, text: str, finish: Finish, *, stopped: bool) -> Message:
        """Return the whole answer as the assistant's turn.

        Args:
            text: the answer's text.
            finish: why it ended.
            stopped: a stop string ended it, which the text does not have.
        """
        completion = Completion(tuple(self._ids), finish, text if stopped else None)
        return answer_message(self._chat, completion, self._conversation)
