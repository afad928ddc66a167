"""``data suspects`` and ``review``: people's verdicts on rows, in the terminal or through a spreadsheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tunewright.cli.annotate import annotate, edit_text, read_note, require_terminal
from tunewright.cli.app import command, refuse_unused
from tunewright.cli.console import RESUMES, Session
from tunewright.cli.data import data_app
from tunewright.cli.data_rows import conversation_text, row_heading
from tunewright.core.text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.data.review.label_models import NeighborIndex, Suspect
    from tunewright.data.review.session import ReviewItem, ReviewSession
    from tunewright.data.versions import DatasetVersion

KEYS = "r right   w wrong   e edit   s skip   n note   u undo   q quit"
_EXPORTED = 60  # rows, where the plan needs fewer

Judge = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help='For free text: adapter whose loss ranks the suspects, or "base".',
        show_default="cross-validated adapters, or the newest that fits",
    ),
]


@command(data_app, "suspects", example="tunewright data suspects --top 50")
def data_suspects(
    run: Session,
    top: Annotated[int, typer.Option(min=1, help="Number of rows to list; --json lists all.")] = 20,
    adapter: Judge = None,
) -> None:
    """List the rows whose answer is most likely wrong, each with the reason."""
    result = run.project.data.suspects(adapter)
    shown = result.suspects[:top]
    count = f"{len(shown):,} of {len(result.suspects):,}"
    run.show(result.as_dict(), _suspects_table(shown, result.version, result.places), count)


@command(data_app, "review", example="tunewright data review --reviewer ann", kept=RESUMES, status=False)
def data_review(
    run: Session,
    reviewer: Annotated[str | None, typer.Option(help="Name of the reviewer.", show_default="your login name")] = None,
    suspects: Annotated[bool, typer.Option("--suspects", help="Review the suspects, apart from the sample.")] = False,
    adapter: Judge = None,
    second: Annotated[
        bool, typer.Option("--second", help="Review rows again, blind, that others have reviewed.")
    ] = False,
    conflicts: Annotated[
        bool,
        typer.Option("--conflicts", help="Judge rows again on which you and others disagree, with all verdicts shown."),
    ] = False,
    fixed: Annotated[
        int | None,
        typer.Option(min=0, max=1000, help="Draw a sample of fixed size that allows this many wrong rows."),
    ] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Draw another sample; the first stays on record.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Show the state of the review and exit.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write the next rows to a CSV file for a spreadsheet.")] = None,
    import_file: Annotated[Path | None, typer.Option("--import", help="Read verdicts from such a CSV file.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Make a new version with the edited answers.")] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Message stored with the version (--apply only).")
    ] = "",
) -> int | None:
    """Judge a random sample of rows until the version is accepted ("under 5% wrong, at 95%") or rejected.

    Keys: r right, w wrong, e edit in $EDITOR, s skip, n note, u undo, q quit. A review resumes where it stopped.
    With --status, the exit code is 0 for accepted, 3 for rejected, 4 for undecided.
    """
    from tunewright.data.review.session import check_options
    from tunewright.data.review_csv import export_csv

    chosen = {"--suspects": suspects, "--adapter": adapter is not None, "--second": second}
    chosen["--conflicts"] = conflicts
    check_options(
        {"--status": status, "--export": export is not None, "--import": import_file is not None, "--apply": apply},
        {**chosen, "--fixed": fixed is not None, "--redraw": redraw},
        message=bool(message),
    )
    if apply or status:
        refuse_unused("--apply" if apply else "--status", {"--reviewer": reviewer is not None})
    data = run.project.data
    if apply:
        edited = data.apply_reviews(message=message)
        run.show(edited, f"New version {edited.version.digest[:12]}: {edited.version.message}")
        return None
    if status:
        return _show_status(run)
    if import_file is not None:
        done = data.import_reviews(import_file, reviewer)
        run.reporter.say(f"{done.recorded} verdicts recorded, {done.known} known, {done.blank} rows without one")
        _show_status(run)
        return None
    if export is None:
        require_terminal("--export and --import, or --status")
    review = data.review(
        reviewer,
        suspects=suspects,
        adapter=adapter,
        second=second,
        conflicts=conflicts,
        fixed=fixed,
        redraw=redraw,
    )
    if export is not None:
        count = export_csv(export, review, max(review.needed, _EXPORTED))
        run.show({"file": str(export), "rows": count}, f"Wrote {count} rows to {export}: fill in the column verdict")
        return None
    _ask(run, review)
    _show_status(run)
    return None


def _show_status(run: Session) -> int:
    report = run.project.data.review_status()
    run.show(report.as_dict(), f"Version {report.version[:12]} {report.status}", *report.lines)
    return report.exit_code


def _ask(run: Session, review: ReviewSession) -> None:
    from tunewright.data.review.label_models import NeighborIndex

    nearest = NeighborIndex(review.version)
    actions: dict[str, Callable[[ReviewItem], str]] = {
        "e": lambda card: review.edit(card, edit_text(review.draft(card))),
        "n": lambda card: review.note(card, read_note(run)),
    }
    annotate(run, review, lambda card: _screen(review, card, nearest), actions)


def _screen(review: ReviewSession, card: ReviewItem, nearest: NeighborIndex) -> list[RenderableType]:
    table = Table(title="Nearest rows", title_justify="left", expand=True)
    table.add_column("like", justify="right", no_wrap=True)
    table.add_column("input", overflow="ellipsis", no_wrap=True, ratio=3)
    table.add_column("answer", overflow="ellipsis", no_wrap=True, ratio=2)
    for similarity, other in nearest.of(card.key):
        example = other.example
        table.add_row(f"{similarity:.2f}", Text(" ".join(example.input_text.split())), Text(example.output))
    parts: list[RenderableType] = [
        Text(review.status, style="bold"),
        Text(f"{card.number}: {row_heading(card.member)}", style="dim"),
        Text(""),
        conversation_text(card.member),
        Text(""),
        table,
    ]
    if card.why is not None:
        parts.append(Text(card.why, style="yellow"))
    return [*parts, *_verdict_lines(review, card), Text(KEYS, style="bold")]


def _verdict_lines(review: ReviewSession, card: ReviewItem) -> list[RenderableType]:
    """Return the reviewer's own note; in a review of conflicts, everybody's verdicts and notes."""
    from tunewright.data.versions.diff import marked

    key, stored = card.key, card.member.example.output
    if not review.conflicts:
        note = review.note_on(key)
        return [Text(visible(f"Your note: {note}"))] if note else []
    lines: list[RenderableType] = []
    for name, judged in sorted(review.log.current_verdicts(key).items()):
        said = f"edit: {marked(stored, judged.output)}" if judged.output is not None else judged.verdict
        note = review.log.notes.get(key, {}).get(name, "")
        lines.append(Text(visible(f"{name}: {said}{f' ({note})' if note else ''}")))
    return lines


def _suspects_table(found: Sequence[Suspect], version: DatasetVersion, places: Mapping[str, str]) -> RenderableType:

    from tunewright.data.review.label_models import excerpt

    by_key = {m.key: m for m in version.members}
    table = Table()
    for name in ("row", "from", "input", "answer", "reason", "why"):
        table.add_column(name, no_wrap=name in {"row", "reason"})
    for suspect in found:
        example = by_key[suspect.key].example
        texts = (excerpt(example.input_text), excerpt(example.output), suspect.reason, suspect.detail)
        table.add_row(suspect.key[:12], Text(places.get(suspect.key, ""), overflow="fold"), *map(Text, texts))
    return table
