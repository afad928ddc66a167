"""Thinking in answers: the form in which a chat template writes it, found by rendering, and how it is split off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from tunewright.chat.encoder import TextEncoder
from tunewright.chat.templates import NO_OPTIONS, Template
from tunewright.chat.tool_calls import without_signs
from tunewright.core.errors import UserError
from tunewright.data.examples import Message

_ASKED = (Message("user", "x"),)
_THOUGHT = "probe thought"
_ANSWER = "probe answer"
_FIRST_SIGN = 0xD900  # half a surrogate pair, as the signs of calls in `tool_calls`: no text contains one


@dataclass(frozen=True)
class ThinkingForm:
    """The marks around thinking in an answer, as text in which :attr:`signs` stand for control tokens."""

    opening: str
    """Empty if the prompt ends with it."""
    closing: str
    bare: str
    """The beginning of an answer without thinking, if it does not begin as one with thinking does."""
    signs: Mapping[int, str]
    end: str
    """The closing as the template writes it, without surrounding white space."""

    @property
    def in_prompt(self) -> bool:
        """True if prompts end with the opening, so that the model begins with the thinking itself."""
        return not self.opening

    def split(self, text: str, *, opened: bool) -> tuple[str, str]:
        """Return thinking and answer of a whole text; ``opened`` says that it begins within the thinking."""
        return ThinkingStream(self, opened=opened).push(text, end=True)


class ThinkingStream:
    """Splits one answer into thinking and answer while it is generated."""

    def __init__(self, form: ThinkingForm, *, opened: bool) -> None:
        self._form = form
        self._place: Literal["start", "thinking", "after", "answer"] = "thinking" if opened else "start"
        self._held = ""
        self._begun = False

    @property
    def thinking(self) -> bool:
        """True if the text so far ends within the thinking."""
        return self._place == "thinking"

    def push(self, text: str, *, end: bool = False) -> tuple[str, str]:
        """Return the further thinking and the further answer that are certain after this text."""
        self._held += text
        thought = answer = ""
        if self._place == "start":
            self._start(end=end)
        if self._place == "thinking":
            thought = self._think(end=end)
        if self._place == "after":
            self._held = self._held.lstrip("\n")
            self._place = "answer" if self._held else "after"
        if self._place == "answer":
            answer, self._held = self._held, ""
        return without_signs(thought), answer

    def _start(self, *, end: bool) -> None:
        text = self._held.lstrip()
        opening, bare = self._form.opening, self._form.bare
        if opening and text.startswith(opening):
            self._held, self._place = text.removeprefix(opening), "thinking"
        elif bare and text.startswith(bare):
            self._held, self._place = text.removeprefix(bare), "after"
        elif end or not any(mark.startswith(text) for mark in (opening, bare) if mark):
            self._place = "answer"

    def _think(self, *, end: bool) -> str:
        if not self._begun:
            self._held = self._held.lstrip()
        closing = self._form.closing
        before, found, after = self._held.partition(closing)
        if found:
            self._held, self._place = after, "after"
            return before.rstrip()
        # The end of the text may be the beginning of the closing, or white space before it.
        most = 0 if end else min(len(before), len(closing) - 1)
        part = next((n for n in range(most, 0, -1) if closing.startswith(before[-n:])), 0)
        certain = before[: len(before) - part].rstrip()
        self._begun = self._begun or bool(certain)
        self._held = "" if end else before[len(certain) :]
        return certain


_SWITCHES: Mapping[str, tuple[bool | str, ...]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("none", "minimal", "low", "medium", "high", "xhigh"),
}


def find_switches(template: Template) -> dict[str, tuple[bool | str, ...]]:
    """Return the options on thinking that change a template's prompts, each with the values that it takes."""
    default = template.render(_ASKED, generation_prompt=True)
    switches = {}
    for name, values in _SWITCHES.items():
        rendered: dict[bool | str, str] = {}
        for value in values:
            with suppress(UserError):
                rendered[value] = template.render(_ASKED, generation_prompt=True, options={name: value})
        if {default, *rendered.values()} != {default}:
            switches[name] = tuple(rendered)
    return switches


def find_thinking_form(
    template: Template,
    encoder: TextEncoder,
    answer_in: Callable[[str, str], str],
    options: Mapping[str, Any] = NO_OPTIONS,
) -> ThinkingForm | None:
    """Return the form of a template's thinking; None if answers have none, or one without an end.

    ``encoder`` reads a rendered text as the base's tokenizer does, and ``answer_in`` is ``ChatFormat.answer_in``.
    """
    if template.thinking is None:
        return None
    prompt = template.render(_ASKED, generation_prompt=True, options=options)
    thinking = Message("assistant", _ANSWER, reasoning=_THOUGHT)
    try:
        answers = [
            answer_in(prompt, template.render([*_ASKED, turn], generation_prompt=False, options=options))
            for turn in (thinking, Message("assistant", _ANSWER))
        ]
    except UserError:
        return None
    before, found, rest = answers[0].partition(_THOUGHT)
    if not found:  # prompts end with an empty thinking, so answers have none
        return None
    end = rest.partition(_ANSWER)[0].strip()
    bare = answers[1].partition(_ANSWER)[0].strip()
    controls = sorted({token for text in (before, end, bare) for token, _, _ in encoder.control_places(text)})
    signs = {token: chr(_FIRST_SIGN + place) for place, token in enumerate(controls)}

    def signed(text: str) -> str:
        pieces = encoder.pieces(text, {}, start=False)
        return "".join(piece if isinstance(piece, str) else signs[piece] for piece in pieces).strip()

    opening = signed(before)
    bare = signed(bare)
    return ThinkingForm(opening, signed(end), "" if opening and bare.startswith(opening) else bare, signs, end)
