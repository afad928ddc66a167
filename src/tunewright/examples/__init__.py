"""Domain projects that run: what ``tunewright init --example`` writes.

Their folders are in the repository's ``examples``; a wheel has them here. ``prepare_NAME.py`` makes the config and the
rows, and every other file is copied.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.examples import legal_citations

NAMES = (legal_citations.NAME, "bfcl", "orders")


def example_files(name: str, data: Path | None, reporter: Reporter) -> dict[str, str]:
    """Return the files of the example project called ``name``; ``data`` is the folder of one that brings none."""
    if name not in NAMES:
        raise UserError(f"Unknown example {name!r}", where="--example", fix=f"Use {' or '.join(NAMES)}.")
    if data is not None and name != "bfcl":
        raise UserError(f"The example {name} brings its own data", where="--data", fix="Remove the option.")
    if name == legal_citations.NAME:
        return legal_citations.project_files()
    here = Path(__file__).parent
    folder = here / name if (here / name).is_dir() else here.parents[2] / "examples" / name
    prepare = folder / f"prepare_{name}.py"
    copied = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("[!.]*.*") if path != prepare}
    prepared: dict[str, str] = runpy.run_path(str(prepare))["project_files"](data, reporter)
    return copied | prepared
