"""What a pair's instruction is, and other wordings in its place.

The instruction is what all pairs are told alike. It is found in the pairs themselves:

1. Every pair begins with one system turn, the same in all: that is the instruction.
2. No pair has a system turn, and all first user turns begin alike: that beginning is, up to its last line break, or
   else up to its last colon or end of a sentence, if it has two words or more.
3. No pair has a system turn, and their user turns do not begin alike: there is none, and another one is put before
   the conversation as a system turn.

Anything else is refused: where system turns differ, they may say something of their own about each pair.
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
    """What all pairs are told alike, and where in a conversation it stands."""

    place: Literal["system", "beginning", "none"]
    text: str
    """With the white space that parts it from what follows."""

    def replaced(self, messages: Sequence[Message], other: str) -> tuple[Message, ...]:
        """Return the conversation with ``other`` in the instruction's place, in every user turn that begins with it."""
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
        UserError: some pairs have a system turn and others have none, or another, or several.
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
    # What the first and the last of them in order have in common, all have.
    common = texts[0][: common_prefix(min(texts), max(texts))]
    beginning = next((found[0] for end in _ENDS if (found := end.match(common))), "")
    if len(texts) > 1 and len(beginning.split()) >= 2 and all(len(text) > len(beginning) for text in texts):
        return Instruction("beginning", beginning)
    return Instruction("none", "")
