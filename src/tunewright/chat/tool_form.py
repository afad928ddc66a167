"""The form in which a chat template writes functions, calls and results, found by rendering and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tunewright.chat.shapes import declarations
from tunewright.chat.templates import HERMES_INSTEAD, Template
from tunewright.chat.text import TextEncoder
from tunewright.chat.tool_calls import BUILTIN, FORMS, CallForm, signed
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id

_NAME = "probe_function"
_RESULT = "probe result"
_ARGUMENTS = canonical_json({"a": 3, "b": 'x"y\\z\n', "c": {"d": [True, None, 1.5, "é"]}})


@dataclass(frozen=True)
class ToolForm:
    """A chat template's way to write calls."""

    form: CallForm
    parallel: bool
    """Whether a turn may have several calls."""
    with_text: bool
    """Whether a turn may have text before its calls."""
    example: str
    """A rendered turn with one call, up to its end token."""

    def check(self, answer: str, message: Message, template: Template) -> None:
        """Check that a rendered turn reads back as the turn.

        Args:
            answer: the turn's text, as :func:`tunewright.chat.tool_calls.signed` writes it.
            message: the turn.
            template: rendered it.

        Raises:
            UserError: the template drops or changes a part, or a text without calls reads as calls.
        """
        read = self.form.read(answer)
        calls = [(call.name, call.arguments) for call in message.calls]
        if read is None:
            if not calls:
                return
            what = f"The chat template changes the calls {message.text[:100]!r}, so that they cannot be read back"
        elif read[1] != calls:
            what = (
                f"The chat template changes the calls {message.text[:100]!r}, so that they read as others"
                if calls
                else f"The answer {message.content[:60]!r} reads as a function call in the form of {self.form.name}"
            )
        elif read[0].strip() != message.content.strip():
            what = f"The chat template drops the text {message.content[:60]!r} of a turn with calls"
        else:
            return
        raise UserError(what, where=template.name, fix=f"Correct the turn. {_instead(template)}".strip())


def has_functions(messages: Sequence[Message]) -> bool:
    """Return whether a conversation declares functions, calls them or has their results."""
    return any(m.role in ("tools", "tool") or m.calls for m in messages)


def refuse_undeclared(messages: Sequence[Message]) -> None:
    """Refuse calls and results in a conversation that declares no functions.

    Raises:
        UserError: such a conversation; templates would drop these turns or render them as others.
    """
    if messages[0].role != "tools":
        raise UserError("Function calls or results without declared functions", where="messages", fix="Declare them.")


def find_tool_form(template: Template, encoder: TextEncoder, answer_in: Callable[[str, str], str]) -> ToolForm:
    """Return the form of a template's calls.

    Args:
        template: the template.
        encoder: reads a rendered text as the base's tokenizer does.
        answer_in: `ChatFormat.answer_in`.

    Raises:
        UserError: the template drops functions, calls or results, or writes calls that cannot be read back.
    """
    asked = [Message("tools", declarations([_NAME])), Message("user", "x")]
    call = ToolCall(_NAME, _ARGUMENTS, call_id(0))
    turn = Message("assistant", "", calls=(call,))
    result = Message("tool", _RESULT, call_id=call.id)
    prompt = _render(template, asked, generation_prompt=True)
    if _NAME not in prompt:
        raise _refused(template, "drops the declarations of functions")
    shown = _render(template, [*asked, turn], generation_prompt=False)
    answer = answer_in(prompt, shown)
    if _NAME not in answer:
        raise _refused(template, "drops function calls")
    form = _reading(encoder, answer)
    if form is None:
        raise _refused(template, f"writes calls in a form that cannot be read back: {answer[:100]!r}")
    if _RESULT not in _render(template, [*asked, turn, result], generation_prompt=True):
        raise _refused(template, "drops the results of functions")

    def reads_back(turn: Message) -> bool:
        try:
            prompt = template.render(asked, generation_prompt=True)
            answer = answer_in(prompt, template.render([*asked, turn], generation_prompt=False))
        except UserError:
            return False
        read = form.read(signed(encoder.pieces(answer, {}, start=False), encoder.control_names))
        expected = [(call.name, call.arguments) for call in turn.calls]
        return read is not None and (read[0].strip(), read[1]) == (turn.content, expected)

    second = ToolCall(_NAME, _ARGUMENTS, call_id(1))
    return ToolForm(
        form,
        parallel=reads_back(Message("assistant", "", calls=(call, second))),
        with_text=reads_back(Message("assistant", "x", calls=(call,))),
        example=answer,
    )


def rendered_calls(template: Template) -> Iterator[str]:
    """Return conversations that end with a call, of an ordinary and of a built-in function; none without a form."""
    for name in (_NAME, *sorted(BUILTIN)[:1]):
        asked = [Message("tools", declarations([name])), Message("user", "x")]
        turn = Message("assistant", "", calls=(ToolCall(name, '{"query":"x"}', call_id(0)),))
        try:
            prompt = template.render(asked, generation_prompt=True)
            shown = template.render([*asked, turn], generation_prompt=False)
        except UserError:
            continue
        if shown.startswith(prompt) and name in shown[len(prompt) :]:
            yield shown


def _reading(encoder: TextEncoder, answer: str) -> CallForm | None:
    """Return the form that reads the answer of the probe."""
    text = signed(encoder.pieces(answer, {}, start=False), encoder.control_names)
    for kind in FORMS:
        form = kind(encoder.control)
        read = form.read(text)
        if read is not None and read[1] == [(_NAME, _ARGUMENTS)]:
            return form
    return None


def _render(template: Template, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    try:
        return template.render(messages, generation_prompt=generation_prompt)
    except UserError as error:
        raise _refused(template, f"has no form for functions, calls and results ({error.what})") from error


def _refused(template: Template, what: str) -> UserError:
    return UserError(f"The chat template {what}", where=template.name, fix=_instead(template) or None)


def _instead(template: Template) -> str:
    return HERMES_INSTEAD if template.tools == "own" else ""
