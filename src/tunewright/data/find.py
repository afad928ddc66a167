"""Finding one row of a version, by the beginning of its key or by the file and line that it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunewright.data.versions import DatasetVersion, Member, import_files
from tunewright.errors import UserError


def find_row(dataset: Path, version: DatasetVersion, row: str) -> Member:
    """The member that ``row`` names: some first digits of its key, or ``FILE:LINE`` as in an imported file.

    Raises:
        UserError: no such row, several that begin so, or a row that was left out (with the reason).
    """
    place = re.fullmatch(r"(.+):(\d+)", row)
    key = _key_at(dataset, version, place[1], int(place[2])) if place else row
    found = [m for m in version.members if key and m.key.startswith(key)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{len(found)} rows begin with {row!r}", where="ROW", fix="Give more digits.")
    raise UserError(
        f"version {version.digest[:12]} has no row {row!r}",
        where="ROW",
        fix="Give the first digits of a row's key, or FILE:LINE of an added file.",
    )


def _key_at(dataset: Path, version: DatasetVersion, file: str, line: int) -> str:
    files = set()
    for imported in _imported(dataset, version):
        files.add(imported["source"])
        if imported["line"] != line or file not in (imported["source"], Path(imported["source"]).name):
            continue
        if imported["fate"] == "skipped":
            raise UserError(f"the row was left out: {imported['reason']}", where=f"{file}:{line}")
        return str(imported.get("of", imported["key"]))
    raise UserError(f"no row came from {file}:{line}", where="ROW", fix=f"Added files: {', '.join(sorted(files))}.")


def _imported(dataset: Path, version: DatasetVersion) -> Iterator[dict[str, Any]]:
    """What became of each row of each file, the version's own import first, then those of the versions before it."""
    for path in import_files(dataset, version.manifest):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
