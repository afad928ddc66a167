"""Files of pairs behind what people name: a file, a folder of files, or a pattern."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.readers.sources import JSON_NAMES, SAVED

SUFFIXES = (*JSON_NAMES, ".csv", ".tsv", ".tab", ".psv", ".parquet")
"""Names by which a file in a folder is taken for pairs; a file that is named itself may have any name."""

_MOST_NAMED = 5


def source_files(named: Iterable[str | Path], reporter: Reporter) -> list[Path]:
    """Return the files to read, each once: a folder and a pattern stand for theirs, in the order of their names.

    A folder that ``Dataset.save_to_disk`` wrote is one source. Of another folder all files below it count whose name
    ends with one of ``SUFFIXES``; hidden ones do not, and others are named.

    Raises:
        UserError: a folder without such a file, or a pattern that no file matches.
    """
    found: list[Path] = []
    for name in named:
        path = Path(name)
        if path.is_dir() and not _saved(path):
            found += _in_folder(path, reporter)
        elif not path.exists() and glob.has_magic(str(name)):
            matches = sorted(map(Path, glob.glob(str(name), recursive=True)))  # noqa: PTH207 a pattern may be absolute
            files = [match for match in matches if match.is_file() or _saved(match)]
            if not files:
                raise UserError("no file matches this pattern", where=str(name))
            base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
            reporter.say(f"{name}: {_count(files)} to read: {_named(files, base)}")
            found += files
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _in_folder(folder: Path, reporter: Reporter) -> list[Path]:
    below = [path for path in sorted(folder.rglob("*")) if not _hidden(path.relative_to(folder))]
    saved = [path for path in below if path.is_dir() and _saved(path)]
    files = [path for path in below if path.is_file() and not any(path.is_relative_to(one) for one in saved)]
    taken = sorted([*saved, *(path for path in files if path.suffix.lower() in SUFFIXES)])
    others = [path for path in files if path not in set(taken)]
    if not taken:
        what = "a folder without a file of pairs"
        raise UserError(what, where=str(folder), fix=f"Files that count end with {', '.join(SUFFIXES)}.")
    reporter.say(f"{folder}: {_count(taken)} to read: {_named(taken, folder)}")
    if others:
        reporter.warn(f"{folder}: {_count(others)} not read, by the ends of their names: {_named(others, folder)}")
    return taken


def _saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _count(files: list[Path]) -> str:
    return f"{len(files):,} file{'' if len(files) == 1 else 's'}"


def _named(files: list[Path], folder: Path) -> str:
    more = f" and {len(files) - _MOST_NAMED:,} more" if len(files) > _MOST_NAMED else ""
    return ", ".join(path.relative_to(folder).as_posix() for path in files[:_MOST_NAMED]) + more
