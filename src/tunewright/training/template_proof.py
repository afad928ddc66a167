"""The proof of a base's chat template: the conversations that training and serving use are rendered and masked exactly.

It runs on the base's real tokenizer and template, without its weights, in about a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

from tunewright.chat.format import ChatFormat
from tunewright.chat.templates import declarations
from tunewright.config import ReasoningMode
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message, Role, ToolCall, call_id
from tunewright.data.versions import Member
from tunewright.training.rows import encode_members

Part = Literal["answers", "turns", "system", "control tokens", "end tokens", "date", "functions", "thinking"]
State = Literal["passed", "absent", "failed"]

_TEXTS = (
    "Which  court,\n\n1st?",
    "D. Mass. – «naïve» 東京 🙂",
    "And the 2nd?",
    "Cir. 42,\n\tsecond",
    "Third?",
    "3d Cir.",
)
"""Different in each turn, so that a dropped or repeated turn shows."""
_SYSTEM = "Cite the court of this matter."
_NAME = "find_court"


@dataclass(frozen=True)
class TemplateFinding:
    """A part of the proof."""

    part: Part
    state: State
    """``absent``: the template has no form for it, and conversations that need it are refused."""
    found: str
    """What the template does, or why the part is absent or failed."""


def prove_template(open_format: Callable[[], ChatFormat]) -> tuple[TemplateFinding, ...]:
    """Prove the chat format that a function opens; the first finding is the only one if no answer can be rendered."""
    try:
        chat = open_format()
        asked = [Message("user", _TEXTS[0])]
        if fault := _fault(chat, [*asked, Message("assistant", _TEXTS[1])]):
            return (TemplateFinding("answers", "failed", fault),)
    except UserError as error:
        return (TemplateFinding("answers", "failed", error.what),)
    ends = ", ".join(sorted(map(str, chat.tokenizer.convert_ids_to_tokens(sorted(chat.stop_ids)))))
    return (
        TemplateFinding("answers", "passed", "trained from the end of the served prompt to the end token"),
        _turns(chat),
        _system(chat),
        _control(chat),
        TemplateFinding("end tokens", "passed", ends),
        _date(chat),
        _functions(chat),
        _thinking(chat),
    )


def _turns(chat: ChatFormat) -> TemplateFinding:
    roles: Sequence[Role] = ("user", "assistant") * 3
    turns = [Message(role, text) for role, text in zip(roles, _TEXTS, strict=True)]
    if fault := _fault(chat, turns):
        return TemplateFinding("turns", "failed", fault)
    rows = len(chat.rows(turns))
    return TemplateFinding("turns", "passed", "one row" if rows == 1 else "earlier turns change: one row per answer")


def _system(chat: ChatFormat) -> TemplateFinding:
    turns = [Message("system", _SYSTEM), Message("user", _TEXTS[0]), Message("assistant", _TEXTS[1])]
    try:
        chat.prompt(turns[:2])
    except UserError as error:
        return TemplateFinding("system", "absent", error.what)
    return _checked("system", _fault(chat, turns), "rendered")


def _control(chat: ChatFormat) -> TemplateFinding:
    """Check that control tokens in messages stay text: the row has no more of them than one with ordinary texts."""
    tokens = sorted(chat.encoder.control)
    written = " ".join(["a", *tokens, "b"])
    turns = [Message("user", written), Message("assistant", written)]
    fault = _fault(chat, turns)
    if not fault:
        control = set(chat.encoder.control.values())
        ordinary = chat.rows([replace(turn, content="a b") for turn in turns])
        counts = [
            [token for row in rows for token in row.ids if token in control] for rows in (chat.rows(turns), ordinary)
        ]
        fault = None if counts[0] == counts[1] else "texts that spell control tokens become control tokens"
    return _checked("control tokens", fault, f"{len(tokens)} stay text in messages")


def _date(chat: ChatFormat) -> TemplateFinding:
    asked = [Message("user", _TEXTS[0])]
    today = chat.template.today
    later = replace(chat.template, today=today + timedelta(days=40))
    writes = later.render(asked, generation_prompt=True) != chat.template.render(asked, generation_prompt=True)
    return TemplateFinding(
        "date", "passed" if writes else "absent", f"chat.date ({today})" if writes else "not written"
    )


def _functions(chat: ChatFormat) -> TemplateFinding:
    try:
        form = chat.tool_form
    except UserError as error:
        return TemplateFinding("functions", "absent", " ".join(filter(None, (f"{error.what}.", error.fix))))
    call = ToolCall(_NAME, '{"query":"x \\"y\\""}', call_id(0))
    turns = [
        Message("tools", declarations([_NAME])),
        Message("user", _TEXTS[0]),
        Message("assistant", "", calls=(call,)),
        Message("tool", _TEXTS[2], call_id=call.id),
        Message("assistant", _TEXTS[1]),
    ]
    several = "several calls in a turn" if form.parallel else "one call in a turn"
    return _checked("functions", _fault(chat, turns), f"{form.form.name}, {several}")


def _thinking(chat: ChatFormat) -> TemplateFinding:
    if chat.thinking is None:
        return TemplateFinding("thinking", "absent", "not written: rows with thinking need chat.reasoning: strip")
    turns = [
        Message("user", _TEXTS[0]),
        Message("assistant", _TEXTS[1], reasoning="first,\n\nof all"),
        Message("user", _TEXTS[2]),
        Message("assistant", _TEXTS[3], reasoning=f"then {min(chat.encoder.control)}"),
    ]
    modes: tuple[ReasoningMode, ...] = ("train", "mask", "strip")
    faults = (_fault(replace(chat, reasoning=mode), some) for mode in modes for some in (turns, turns[:2]))
    kept = turns[1].reasoning in chat.texts([chat.prompt(turns[:3])])[0]
    options = "".join(f"; {name}: {', '.join(map(str, values))}" for name, values in chat.switches.items())
    earlier = "kept" if kept else "dropped"
    return _checked("thinking", next(filter(None, faults), None), f"that of earlier turns is {earlier}{options}")


def _checked(part: Part, fault: str | None, found: str) -> TemplateFinding:
    return TemplateFinding(part, "failed", fault) if fault else TemplateFinding(part, "passed", found)


def _fault(chat: ChatFormat, turns: Sequence[Message]) -> str | None:
    """Return why a conversation is not rendered exactly; None if it is.

    Each row spells and trains its turns (``encode_members``), begins as the served prompt of its first answer, and
    that prompt has every earlier turn once.
    """
    member = Member(Example(tuple(turns)), "proof", "train", "proof")
    encoded = encode_members(chat, [member], 1 << 20)
    if encoded.faults:
        return encoded.faults[0].partition("): ")[2]
    try:
        return next(_prompt_faults(chat, turns, [row.ids for row in encoded.rows]), None)
    except UserError as error:
        return error.what


def _prompt_faults(chat: ChatFormat, turns: Sequence[Message], rows: Sequence[tuple[int, ...]]) -> Iterator[str]:
    for place, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = chat.prompt(turns[:place])
        if not any(row[: len(prompt)] == prompt for row in rows):
            yield f"no row begins as the served prompt of the answer {turn.text[:40]!r}"
        text = chat.texts([prompt])[0].replace("\u2581", " ")
        for earlier in turns[:place]:
            if earlier.role in ("system", "user", "assistant") and earlier.content.strip():
                count = text.count(earlier.content.strip())
                if count != 1:
                    yield f"the prompt has the {earlier.role} turn {earlier.content[:40]!r} {count} times"
