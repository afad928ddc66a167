"""Finding the instruction that all pairs share, and replacing it with other wordings.

The instruction is the text that all pairs share. It is found in the pairs themselves:

1. Every pair begins with one system turn, the same in all: the instruction is that turn.
2. No pair has a system turn, and all first user turns share a prefix of two words or more. The instruction is the
   prefix up to its last line break, else up to its last colon or end of a sentence.
3. No pair has a system turn, and the user turns share no prefix: there is no instruction. Another wording is put before
   the conversation as a system turn.

Anything else is refused: differing system turns may carry information about each pair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.data.versions import Member
from tunewright.training.packing.plan import common_prefix

_KEY = "evaluate.instructions"
_ENDS = (re.compile(r"(?s).*\n\s*"), re.compile(r"(?s).*[:.?!]\s+"))


@dataclass(frozen=True)
class Instruction:
    """The instruction that all pairs share, and its place in a conversation."""

    place: Literal["system", "beginning", "none"]
    text: str
    """Text of the instruction, with the white space that separates it from the rest."""

    def replaced(self, messages: Sequence[Message], other: str) -> tuple[Message, ...]:
        """Return the conversation with ``other`` replacing the instruction in every user turn that begins with it."""
        if self.place == "none":
            return (Message("system", other), *messages)
        if self.place == "system":
            return tuple(replace(m, content=other) if m.role == "system" else m for m in messages)
        white = self.text[len(self.text.rstrip()) :]
        new = other.rstrip() + white
        return tuple(
            replace(m, content=new + m.content.removeprefix(self.text))
            if m.role == "user" and m.content.startswith(self.text)
            else m
            for m in messages
        )


def find_instruction(members: Sequence[Member]) -> Instruction:
    """Return the instruction of these pairs.

    Raises:
        UserError: system turns differ between pairs, are missing in some, or are several in one.
    """
    systems = Counter(tuple(m.content for m in member.example.prompt if m.role == "system") for member in members)
    if len(systems) > 1:
        (usual, count), *_ = systems.most_common(1)
        odd = next(m for m in members if tuple(t.content for t in m.example.prompt if t.role == "system") != usual)
        raise UserError(
            f"the pairs have {len(systems)} different system turns ({count:,} of {len(members):,} pairs share one; row "
            f"{odd.key[:12]} does not): another instruction in their place would take away what they say of each pair",
            where=_KEY,
            fix="Take the instructions out of the config, or give all pairs the same system turn.",
        )
    (turns,) = systems
    if len(turns) > 1:
        raise UserError(f"the pairs have {len(turns)} system turns each, and which is the instruction?", where=_KEY)
    if turns:
        return Instruction("system", turns[0])
    texts = [next(m.content for m in member.example.prompt if m.role == "user") for member in members]
    # A prefix shared by the first and the last in sorted order is shared by all.
    common = texts[0][: common_prefix(min(texts), max(texts))]
    beginning = next((found[0] for end in _ENDS if (found := end.match(common))), "")
    if len(texts) > 1 and len(beginning.split()) >= 2 and all(len(text) > len(beginning) for text in texts):
        return Instruction("beginning", beginning)
    return Instruction("none", "")
