"""The command ``tunewright`` and the options that its commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunewright._version import __version__

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Folder = Annotated[
    Path, typer.Option("--project", "-p", help="The project's folder.", show_default="the current folder")
]
HERE = Path()

app = typer.Typer(
    name="tunewright",
    help="Fine-tune Llama and Mistral for your domain, and prove it beat prompting.\n\n"
    "Exit codes: 0 yes or done, 1 failed, 2 wrong usage or bad input, "
    "3 a measured no (don't ship, does not fit), 4 can't tell, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunewright {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
