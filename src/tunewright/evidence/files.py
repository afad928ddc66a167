"""An evaluation's files: evidence, items, and the prompts' messages; and a choice of its items."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, text_lines
from tunewright.core.log import numbered_lines, parse_line
from tunewright.core.numbers import name_numbered
from tunewright.core.progress import Reporter
from tunewright.evidence.schema import SCHEMA_VERSION, Contrast, Evidence, Item

READ_VERSIONS = (2, SCHEMA_VERSION)
"""Schema 2 has no prompts next to its items."""
EVIDENCE_FILE = "evidence.json"
ITEMS_FILE = "items.jsonl"
DEV_PREFIX = "dev-"
"""Prefix of the ID and folder name of an evaluation on the dev split."""


def load_evidence(path: Path) -> Evidence:
    """Load ``evidence.json`` from its path or folder."""
    file = path / EVIDENCE_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        version = _peek(text).get("schema_version")
        if isinstance(version, int) and version not in READ_VERSIONS:  # before validation reports every field
            raise UserError(
                f"Evidence of schema {version}; this tunewright reads schema {' or '.join(map(str, READ_VERSIONS))}",
                where=str(file),
                fix="Evaluate again: `tunewright evaluate` (or `crossval`). Existing answers are reused.",
            )
        return Evidence.model_validate_json(text)
    except FileNotFoundError:
        raise UserError("The folder has no evidence", where=str(file), fix="Run `tunewright evaluate`.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()
        raise UserError(
            f"Not evidence of schema {' or '.join(map(str, READ_VERSIONS))}: {' '.join(first[:3])}",
            where=str(file),
            fix="Restore the file, or remove its folder and evaluate again: existing answers are reused.",
        ) from None


def _peek(text: str) -> dict[str, Any]:
    """Return the file's content without validation; empty if it is not a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def find_evaluation(evaluations: Path, name: str | Path | None = None, *, dev: bool = True) -> Path:
    """Return an evaluation's folder by number, ID, folder or evidence file, else the newest."""
    if name is not None:
        name = name_numbered(evaluations, str(name)) or name
        place = next((p for p in (Path(name), evaluations / name) if p.exists()), None)
        if place is None:
            known = sorted(file.parent.name for file in evaluations.glob(f"[!.]*/{EVIDENCE_FILE}"))
            there = f"Use one of: {', '.join(known)}." if known else None
            raise UserError(f"No evaluation {str(name)!r}", where=str(evaluations), fix=there)
        return place
    files = [
        file
        for file in evaluations.glob(f"[!.]*/{EVIDENCE_FILE}")
        if dev or not file.parent.name.startswith(DEV_PREFIX)
    ]
    if not files:
        raise UserError("Nothing has been evaluated yet", where=str(evaluations), fix="Run `tunewright evaluate`.")
    # Only the newest evidence must have this schema; older ones may exist as well.
    return max(files, key=_created).parent


def evidence_on(evaluations: Path, adapter: str, reporter: Reporter) -> Evidence | None:
    """Return the newest evidence on one adapter from rows held out of its training; None if there is none."""
    for file in sorted(evaluations.glob(f"[!.]*/{EVIDENCE_FILE}"), key=_created, reverse=True):
        try:
            evidence = load_evidence(file)
        except UserError as error:
            reporter.warn(f"Skipped evidence: {error}")
            continue
        if (evidence.design, evidence.split) == ("held-out", "test") and evidence.lineage["adapter"][
            "digest"
        ] == adapter:
            return evidence
    return None


def _created(file: Path) -> str:
    lineage = _peek(file.read_text(encoding="utf-8", errors="replace")).get("lineage")
    return str(lineage.get("created", "")) if isinstance(lineage, dict) else ""


def load_items(folder: Path) -> list[Item]:
    """Load ``items.jsonl`` from the evidence's folder."""
    file = folder / ITEMS_FILE
    if not file.exists():
        raise UserError("The folder has no items", where=str(file), fix="Run `tunewright evaluate`.")
    return [
        parse_line(Item.model_validate_json, line, f"{file}:{number}", "Invalid test item")
        for number, line in numbered_lines(file.read_bytes())
    ]


PROMPTS_FILE = "prompts.jsonl"


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
    """Return the messages that an evaluation's prompts consist of; None if the file was deleted, or never written."""
    file = folder / PROMPTS_FILE
    if not file.exists():
        return None
    try:
        return [json.loads(line) for line in text_lines(file.read_text(encoding="utf-8"))]
    except ValueError:
        raise UserError("Not the messages of prompts", where=str(file), fix="Restore the file, or delete it.") from None


Change = Literal["broken", "fixed", "both right", "both wrong", "not scored"]
CHANGES: tuple[Change, ...] = get_args(Change)
"""Effects of the treatment on an item, by the deciding metric. With graded scores, *fixed* and *broken* mean a higher
and a lower score, *both right* the full score twice, and *both wrong* the same lower score."""


def change_of(item: Item, treatment: str, control: str, metric: str) -> Change:
    """Return the treatment's effect on the item's score."""
    scores = item.scores.get(metric, {})
    ours, theirs = scores.get(treatment), scores.get(control)
    if ours is None or theirs is None:
        return "not scored"
    if ours != theirs:
        return "fixed" if ours > theirs else "broken"
    return "both right" if ours == 1 else "both wrong"


@dataclass(frozen=True)
class ItemFilter:
    """A choice of items, by the scores of two arms and by the similarity of the nearest training input."""

    treatment: str
    control: str
    change: Change | None = None
    """None: any."""
    nearest: tuple[float, float] | None = None
    """The lowest and highest similarity; None means any, also items without it."""

    @classmethod
    def of(cls, contrast: Contrast) -> ItemFilter:
        """Return the filter that keeps all items of a contrast."""
        return cls(contrast.treatment, contrast.control)


def chosen_items(evidence: Evidence, items: Sequence[Item], kept: ItemFilter) -> list[tuple[int, Item, Change]]:
    """Return the items that a filter keeps: number from 1 in the evidence's order, item, effect of the treatment."""
    names = [arm.name for arm in evidence.arms]
    for arm in (kept.treatment, kept.control):
        if arm not in names:
            raise UserError(
                f"The evaluation has no arm {arm!r}", where=evidence.id, fix=f"Its arms: {', '.join(names)}."
            )
    found = []
    for number, item in enumerate(items, start=1):
        change = change_of(item, kept.treatment, kept.control, evidence.metric)
        if kept.change not in (None, change):
            continue
        if kept.nearest is not None:
            (low, high), nearest = kept.nearest, item.nearest
            # Like bands: from low up to but excluding high; the last one includes 1.
            if nearest is None or not (low <= nearest < high or nearest == high == 1):
                continue
        found.append((number, item, change))
    return found
