"""``data suspects`` and ``review``: people's verdicts on rows, in the terminal or through a spreadsheet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tunewright.cli.annotate import Import, Reviewer, annotate, chosen_action, edit_text, read_note, require_terminal
from tunewright.cli.app import command, given_options, refuse_unused
from tunewright.cli.console import RESUMES, Session
from tunewright.cli.data import data_app
from tunewright.cli.data_rows import conversation_text, row_heading
from tunewright.core.errors import UserError
from tunewright.core.text import visible
from tunewright.data.options import ReviewOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.data.review.label_models import NeighborIndex
    from tunewright.data.review.session import ReviewItem, ReviewSession

KEYS = "r right   w wrong   e edit   s skip   n note   u undo   q quit"

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
    count = f"{min(top, len(result.suspects)):,} of {len(result.suspects):,}"
    run.show(result.as_dict(), result.table(top), count)


@command(
    data_app,
    "review",
    example="tunewright data review --reviewer ann",
    kept=RESUMES,
    status=False,
    options=ReviewOptions,
)
def data_review(
    run: Session,
    options: ReviewOptions,
    reviewer: Reviewer = None,
    status: Annotated[bool, typer.Option("--status", help="Show the state of the review and exit.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write the next rows to a CSV file for a spreadsheet.")] = None,
    import_file: Import = None,
    apply: Annotated[bool, typer.Option("--apply", help="Make a new version with the edited answers.")] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Message stored with the version (--apply only).")
    ] = "",
) -> int | None:
    """Judge a random sample of rows until the version is accepted ("under 5% wrong, at 95%") or rejected.

    Keys: r right, w wrong, e edit in $EDITOR, s skip, n note, u undo, q quit. A review resumes where it stopped.
    With --status, the exit code is 0 for accepted, 3 for rejected, 4 for undecided.
    """
    action = chosen_action({"--status": status, "--export": export, "--import": import_file, "--apply": apply})
    chosen = given_options(options)
    if action is not None and chosen and (action != "--export" or options.conflicts):
        raise UserError(f"{action} cannot be combined with {' '.join(chosen)}", fix="Leave it out.")
    if options.adapter is not None and not options.suspects:
        raise UserError("--adapter requires --suspects", fix="Add --suspects.")
    if message and not apply:
        raise UserError("--message requires --apply", fix="Add --apply, or leave it out.")
    if apply or status:
        refuse_unused(str(action), {"--reviewer": reviewer is not None})
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
    review = data.review(reviewer, options=options)
    if export is not None:
        count = data.export_reviews(export, review)
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
