"""``data review`` and ``data suspects``: people's verdicts on rows, in the terminal or by way of a spreadsheet."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json
from tunewright.cli.console import RESUMES, Session, session
from tunewright.cli.data import data_app

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.api.data import DatasetApi
    from tunewright.data.review.passes import Card, Review
    from tunewright.data.review.reviews import Verdict
    from tunewright.data.review.suspects import Nearest, Suspect
    from tunewright.data.versions import DatasetVersion

VERDICT_KEYS: dict[str, Verdict] = {"r": "right", "w": "wrong", "s": "skip"}
KEYS = "r right   w wrong   e edit   s skip   u undo   q quit"
_EXPORTED = 60  # rows, where the plan needs fewer

Judge = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help='For free text: whose loss ranks the suspects; "base": the base without an adapter.',
        show_default="cross-fitted adapters, else the newest that fits",
    ),
]


@data_app.command("suspects")
def data_suspects(
    top: Annotated[int, typer.Option(min=1, help="How many to list; --json lists all.")] = 20,
    adapter: Judge = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """List the rows whose answer is most likely wrong, each with the reason."""
    import tunewright

    with session(json, project) as current:
        result = tunewright.open(project, current.reporter).data.suspects(adapter)
        shown = result.suspects[:top]
        told = f"{len(shown):,} of {len(result.suspects):,}"
        current.show(result.as_dict(), _suspects_table(shown, result.version, result.places), told)


@data_app.command("review")
def data_review(
    reviewer: Annotated[str | None, typer.Option(help="Whose verdicts.", show_default="your login name")] = None,
    suspects: Annotated[bool, typer.Option("--suspects", help="Review the suspects, apart from the sample.")] = False,
    adapter: Judge = None,
    second: Annotated[bool, typer.Option("--second", help="Judge again, unseen, what others judged.")] = False,
    fixed: Annotated[
        int | None,
        typer.Option(min=0, max=1000, help="Not sequential: a sample of fixed size that allows so many wrong."),
    ] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Draw another sample; it stays on record.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only say where the review stands.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write the next rows as CSV, for a spreadsheet.")] = None,
    import_file: Annotated[Path | None, typer.Option("--import", help="Read verdicts from such a CSV.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Make a new version with the edited answers.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="With --apply: kept with the version.")] = "",
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Check a random sample of rows until the version is accepted ("under 5% wrong, at 95%") or rejected.

    Keys: r right, w wrong, e edit in $EDITOR, s skip, u undo, q quit. It goes on where it was left. With --status, the
    exit code is 0 for accepted, 3 for rejected, 4 for not decided.
    """
    import tunewright
    from tunewright.data.review.passes import check_options
    from tunewright.data.review.table import export_csv

    with session(json, kept=RESUMES) as current:
        chosen = {"--suspects": suspects, "--adapter": adapter is not None, "--second": second}
        check_options(
            {"--status": status, "--export": export is not None, "--import": import_file is not None, "--apply": apply},
            {**chosen, "--fixed": fixed is not None, "--redraw": redraw},
            message=bool(message),
        )
        data = tunewright.open(project, current.reporter).data
        if apply:
            edited = data.apply_reviews(message=message)
            current.show(edited.as_dict(), f"New version {edited.version.digest[:12]}: {edited.version.message}")
            return
        if status:
            raise typer.Exit(_show_status(current, data))
        if import_file is not None:
            done = data.import_reviews(import_file, reviewer)
            told = f"{done.recorded} verdicts recorded, {done.known} known, {done.blank} rows without one"
            current.reporter.say(told)
            _show_status(current, data)
            return
        if export is None:
            require_terminal("--export and --import, or --status")
        review = data.review(reviewer, suspects=suspects, adapter=adapter, second=second, fixed=fixed, redraw=redraw)
        if export is not None:
            count = export_csv(export, review, max(review.needed, _EXPORTED))
            current.show({"file": str(export), "rows": count}, f"{count} rows written to {export}: fill in verdict")
            return
        _pass(current, review)
        _show_status(current, data)


def _show_status(current: Session, data: DatasetApi) -> int:
    report = data.review_status()
    current.show(report.as_dict(), f"Version {report.version[:12]} {report.status}", *report.lines)
    return report.exit_code


def _pass(current: Session, review: Review) -> None:
    from tunewright.data.review.suspects import Nearest

    nearest = Nearest(review.version)
    note = ""
    while (card := review.next()) is not None:
        current.console.clear()
        current.console.print(*_screen(review, card, nearest, note), sep="\n", markup=False, highlight=False)
        key, note = read_key(), ""
        if key == "q":
            return
        if key == "u":
            note = "Taken back." if review.undo() is not None else "There is nothing to take back."
        elif key == "e":
            note = review.edit(card, edit_text(card.member.example.output))
        elif key in VERDICT_KEYS:
            review.judge(card, VERDICT_KEYS[key])
        else:
            note = f"{key!r} is no key here."


def _screen(review: Review, card: Card, nearest: Nearest, note: str) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from tunewright.cli.token_tables import conversation_text, row_heading

    table = Table(title="Nearest rows", title_justify="left", expand=True)
    table.add_column("like", justify="right", no_wrap=True)
    table.add_column("input", overflow="ellipsis", no_wrap=True, ratio=3)
    table.add_column("answer", overflow="ellipsis", no_wrap=True, ratio=2)
    for similarity, other in nearest.of(card.member.key):
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
    parts.append(Text(KEYS, style="bold"))
    return [*parts, Text(note, style="yellow")] if note else parts


def _suspects_table(found: Sequence[Suspect], version: DatasetVersion, places: Mapping[str, str]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from tunewright.data.review.suspects import excerpt

    by_key = {m.key: m for m in version.members}
    table = Table()
    for name in ("row", "from", "input", "answer", "reason", "why"):
        table.add_column(name, no_wrap=name in {"row", "reason"})
    for suspect in found:
        example = by_key[suspect.key].example
        texts = (excerpt(example.input_text), excerpt(example.output), suspect.reason, suspect.detail)
        table.add_row(suspect.key[:12], Text(places.get(suspect.key, ""), overflow="fold"), *map(Text, texts))
    return table


def interactive() -> bool:
    """Whether somebody can press keys."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def require_terminal(others: str) -> None:
    """Refuse a pass where nobody can press keys, before a sample is drawn for it; ``others`` are the other ways."""
    from tunewright.core.errors import UserError

    if not interactive():
        raise UserError("there is no terminal to review in", fix=f"Use {others}.")


def read_key() -> str:
    """The next key, of those pressed from now on: no verdict on a row not yet shown. The end of the input is a q."""
    try:
        return typer.getchar()
    except EOFError:
        return "q"


def edit_text(text: str) -> str | None:
    """The text as the user leaves it in $VISUAL, $EDITOR or vi; a line end that the editor added goes again.

    None: the editor ended with an error, or what it left is not UTF-8.
    """
    from tunewright.core.errors import UserError

    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.txt"
        path.write_text(text, encoding="utf-8", newline="")
        try:
            code = subprocess.run([*shlex.split(command), str(path)], check=False).returncode
        except OSError as error:
            raise UserError(f"the editor cannot be started: {error.strerror}", where="$EDITOR") from None
        try:
            edited = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            return None
    if code:
        return None
    return edited[:-1] if edited.endswith("\n") and not text.endswith("\n") else edited
