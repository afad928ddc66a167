"""The prompts of an evaluation's items: each message once in ``prompts.jsonl``, and its number in the items."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, text_lines
from tunewright.evidence.common import Part

PROMPTS_FILE = "prompts.jsonl"


class StoredPrompt(Part):
    """An arm's prompt for one item."""

    messages: Annotated[tuple[int, ...], Field(description="Numbers of its messages: lines of prompts.jsonl, from 1.")]
    tokens: Annotated[
        str | None, Field(description="Digest of its token ids; null: a hosted model, whose provider makes the tokens.")
    ] = None
    demonstrations: Annotated[
        tuple[str, ...], Field(description="Pair keys of the demonstrations, in the prompt's order.")
    ] = ()
    dropped: Annotated[bool, Field(description="Demonstrations were left out to fit the context.")] = False
    plan: Annotated[str | None, Field(description="The item's own arm where the folds differ; null: the arm.")] = None


class PromptMessages:
    """The distinct messages of an evaluation's prompts: instructions and demonstrations recur in most prompts."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Return the numbers of a prompt's messages, each in the form of OpenAI's API or with the role ``tools``."""
        lines = [canonical_json(dict(message)) for message in messages]
        return tuple(self._numbers.setdefault(line, len(self._numbers) + 1) for line in lines)

    @property
    def text(self) -> str:
        """The content of ``prompts.jsonl``."""
        return "".join(f"{line}\n" for line in self._numbers)


def load_messages(folder: Path) -> list[dict[str, Any]] | None:
    """Return the messages that an evaluation's prompts consist of; None if the file was deleted, or never written.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / PROMPTS_FILE
    if not file.exists():
        return None
    try:
        return [json.loads(line) for line in text_lines(file.read_text(encoding="utf-8"))]
    except ValueError:
        raise UserError("Not the messages of prompts", where=str(file), fix="Restore the file, or delete it.") from None
