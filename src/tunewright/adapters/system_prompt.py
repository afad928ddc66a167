"""The system prompt of an adapter: the system turn that all its training rows share.

Rows of the generic mix-in and of replay do not count: they prevent forgetting and are not the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.unicode import mark_fault, normalize
from tunewright.data.versions import Member, load_version

KEY = "system_prompt"
"""The lineage's key."""

_SHOWN_CHARACTERS = 80
_IMPORTED = (
    "the adapter was imported without a lineage, so its system prompt is unknown "
    "(state it with `tunewright adapters import --system-prompt`)"
)


@dataclass(frozen=True)
class SystemPrompt:
    """The prompt that is added to requests without a system message."""

    text: str | None
    """None: nothing is added."""
    why_none: str | None = None
    """The reason why the prompt is unknown or unused; None if the training rows have no system turn."""

    @property
    def shown(self) -> str:
        """The prompt or the reason on one line."""
        if self.text is None:
            return f"none: {self.why_none}" if self.why_none else "none: no training row has a system turn"
        line = " ".join(self.text.split())
        return f'"{line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"}"'

    def report(self, name: str, reporter: Reporter) -> None:
        """Report the system prompt that a server adds to requests for ``name``, if any."""
        if self.text is not None:
            reporter.say(f"{name}: requests without a system message get the trained system prompt: {self.shown}")
        elif self.why_none is not None:
            reporter.warn(f"{name}: no system prompt is added: {self.why_none}")


def count_system_turns(members: Sequence[Member]) -> dict[str, Any]:
    """Return the lineage's record of the system turns of training rows.

    Args:
        members: the training rows of the domain.

    Returns:
        ``text``, the turn that all rows share (None if there is no such turn); the number of ``rows``; how many are
        ``without`` a system turn; and how many ``distinct`` system turns the others have.
    """
    turns = Counter(next((m.content for m in member.example.prompt if m.role == "system"), None) for member in members)
    without = turns.pop(None, 0)
    shared = next(iter(turns)) if len(turns) == 1 and not without else None
    return {"text": shared, "rows": len(members), "without": without, "distinct": len(turns)}


def stated_system_prompt(text: str) -> dict[str, Any]:
    """Return the lineage's record of the system prompt that the user states for a foreign adapter.

    Raises:
        UserError: an empty text, or too many combining marks in a row.
    """
    if not text.strip():
        raise UserError("The system prompt is empty", where="--system-prompt", fix="Remove the option.")
    if fault := mark_fault(text):
        raise UserError(f"The system prompt has {fault}", where="--system-prompt", fix="Remove the marks.")
    return {"text": normalize(text)}


def system_prompt(adapter: Adapter, dataset: Path) -> SystemPrompt:
    """Return the system prompt that an adapter was trained with.

    A lineage without it is older than this record. Then the dataset version has it, if it is available.

    Args:
        adapter: a stored one.
        dataset: the project's dataset folder.
    """
    recorded = adapter.lineage.get(KEY)
    if recorded is not None:
        return _from_record(recorded)
    if adapter.dataset is None:
        return SystemPrompt(None, _IMPORTED)
    try:
        version = load_version(dataset, adapter.dataset)
    except UserError as error:
        return SystemPrompt(
            None,
            "the adapter's lineage does not record its system prompt, and its dataset version cannot be read "
            f"({error.what})",
        )
    return _from_record(count_system_turns(version.domain_of("train")))


def _from_record(record: Mapping[str, Any]) -> SystemPrompt:
    if record["text"] is not None or not record["distinct"]:
        return SystemPrompt(record["text"])
    turns = f"{record['distinct']:,} different system turns" if record["distinct"] > 1 else "a system turn"
    if record["without"]:
        some = f"{record['rows'] - record['without']:,} of its {record['rows']:,} training rows have {turns}"
        return SystemPrompt(None, f"{some}, and {record['without']:,} have none")
    return SystemPrompt(None, f"its {record['rows']:,} training rows have {turns}")
