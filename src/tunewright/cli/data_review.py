"""``data suspects`` and ``review``: verdicts on rows by keys or a spreadsheet, and the key loop of ``human-eval``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tunewright.cli.app import command, given_options, refuse_unused
from tunewright.cli.console import RESUMES, Session
from tunewright.cli.data import data_app
from tunewright.cli.data_versions import conversation_text, row_heading
from tunewright.core.errors import UserError
from tunewright.core.text import visible
from tunewright.data.options import ReviewOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.annotation import AnnotationSession, ItemT
    from tunewright.data.review.label_models import NeighborIndex
    from tunewright.data.review.session import ReviewItem, ReviewSession

Reviewer = Annotated[
    str | None, typer.Option(help="Name of the reviewer.", show_default="git's user.name, else your login name")
]
Import = Annotated[Path | None, typer.Option("--import", help="Read verdicts from such a CSV file.")]


def annotate(
    run: Session,
    session: AnnotationSession[Any, ItemT, Any],
    screen: Callable[[ItemT], list[RenderableType]],
    actions: Mapping[str, Callable[[ItemT], str]],
    next_item: Callable[[], ItemT | None],
) -> None:
    """Show one item after the other, and run the pressed key's action, until no item is left or it is q.

    ``actions`` are by key, for keys other than u, q and the verdict keys; each returns a message for the next screen.
    """
    verdicts = {key: verdict for key, verdict, _ in session.verdict_keys}
    message = ""
    while (item := next_item()) is not None:
        run.console.clear()
        parts = screen(item) + ([Text(message, style="yellow")] if message else [])
        run.console.print(*parts, sep="\n", markup=False, highlight=False)
        key, message = read_key(), ""
        if key == "q":
            return
        if key == "u":
            message = "Taken back." if session.undo() is not None else "There is nothing to take back."
            continue
        session.refresh()
        if session.open_item(item.key) is None:
            message = f"{item.key[:12]} was judged meanwhile. Nothing was recorded for it now."
        elif key in verdicts:
            session.judge(item, verdicts[key])
        else:
            message = actions[key](item) if key in actions else f"Unknown key {key!r}."


def chosen_action(actions: Mapping[str, object]) -> str | None:
    """Return the option that was given instead of a review on the screen; refuse more than one."""
    given = [name for name, value in actions.items() if value]
    if len(given) > 1:
        raise UserError("These options are mutually exclusive", where=" ".join(given), fix="Choose one.")
    return given[0] if given else None


def interactive() -> bool:
    """Return whether keys can be read from a terminal."""
    # Python has no stdin if it was closed, as some schedulers do.
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def require_terminal(others: str) -> None:
    """Refuse a review without a terminal before a sample is drawn for it; ``others`` are the alternatives."""
    if not interactive():
        raise UserError("There is no terminal to review in", fix=f"Use {others}.")


def read_key() -> str:
    """Return the next key, ignoring keys pressed before the row was shown. The end of the input counts as q."""
    try:
        return typer.getchar()
    except EOFError:
        return "q"


def read_note(run: Session) -> str:
    """Return a line that the reviewer types. It replaces an earlier note."""
    try:
        return run.console.input("Note: ", markup=False)
    except EOFError:
        return ""


def edit_text(text: str) -> str | None:
    """Return the text as edited in $VISUAL, $EDITOR or vi, without a line end that the editor added.

    Returns None if the editor failed or the result is not UTF-8.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.txt"
        path.write_text(text, encoding="utf-8", newline="")
        try:
            code = subprocess.run([*shlex.split(command), str(path)], check=False).returncode
        except OSError as error:
            raise UserError(f"The editor cannot be started: {error.strerror}", where="$EDITOR") from None
        try:
            edited = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            return None
    if code:
        return None
    return edited[:-1] if edited.endswith("\n") and not text.endswith("\n") else edited


KEYS = "r right   w wrong   e edit   l leave out   s skip   n note   u undo   q quit"

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
    apply: Annotated[
        bool, typer.Option("--apply", help="Make a new version with the edits, without rows left out.")
    ] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Message stored with the version (--apply only).")
    ] = "",
) -> int | None:
    """Judge a random sample of rows until the version is accepted ("under 5% wrong, at 95%") or rejected.

    Keys: r right, w wrong, e edit in $EDITOR, l leave out, s skip, n note, u undo, q quit. A review resumes where it
    stopped.
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
    from tunewright.annotation import Leases
    from tunewright.data.review.label_models import NeighborIndex

    nearest = NeighborIndex(review.version)
    leases = Leases(run.project.folder.work / "leases")
    settled_by_one = not review.second and not review.conflicts
    actions: dict[str, Callable[[ReviewItem], str]] = {
        "e": lambda card: review.edit(card, edit_text(review.draft(card))),
        "n": lambda card: review.note(card, read_note(run)),
    }
    for enter in "\r\n":
        actions[enter] = lambda card: (
            review.edit(card, card.suggested) if card.suggested else "No row suggests another answer."
        )

    def next_row() -> ReviewItem | None:
        return leases.next(review, "terminal", "review") if settled_by_one else review.next()

    annotate(run, review, lambda card: _screen(review, card, nearest), actions, next_row)
    if settled_by_one and next_row() is None and review.next() is not None:
        run.reporter.say("Other reviewers have the last rows on their screens. Run this command again later.")


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
    accept = [Text(visible(f"Enter {card.suggested}, as other rows suggest"), style="bold")] if card.suggested else []
    return [*parts, *_verdict_lines(review, card), *accept, Text(KEYS, style="bold")]


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
