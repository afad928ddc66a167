"""A blind review in a spreadsheet: pairs out as CSV, verdicts back in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.clock import now
from tunewright.core.csv import one_line_end, read_sheet, refuse_faulty, restored_cell, write_sheet
from tunewright.core.errors import UserError
from tunewright.evaluation.human_eval.journal import SIDES, Event, NoteLine, ReferenceShownLine, Side
from tunewright.evaluation.human_eval.session import BlindReview

COLUMNS = ("evaluation", "item", "input", "A", "B", "verdict", "note")
REFERENCE = "reference"
"""An optional additional column."""
_SIDE_OF: Mapping[str, Side] = {side.lower(): side for side in SIDES}


@dataclass(frozen=True)
class SheetImport:
    """The result of an import: verdicts recorded, verdicts already there, rows without one, and notes recorded."""

    recorded: int
    known: int
    blank: int
    notes: int


def export_sheet(review: BlindReview, path: Path, *, reference: bool = False) -> int:
    """Write the pairs that the reviewer has not judged yet to a spreadsheet, and return their number.

    Args:
        reference: include the references; the reviewer then counts as having seen them.

    Raises:
        UserError: nothing is left to judge, the file already exists, or it cannot be written.
    """
    keys = review.open_keys()
    if not keys:
        raise UserError(
            f"{review.reviewer} has judged all pairs", fix="Show the results: tunewright human-eval --results"
        )
    columns = [*COLUMNS[:3], REFERENCE, *COLUMNS[3:]] if reference else COLUMNS
    rows = []
    for key in keys:
        pair = review.pair(key)
        cells = {"evaluation": review.evidence.id, "item": key, "input": pair.input, "A": pair.a, "B": pair.b}
        cells |= {REFERENCE: review.reference(key), "verdict": "", "note": pair.note}
        rows.append([cells[name] for name in columns])
    write_sheet(path, columns, rows)
    review.keep_sample()
    return len(rows)


def import_sheet(review: BlindReview, path: Path) -> SheetImport:
    """Record a filled-in sheet's verdicts and notes for this reviewer: all, or none if a row is faulty.

    Raises:
        UserError: the file cannot be read, is of another evaluation, or rows are faulty (the message names each line).
    """
    faults: list[str] = []
    events: list[Event] = []
    taken = {"recorded": 0, "known": 0, "blank": 0, "notes": 0}
    seen: dict[str, int] = {}
    for line, cells in read_sheet(path, COLUMNS, "tunewright human-eval --export"):
        _require_evaluation(cells["evaluation"], review, f"{path}:{line}")
        key = cells["item"]
        fault = _fault(review, cells)
        if key in seen and not fault:
            fault = f"duplicate of line {seen[key]}"
        seen.setdefault(key, line)
        if fault:
            faults.append(f"{path}:{line}: {fault}")
        else:
            _take(review, cells, events, taken)
    refuse_faulty(faults)
    review.record(events)
    return SheetImport(**taken)


def _require_evaluation(found: str, review: BlindReview, where: str) -> None:
    if found.strip() != review.evidence.id:
        raise UserError(
            f"The sheet belongs to evaluation {found.strip() or 'unknown'}, not to {review.evidence.id}; "
            "no verdict was recorded",
            where=where,
            fix=f"Import it there: tunewright human-eval {found.strip()} --import …" if found.strip() else None,
        )


def _fault(review: BlindReview, cells: Mapping[str, str]) -> str | None:
    key, verdict = cells["item"], cells["verdict"].strip()
    if key not in review.sample.order:
        return f"the sample has no item {key[:12]!r}"
    if verdict and verdict.lower() not in _SIDE_OF:
        return f"the verdict is {verdict!r}; it can be {', '.join(SIDES)} or nothing"
    pair = review.pair(key)
    for name, text in (("A", pair.a), ("B", pair.b)):
        if one_line_end(restored_cell(cells[name])) != one_line_end(text):
            return f"answer {name} was changed: restore the exported text, and write comments into the column note"
    return None


def _take(review: BlindReview, cells: Mapping[str, str], events: list[Event], taken: dict[str, int]) -> None:
    key, verdict = cells["item"], cells["verdict"].strip().lower()
    note = one_line_end(restored_cell(cells["note"])).strip()
    if note and note != review.journal.notes.get(key, ""):
        events.append(NoteLine(key=key, text=note, reviewer=review.reviewer, when=now()))
        taken["notes"] += 1
    if not verdict:
        taken["blank"] += 1
        return
    stands = review.journal.standing.get(key)
    if stands is not None and stands.verdict == _SIDE_OF[verdict]:
        taken["known"] += 1
        return
    shown = key in review.journal.shown
    if REFERENCE in cells and not shown:
        events.append(ReferenceShownLine(key=key, reviewer=review.reviewer, when=now()))
        shown = True
    events.append(review.judged(key, _SIDE_OF[verdict]).model_copy(update={"reference": shown}))
    taken["recorded"] += 1
