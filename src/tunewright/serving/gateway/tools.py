"""Functions in chat requests: declarations, calls and results (https://platform.openai.com/docs/guides/function-calling).

The model never sees a client's call ids, which are random: they are replaced by their place, as in datasets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from tunewright.chat import ChatFormat
from tunewright.chat.call_stream import CallDelta, CallStream
from tunewright.chat.thinking import ThinkingForm, ThinkingStream
from tunewright.chat.tool_calls import Call, without_signs
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.data.tools import ArgumentsError, DeclarationError, canonical_arguments, canonical_function
from tunewright.generation.requests import Finish
from tunewright.serving.gateway.errors import ApiError, Part

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


def _canonical_object(text: str) -> str | None:
    try:
        return canonical_arguments(text)[0]
    except ArgumentsError:
        return None


def is_object(text: str) -> bool:
    """Return whether this is the text of a JSON object."""
    return _canonical_object(text) is not None


def _canonical(arguments: Any) -> Any:
    text = _canonical_object(arguments) if isinstance(arguments, str) else None
    if text is None:
        raise PydanticCustomError("arguments", "must be the text of a JSON object")
    return text


class CalledFunction(Part):
    """A function with the arguments of a call, as text."""

    name: FunctionName
    arguments: Annotated[str, BeforeValidator(_canonical)]
    parsed_arguments: Any = None  # OpenAI's client adds them to a turn that it has parsed: the same as ``arguments``


class AssistantCall(Part):
    """A call in an assistant's turn."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["function"] = "function"
    function: CalledFunction


def declarations(tools: Sequence[Tool]) -> Message:
    """Return the message that declares functions."""
    names = [tool.function.name for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            message = f"tools.{number}: the function {name} is declared twice."
            raise ApiError(message, param=f"tools.{number}", code="invalid_value")
    declared = []
    for number, tool in enumerate(tools):
        try:
            function = canonical_function(tool.function.model_dump())
        except DeclarationError as error:
            param = f"tools.{number}.function"
            raise ApiError(f"{param}: {error}.", param=param, code="invalid_value") from None
        declared.append({"type": "function", "function": function})
    return Message("tools", canonical_json(declared))


class AnswerReader:
    """Splits one answer into thinking, content and calls while it is generated.

    Args:
        thinking: the form of its thinking; None if it has none.
        calls: "only" if it must be calls, "auto" if it may be, "none" if it is text.
    """

    def __init__(
        self, chat: ChatFormat, thinking: ThinkingForm | None, *, calls: Literal["none", "auto", "only"]
    ) -> None:
        signs: dict[int, str] = {}
        self._calls: CallStream | None = None
        if calls != "none":
            form = chat.tool_form.form
            self._calls = CallStream(form, calls_only=calls == "only")
            signs |= {token: form.signs[mark] for mark, token in form.control.items()}
        self._thinking: ThinkingStream | None = None
        if thinking is not None:
            self._thinking = ThinkingStream(thinking, opened=thinking.in_prompt)
            signs |= thinking.signs
        # Some tokenizers' decoders drop marks, as control tokens; other decoders, such as Qwen's, write them.
        self._signs = {token: (sign, len(chat.text([token]))) for token, sign in signs.items()}
        self._pushed = 0
        self.thinking_tokens = 0
        """Tokens of the thinking so far."""
        self._marks: deque[tuple[int, str, int]] = deque()
        self._read = 0  # characters
        self._held = ""

    def push(self, token: int, decoded: int) -> None:
        """Take the next token, before which ``decoded`` characters of the answer's text came."""
        self._pushed += 1
        if token in self._signs:
            self._marks.append((decoded, *self._signs[token]))

    def read(self, text: str, finish: Finish | None) -> tuple[str, str, tuple[CallDelta, ...]]:
        """Return the further thinking and content, and the pieces of calls, that are certain after this text."""
        self._held += text
        end = self._read + len(self._held)
        parts = []
        while self._marks and self._marks[0][0] + self._marks[0][2] <= end:
            place, sign, width = self._marks.popleft()
            parts += [self._take(place), sign]
            self._take(place + width)
        parts.append(self._take(self._marks[0][0] if self._marks and finish is None else end))
        reasoning, answer = "", "".join(parts)
        if self._thinking is not None:
            reasoning, answer = self._thinking.push(answer, end=finish is not None)
            if self._thinking.thinking:
                self.thinking_tokens = self._pushed
        if self._calls is None:
            return reasoning, without_signs(answer), ()
        content, deltas = self._calls.push(answer)
        if finish is not None:
            rest, more = self._calls.end(cut=finish == "length")
            content, deltas = content + rest, deltas + more
        return reasoning, content, tuple(deltas)

    def _take(self, place: int) -> str:
        """Return the text up to this place of the answer that was not taken yet."""
        count = max(0, place - self._read)
        text, self._held = self._held[:count], self._held[count:]
        self._read += len(text)
        return text

    @property
    def begun(self) -> bool:
        """True if the answer has a call."""
        return self._calls is not None and self._calls.begun

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls so far, with their arguments as the model spells them."""
        return () if self._calls is None else tuple(self._calls.calls)

    @property
    def taken(self) -> int:
        """Characters of the decoded text that were read."""
        return self._read


def as_turn(text: str, calls: Sequence[Call]) -> Message:
    """Return an answer as the assistant's turn, with canonical arguments where they are a JSON object."""
    turns = (
        ToolCall(name, _canonical_object(arguments) or arguments, call_id(place))
        for place, (name, arguments) in enumerate(calls)
    )
    return Message("assistant", text, calls=tuple(turns))
