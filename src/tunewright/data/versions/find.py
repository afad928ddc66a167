"""Finding one row of a version, by the beginning of its key or by the file and line that it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.io import text_lines
from tunewright.data.review.edits import replaced
from tunewright.data.review.reviews import read_reviews
from tunewright.data.versions import DatasetVersion, Member, import_files, list_versions
from tunewright.data.versions.members import read_places
from tunewright.data.versions.removals import read_removals


def find_row(dataset: Path, version: DatasetVersion, row: str) -> Member:
    """Return the member that ``row`` names: some first digits of its key, or ``FILE:LINE`` as in an imported file.

    Raises:
        UserError: no such row, several that begin so, or a row that was left out (with the reason).
    """
    place = re.fullmatch(r"(.+):(\d{1,12})", row)
    key = _key_at(dataset, version, place[1], int(place[2])) if place else row.lower()
    found = [m for m in version.members if key and m.key.startswith(key)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{len(found)} rows begin with {row!r}", where="ROW", fix="Give more digits.")
    if key in (out := read_removals(dataset).out):  # the row that an edit or a replacement made of the one read here
        raise UserError(f"the row was removed: {out[key].because}", where=row)
    raise UserError(
        f"version {version.digest[:12]} has no row {row!r}",
        where="ROW",
        fix="Give the first digits of a row's key, or FILE:LINE of an added file.",
    )


def find_key(dataset: Path, version: DatasetVersion, row: str) -> str:
    """The key of the row that ``row`` names: of this version, else of any that is here, as of a row since taken out.

    Raises:
        UserError: as for :func:`find_row`.
    """
    known = {m.key for m in version.members}
    if re.fullmatch("[0-9a-fA-F]{4,64}", row) and not any(key.startswith(row.lower()) for key in known):
        digests = (manifest.digest for manifest in list_versions(dataset))
        found = {key for digest in digests for key in read_places(dataset, digest) if key.startswith(row.lower())}
        if len(found) > 1:
            raise UserError(f"{len(found)} rows begin with {row!r}", where="ROW", fix="Give more digits.")
        if found:
            return found.pop()
    return find_row(dataset, version, row).key


def _key_at(dataset: Path, version: DatasetVersion, file: str, line: int) -> str:
    imports = list(_imported(dataset, version))
    source = source_name(file, sorted({row["source"] for row in imports}), dataset.parent)
    found = next((row for row in imports if row["source"] == source and row["line"] == line), None)
    if found is None:
        last = max(row["line"] for row in imports if row["source"] == source)
        raise UserError(f"no row came from line {line} of {source}; its last row is at line {last}", where="ROW")
    if found["fate"] == "skipped":
        raise UserError(f"the row was left out: {found['reason']}", where=f"{file}:{line}")
    if found["fate"] == "removed":
        raise UserError(f"the row was removed: {found['reason']}", where=f"{file}:{line}")
    if found["fate"] == "not mixed":
        raise UserError(f"the row was not mixed in: {found['reason']}", where=f"{file}:{line}")
    if found["fate"] == "contaminated":
        what = "the row was left out: it holds a test input or a benchmark item"
        raise UserError(what, where=f"{file}:{line}")
    key = str(found.get("of", found["key"]))
    return replaced(dataset, version.manifest).get(key, key)


def source_name(file: str, sources: Sequence[str], root: Path, where: str = "ROW") -> str:
    """Return the added file that ``file`` means: its name in the project, a path to it, or its bare name."""
    path = Path(file).resolve()
    within = path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else None
    for name in filter(None, (file, within)):
        if name in sources:
            return name
    same = [source for source in sources if Path(source).name == path.name]
    if len(same) == 1:
        return same[0]
    what = f"{len(same)} added files are called {path.name}" if same else f"no row came from a file {file}"
    raise UserError(what, where=where, fix=f"Added files: {', '.join(sources)}.")


def _imported(dataset: Path, version: DatasetVersion) -> Iterator[dict[str, Any]]:
    """What became of each row of each file, the version's own import first, then those of the versions before it."""
    reviews = read_reviews(dataset)
    for path in import_files(dataset, version.manifest):
        for line in text_lines(path.read_text(encoding="utf-8")):
            record = json.loads(line)
            if record["fate"] == "edited":
                record["line"] = reviews.cited(record)
                if record["line"] is None:  # the verdict is in another side's log
                    continue
            yield record
