"""The command line: one file per command group, no logic of its own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def commands() -> typer.Typer:
    """The whole command line."""
    from tunewright.cli.app import app

    # Each registers its commands, in the order in which the help lists them.
    steps = "project data removal versions review advise fit train measure judge general people"
    for group in f"{steps} adapters keys export serve engine tenants releases".split():
        import_module(f"tunewright.cli.{group}")
    return app


def main() -> None:
    """The console script ``tunewright``."""
    from tunewright.cli.stopping import own_process

    own_process()
    commands()()
