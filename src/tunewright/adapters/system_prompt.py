"""The system prompt that an adapter was trained with: the system turn that all its training rows share.

Rows of the generic mix-in and of replay do not count: they are there against forgetting, and are not the task.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.versions import Member, load_version

KEY = "system_prompt"
"""The lineage's key."""

_SHOWN_CHARACTERS = 80
_IMPORTED = (
    "it was imported without a lineage, so the one that it was trained with is not known "
    "(`tunewright adapters import --system-prompt` states it)"
)


@dataclass(frozen=True)
class SystemPrompt:
    """What is put before a request that has no system message of its own."""

    text: str | None
    """None: nothing is."""
    why_none: str | None = None
    """Why the adapter's prompt is not known or not used; None where its rows simply have no system turn."""

    @property
    def shown(self) -> str:
        """The prompt or the reason, on one line."""
        if self.text is None:
            return f"none: {self.why_none}" if self.why_none else "none: no training row has a system turn"
        line = " ".join(self.text.split())
        return f'"{line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"}"'

    def report(self, name: str, reporter: Reporter) -> None:
        """Say what a server adds to requests for ``name``; nothing where there is nothing that could be added."""
        if self.text is not None:
            reporter.say(f"{name}: requests without a system message get the trained system prompt: {self.shown}")
        elif self.why_none is not None:
            reporter.warn(f"{name}: no system prompt is added: {self.why_none}")


def count_system_turns(members: Sequence[Member]) -> dict[str, Any]:
    """Return the lineage's record of the system turns of training rows.

    Args:
        members: the training rows of the domain.

    Returns:
        ``text``, the turn that all rows share (None where there is no such turn); the number of ``rows``; how many are
        ``without`` a system turn; and how many ``distinct`` system turns the others have.
    """
    turns = Counter(next((m.content for m in member.example.prompt if m.role == "system"), None) for member in members)
    without = turns.pop(None, 0)
    shared = next(iter(turns)) if len(turns) == 1 and not without else None
    return {"text": shared, "rows": len(members), "without": without, "distinct": len(turns)}


def stated_system_prompt(text: str) -> dict[str, Any]:
    """Return the lineage's record of what the user states of a foreign adapter's training rows.

    Raises:
        UserError: an empty text.
    """
    if not text.strip():
        raise UserError("The system prompt is empty.", where="--system-prompt", fix="Leave it out.")
    return {"text": unicodedata.normalize("NFC", text)}


def system_prompt(adapter: Adapter, dataset: Path) -> SystemPrompt:
    """Return the system prompt that an adapter was trained with.

    An adapter whose lineage does not have it was trained before lineages did: its dataset version says it, if that is
    here.

    Args:
        adapter: a stored one.
        dataset: the project's dataset folder.
    """
    told = adapter.lineage.get(KEY)
    if told is not None:
        return _of(told)
    if adapter.dataset is None:
        return SystemPrompt(None, _IMPORTED)
    try:
        version = load_version(dataset, adapter.dataset)
    except UserError as error:
        return SystemPrompt(
            None,
            "its lineage does not have the one that it was trained with, and its dataset version cannot be read "
            f"({error.what})",
        )
    return _of(count_system_turns(version.domain_of("train")))


def _of(told: Mapping[str, Any]) -> SystemPrompt:
    if told["text"] is not None or not told["distinct"]:
        return SystemPrompt(told["text"])
    turns = f"{told['distinct']:,} different system turns" if told["distinct"] > 1 else "a system turn"
    if told["without"]:
        some = f"{told['rows'] - told['without']:,} of its {told['rows']:,} training rows have {turns}"
        return SystemPrompt(None, f"{some}, and {told['without']:,} have none")
    return SystemPrompt(None, f"its {told['rows']:,} training rows have {turns}")
