"""The form in which a chat template writes functions, calls and results, found by rendering and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tunewright.chat.encoder import TextEncoder
from tunewright.chat.templates import HERMES_INSTEAD, Template, declarations
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
        """Check that a turn as the template rendered it (in ``signed`` form) reads back as the turn."""
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
        instead = f" {HERMES_INSTEAD}" if template.tools == "own" else ""
        raise UserError(what, where=template.name, fix=f"Correct the turn.{instead}")


def has_functions(messages: Sequence[Message]) -> bool:
    """Return whether a conversation declares functions, calls them or has their results."""
    return any(m.role in ("tools", "tool") or m.calls for m in messages)


def refuse_undeclared(messages: Sequence[Message]) -> None:
    """Refuse calls and results without declared functions: templates drop these turns or render them as other turns."""
    if messages[0].role != "tools":
        raise UserError("Function calls or results without declared functions", where="messages", fix="Declare them.")


def find_tool_form(template: Template, encoder: TextEncoder, answer_in: Callable[[str, str], str]) -> ToolForm:
    """Return the form of a template's calls, which must keep functions, calls and results, and read back.

    ``encoder`` reads a rendered text as the base's tokenizer does, and ``answer_in`` is ``ChatFormat.answer_in``.
    """
    asked = [Message("tools", declarations([_NAME])), Message("user", "x")]
    call = ToolCall(_NAME, _ARGUMENTS, call_id(0))
    turn = Message("assistant", "", calls=(call,))
    result = Message("tool", _RESULT, call_id=call.id)
    prompt = _render(template, asked, generation_prompt=True)
    if _NAME not in prompt:
        raise _template_error(template, "drops the declarations of functions")
    shown = _render(template, [*asked, turn], generation_prompt=False)
    answer = answer_in(prompt, shown)
    if _NAME not in answer:
        raise _template_error(template, "drops function calls")
    text = signed(encoder.pieces(answer, {}, start=False), encoder.control_names)
    forms = (kind(encoder.control) for kind in FORMS)
    form = next((form for form in forms if (read := form.read(text)) and read[1] == [(_NAME, _ARGUMENTS)]), None)
    if form is None:
        raise _template_error(template, f"writes calls in a form that cannot be read back: {answer[:100]!r}")
    if _RESULT not in _render(template, [*asked, turn, result], generation_prompt=True):
        raise _template_error(template, "drops the results of functions")

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
    """Return conversations that end with a call, of an ordinary and of a built-in function; empty without a form."""
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


def _render(template: Template, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    try:
        return template.render(messages, generation_prompt=generation_prompt)
    except UserError as error:
        raise _template_error(template, f"has no form for functions, calls and results ({error.what})") from error


def _template_error(template: Template, what: str) -> UserError:
    fix = HERMES_INSTEAD if template.tools == "own" else None
    return UserError(f"The chat template {what}", where=template.name, fix=fix)
