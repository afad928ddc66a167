"""A review without a terminal: rows are exported as CSV, filled in, and imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from tunewright.annotation import SheetImport, checked_rows
from tunewright.core.clock import now
from tunewright.core.csv import one_line_end, write_sheet
from tunewright.core.errors import UserError
from tunewright.data.pii import secret_kinds
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.validate import edited_answer
from tunewright.data.review.reviews import VERDICTS, VerdictEvent, append_reviews, read_reviews
from tunewright.data.review.session import ReviewSession
from tunewright.data.trace import places_by_key
from tunewright.data.versions import DatasetVersion, Member

EXPORT_COLUMNS = ("row", "from", "draw", "why", "input", "answer", "verdict", "new_output")
_IMPORTED_COLUMNS = ("row", "draw", "answer", "verdict", "new_output")


def export_csv(path: Path, review: ReviewSession, most: int) -> int:
    """Write at most ``most`` next rows of the review as CSV, and return their number."""
    cards = [review.item(key) for key in review.open_keys(most)]
    if not review.order and review.drawn is None:
        raise UserError(
            "There are no suspects to export: no row is suspicious, or no row could be judged",
            where="--suspects",
            fix="Free-text answers are ranked by a model's loss: add --adapter base or --adapter NAME.",
        )
    if not cards:
        raise UserError(
            "No row is left to review", fix="`tunewright data review --status` shows the state of the review."
        )
    rows = []
    places = places_by_key(review.dataset, review.version.manifest)
    draw = "" if review.drawn is None else str(review.drawn.draw)
    for card in cards:
        key, output = card.key, card.member.example.output
        turns = card.member.example.prompt
        prompt = turns[0].content if len(turns) == 1 else "\n\n".join(f"{m.role}: {m.text}" for m in turns)
        apart = key in review.generated  # not a part of the sample
        rows.append([key, places.get(key, ""), "" if apart else draw, card.why or "", prompt, output, "", ""])
    write_sheet(path, EXPORT_COLUMNS, rows)
    return len(cards)


def import_csv(
    path: Path, dataset: Path, version: DatasetVersion, reviewer: str, allow: Collection[str] = ()
) -> SheetImport:
    """Record all verdicts of a filled-in export, or none if a row is faulty."""
    members = {m.key: m for m in version.domain}
    reviews = read_reviews(dataset)
    rows = checked_rows(
        path,
        _IMPORTED_COLUMNS,
        "row",
        "tunewright data review --export",
        lambda cells, _: _fault(cells, members, allow),
    )
    filled = [cells for cells in rows if cells["verdict"].strip()]
    events = []
    for cells in filled:
        draw = cells["draw"].strip()
        verdict = next(each for each in VERDICTS if each == cells["verdict"].strip().lower())
        event = VerdictEvent(
            key=cells["row"],
            verdict=verdict,
            output=cells["new_output"] if verdict == "edit" else None,
            draw=int(draw) if draw else None,
            version=version.digest,
            reviewer=reviewer,
            when=now(),
        )
        current = reviews.current_verdicts(event.key).get(reviewer)
        if current is None or (current.verdict, current.output) != (event.verdict, event.output):
            events.append(event)
    if events:
        append_reviews(dataset, events)
    return SheetImport(recorded=len(events), known=len(filled) - len(events), blank=len(rows) - len(filled))


def _fault(fields: Mapping[str, str], members: Mapping[str, Member], allow: Collection[str]) -> str | None:
    verdict, output = fields["verdict"].strip().lower(), fields["new_output"]
    member = members.get(fields["row"])
    if member is None:
        return f"the version has no row {fields['row'][:12]!r}: its text changed, or the export is of another version"
    if verdict not in ("", *VERDICTS):
        return f"invalid verdict {fields['verdict']!r}: use {', '.join(VERDICTS)} or leave it empty"
    if (verdict == "edit") != bool(output.strip()):
        return "verdict edit requires new_output" if verdict == "edit" else "new_output requires the verdict edit"
    if fields["answer"] != one_line_end(member.example.output):
        return "the answer was changed: keep it, and write the corrected one in new_output"
    if output and output == one_line_end(member.example.output):
        return "new_output equals the present answer"
    if found := secret_kinds(output, allow):
        return f"new_output contains a secret ({found})"
    if output.strip():
        try:
            edited_answer(member.example, output)
        except RowError as error:
            return f"new_output: {error}. {error.fix}"
    if fields["draw"].strip() and not fields["draw"].strip().isdecimal():
        return f"invalid draw {fields['draw']!r}: keep the column as exported"
    return None
