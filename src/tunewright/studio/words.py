"""The words of a page for what files and messages of the program call otherwise."""

from __future__ import annotations

import re

ROLES = {"system": "Instructions", "user": "Question", "assistant": "Answer", "tool": "Tool result"}
"""Roles of a conversation, as the people say who review its pairs."""
TURN = re.compile(rf"^({'|'.join(ROLES)}): ", re.MULTILINE)
"""A role at the beginning of a line."""


def capital(text: str) -> str:
    """Return a sentence that begins with a capital letter; its other letters stay."""
    return text[:1].upper() + text[1:]
