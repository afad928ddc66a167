"""``studio``: the project in a browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from tunewright.cli.app import PROJECT, app, command
from tunewright.cli.console import RESUMES, Session
from tunewright.core.errors import UserError


@command(app, "studio", panel=PROJECT, example="tunewright studio", kept=RESUMES, status=False, traced=False)
def studio(
    run: Session,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback requires a password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.")] = 8765,
    password_file: Annotated[
        Path | None,
        typer.Option(help="File with the password that signs browsers in.", show_default="a token in the address"),
    ] = None,
    reviewer: Annotated[
        str | None,
        typer.Option(
            help="Name that reviews are recorded under.", show_default="git's user.name, else your login name"
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show the finished demo project, read-only and without sign-in.")
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the address in your browser.")] = True,
) -> None:
    """Open the project in a browser: rows, review, blind comparison, reports and jobs, until Ctrl-C.

    Jobs that were started on a page continue when the studio ends. In a folder without a project, the first page makes
    one.
    """
    import webbrowser

    from tunewright.data.review.session import reviewer_name
    from tunewright.studio import Studio

    def started(url: str) -> None:
        run.show({"url": url}, f"The studio is at {url}\nCtrl-C ends it.")
        if browser:
            webbrowser.open(url)

    if demo:
        _show_demo(run.folder, host, port, started, given={"--password-file": password_file, "--reviewer": reviewer})
        return
    made = Studio(
        run.folder,
        reviewer_name(reviewer, run.folder),
        password=None if password_file is None else _password(password_file),
    )
    made.run(host, port, started)


def _show_demo(folder: Path, host: str, port: int, started: Callable[[str], None], given: Mapping[str, object]) -> None:
    """Serve a copy of the demo project."""
    from tunewright.demo import copied_demo
    from tunewright.studio import Studio

    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} and --demo are mutually exclusive")
    with copied_demo(folder) as copy:
        Studio(copy, "visitor", demo=True).run(host, port, started)


def _password(file: Path) -> str:
    try:
        password = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"The password cannot be read: {error.strerror}", where=str(file)) from None
    except UnicodeDecodeError:
        raise UserError("The password is not UTF-8 text", where=str(file)) from None
    if len(password) < 12:
        raise UserError(f"The password has {len(password)} characters (at least 12)", where=str(file))
    return password
