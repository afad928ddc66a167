"""Reviews in a spreadsheet: rows out as CSV, verdicts back in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.clock import now
from tunewright.core.csv import one_line_end, read_sheet, refuse_faulty, restored_cell, write_sheet
from tunewright.core.errors import UserError
from tunewright.data.pii import told_secrets
from tunewright.data.review.passes import Card, Review
from tunewright.data.review.reviews import VERDICTS, Judged, Verdict, append_reviews, read_reviews
from tunewright.data.versions import DatasetVersion, Member
from tunewright.data.versions.origins import places_by_key

COLUMNS = ("row", "from", "draw", "why", "input", "answer", "verdict", "new_output")
_NEEDED = ("row", "draw", "answer", "verdict", "new_output")


@dataclass(frozen=True)
class Imported:
    """What an import did: verdicts recorded, those that stood already, and rows without one."""

    recorded: int
    known: int
    blank: int


def export_csv(path: Path, review: Review, most: int) -> int:
    """Write the review's next rows, up to so many, for a spreadsheet; the number of rows written.

    Raises:
        UserError: there are no suspects, no row is left to judge, the file is there already, or the disk refuses.
    """
    cards = review.coming(most)
    if not review.order and review.drawn is None:
        raise UserError(
            "there are no suspects to export: no row was doubted, or none could be judged",
            where="--suspects",
            fix="Free-text answers are ranked by a model's loss: add --adapter base, or the name of an adapter.",
        )
    if not cards:
        raise UserError(
            "no row is left to judge", fix="`tunewright data review --status` says where the review stands."
        )
    rows = []
    places = places_by_key(review.dataset, review.version.manifest)
    draw = "" if review.drawn is None else str(review.drawn.draw)
    for card in cards:
        key, output = card.member.key, card.member.example.output
        rows.append([key, places.get(key, ""), draw, card.why or "", _prompt(card), output, "", ""])
    write_sheet(path, COLUMNS, rows)
    return len(cards)


def _prompt(card: Card) -> str:
    turns = card.member.example.prompt
    return turns[0].content if len(turns) == 1 else "\n\n".join(f"{m.role}: {m.content}" for m in turns)


def import_csv(
    path: Path, dataset: Path, version: DatasetVersion, reviewer: str, allow: Collection[str] = ()
) -> Imported:
    """Record the verdicts of a filled-in export: all of them, or none if a row is faulty.

    Args:
        allow: kinds of secrets that answers may hold (data.allow).

    Raises:
        UserError: the file cannot be read, or rows in it are faulty (each is named by its line).
    """
    members = {m.key: m for m in version.domain}
    reviews = read_reviews(dataset)
    events: list[Judged] = []
    faults: list[str] = []
    known = blank = 0
    seen: dict[str, int] = {}
    for line, fields in read_sheet(path, _NEEDED, "tunewright data review --export"):
        fields |= {name: restored_cell(fields[name]) for name in ("answer", "new_output")}
        fault = _fault(fields, members, allow)
        if fields["row"] in seen and not fault:
            fault = f"the row of line {seen[fields['row']]} again"
        seen.setdefault(fields["row"], line)
        verdict = fields["verdict"].strip().lower()
        if fault:
            faults.append(f"{path}:{line}: {fault}")
        elif not verdict:
            blank += 1
        else:
            event = _event(fields, verdict, version, reviewer)
            stands = reviews.standing(event.key).get(reviewer)
            if stands is not None and (stands.verdict, stands.output) == (event.verdict, event.output):
                known += 1
            else:
                events.append(event)
    refuse_faulty(faults)
    if events:
        append_reviews(dataset, events)
    return Imported(len(events), known, blank)


def _fault(fields: Mapping[str, str], members: Mapping[str, Member], allow: Collection[str]) -> str | None:
    verdict, output = fields["verdict"].strip().lower(), fields["new_output"]
    member = members.get(fields["row"])
    if member is None:
        return f"the version has no row {fields['row'][:12]!r}: its text has changed, or the file is of another version"
    if verdict not in ("", *VERDICTS):
        return f"the verdict is {fields['verdict']!r}; it can be {', '.join(VERDICTS)} or nothing"
    if (verdict == "edit") != bool(output.strip()):
        return "an edit needs a new_output" if verdict == "edit" else "a new_output needs the verdict edit"
    if one_line_end(fields["answer"]) != one_line_end(member.example.output):
        return "the answer was changed: leave it, and write the better one in new_output"
    if output and one_line_end(output) == one_line_end(member.example.output):
        return "the new_output is the answer that is there"
    if found := told_secrets(output, allow):
        return f"the new_output holds a secret ({found})"
    if fields["draw"].strip() and not fields["draw"].strip().isdecimal():
        return f"the draw is {fields['draw']!r}: leave the column as it was exported"
    return None


def _event(fields: Mapping[str, str], verdict: str, version: DatasetVersion, reviewer: str) -> Judged:
    draw = fields["draw"].strip()
    given: Verdict = next(v for v in VERDICTS if v == verdict)
    return Judged(
        key=fields["row"],
        verdict=given,
        output=one_line_end(fields["new_output"]) if given == "edit" else None,
        draw=int(draw) if draw else None,
        version=version.digest,
        reviewer=reviewer,
        when=now(),
    )
