"""The command line: one file per command group, without any logic besides input and output."""

from __future__ import annotations

import gc
import json
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from tunewright.core.errors import OUT_OF_MEMORY

if TYPE_CHECKING:
    import typer

# In the order in which each panel of the help lists their commands.
GROUPS = (
    "data",
    "data_versions",
    "data_generate",
    "data_review",
    "advise",
    "train",
    "evaluate",
    "preferences",
    "serve",
    "tenants",
    "adapters",
    "export",
    "engine",
    "project",
    "doctor",
)

# Built in advance, while there is memory for them.
_NO_MEMORY = f"Error: {OUT_OF_MEMORY}\n".encode()
_NO_MEMORY_JSON = f"{json.dumps({'error': OUT_OF_MEMORY.as_dict()}, indent=2)}\n".encode()


def commands() -> typer.Typer:
    """Return the whole command line."""
    from tunewright.cli.app import app

    for group in GROUPS:
        import_module(f"tunewright.cli.{group}")
    return app


def main() -> None:
    """Run the console script ``tunewright``."""
    # Commands import a million objects: with the usual 700, looking for garbage among them takes a second.
    gc.set_threshold(10_000)
    try:
        from tunewright.cli.stopping import mark_command_process

        mark_command_process()
        commands()()
    except (MemoryError, SystemError) as error:
        # Memory ran out before the command began, or while its error message was printed. Python raises
        # SystemError if it has no memory for the exception itself ("error return without exception set").
        if isinstance(error, SystemError) and " without " not in str(error):
            raise
    else:
        return
    # Here the memory that the exception held is free again; exiting needs memory.
    if "--json" in sys.argv:
        os.write(1, _NO_MEMORY_JSON)
    else:
        os.write(2, _NO_MEMORY)
    sys.exit(2)
