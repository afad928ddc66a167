"""Domain projects that run: what ``tunewright init --example`` writes."""

from __future__ import annotations

from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.examples import bfcl, legal_citations, orders

NAMES = (legal_citations.NAME, bfcl.NAME, orders.NAME)


def example_files(name: str, data: Path | None, reporter: Reporter) -> dict[str, str]:
    """Return the files of the example project called ``name``.

    Args:
        name: one of ``NAMES``.
        data: the folder of its data, for an example that brings none.
        reporter: reports what was read and left out.

    Raises:
        UserError: no such example, or its data is missing or not needed.
    """
    if name == bfcl.NAME:
        if data is None:
            raise UserError(f"The example {name} needs its data", where="--data", fix=bfcl.WHERE)
        return bfcl.project_files(data, reporter)
    if name not in NAMES:
        raise UserError(f"Unknown example {name!r}", where="--example", fix=f"Use {' or '.join(NAMES)}.")
    if data is not None:
        raise UserError(f"The example {name} brings its own data", where="--data", fix="Remove the option.")
    return orders.project_files() if name == orders.NAME else legal_citations.project_files()
