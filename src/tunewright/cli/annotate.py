"""The key loop of label review and human evaluation."""

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
from rich.text import Text

from tunewright.cli.console import Session
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.annotation import AnnotationSession, ItemT

Reviewer = Annotated[
    str | None, typer.Option(help="Name of the reviewer.", show_default="git's user.name, else your login name")
]
Import = Annotated[Path | None, typer.Option("--import", help="Read verdicts from such a CSV file.")]


def annotate(
    run: Session,
    session: AnnotationSession[Any, ItemT, Any],
    screen: Callable[[ItemT], list[RenderableType]],
    actions: Mapping[str, Callable[[ItemT], str]],
) -> None:
    """Show one item after the other on a screen, and do what the pressed key says, until none is left or it is q.

    ``actions`` are those of keys other than u, q and the verdicts'; each returns a message for the next screen.
    """
    verdicts = {key: verdict for key, verdict, _ in session.verdict_keys}
    message = ""
    while (item := session.next()) is not None:
        run.console.clear()
        parts = screen(item) + ([Text(message, style="yellow")] if message else [])
        run.console.print(*parts, sep="\n", markup=False, highlight=False)
        key, message = read_key(), ""
        if key == "q":
            return
        if key == "u":
            message = "Taken back." if session.undo() is not None else "There is nothing to take back."
        elif key in verdicts:
            session.judge(item, verdicts[key])
        else:
            message = actions[key](item) if key in actions else f"Unknown key {key!r}."


def chosen_action(actions: Mapping[str, object]) -> str | None:
    """Return the option that was given instead of a review on the screen, of which there is one at most."""
    given = [name for name, value in actions.items() if value]
    if len(given) > 1:
        raise UserError("These options are mutually exclusive", where=" ".join(given), fix="Choose one.")
    return given[0] if given else None


def interactive() -> bool:
    """Return whether keys can be read from a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def require_terminal(others: str) -> None:
    """Refuse a review without a terminal before a sample is drawn for it; ``others`` are the alternatives."""
    if not interactive():
        raise UserError("There is no terminal to review in", fix=f"Use {others}.")


def read_key() -> str:
    """Return the next key, ignoring keys pressed before the row was shown. The end of the input is a q."""
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
