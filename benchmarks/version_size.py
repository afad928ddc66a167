"""Size of one more row in a dataset of 10,000 rows in git, against whole member lists.

    python benchmarks/version_size.py [banking77/train.csv banking77/test.csv]

Files are CSV with the columns text and category; without any it takes the example project's pairs. Near-equal rows are
left out; of the others 10,000, or all, make the first commit, and one more row the next. Needs git. Prints a table and
one JSON line.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
from pathlib import Path

from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.data.add import add
from tunewright.data.versions import load_version, members_lines, version_folder
from tunewright.data.versions.files import MEMBERS
from tunewright.examples import PAIRS_FILE, project_files

ROWS = 10_000
WAYS = ("a file of its own", "the file that grew", "whole member lists")
Pairs = list[dict[str, str]]


class _Silent(LogReporter):
    """A reporter that drops the warnings of ``data add``."""

    def say(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    pairs = _unlike(_pairs(parser.parse_args().files))[: ROWS + 1]
    length = sum(len(text) for pair in pairs for text in pair.values()) / len(pairs)
    print(f"one row more than {len(pairs) - 1:,} of {length:.0f} characters, in bytes")
    print(f"{'':<20} {'git push':>9} {'repository, packed':>19} {'before packing':>15}")
    results = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            results[way] = _measured(Path(folder), pairs, way)
        push, packed, loose = results[way].values()
        print(f"{way:<20} {push:>9,} {packed:>19,} {loose:>15,}")
    print(json.dumps({"rows": len(pairs) - 1, "bytes": results}))


def _measured(root: Path, pairs: Pairs, way: str) -> dict[str, int]:
    """Return the bytes of the second commit in a push, in a packed repository, and before packing."""
    _git(root, "init", "-q")
    _add(root, pairs[:-1], "pairs.jsonl")
    _commit(root)
    _git(root, "gc", "-q")
    before = _size(root)
    _add(root, *((pairs, "pairs.jsonl") if way == "the file that grew" else (pairs[-1:], "one.jsonl")))
    if way == "whole member lists":
        version = load_version(root / "dataset")
        (version_folder(root / "dataset", version.digest) / MEMBERS).write_text("".join(members_lines(version.members)))
    _commit(root)
    loose = _size(root) - before
    sent = len(_git(root, "pack-objects", "--revs", "--thin", "--stdout", "-q", stdin=b"HEAD\n^HEAD~1\n"))
    _git(root, "gc", "-q")
    return {"git_push": sent, "packed": _size(root) - before, "loose": loose}


def _pairs(files: list[Path]) -> Pairs:
    if not files:
        lines = project_files()[PAIRS_FILE].splitlines()
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in map(json.loads, lines)]
    rows = [row for file in files for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines(True))]
    return [{"prompt": row["text"], "completion": row["category"]} for row in rows]


def _unlike(pairs: Pairs) -> Pairs:
    """Return the pairs that ``data add`` keeps, so that one more row is a new row."""
    with tempfile.TemporaryDirectory() as folder:
        _add(Path(folder), pairs, "pairs.jsonl")
        members = load_version(Path(folder) / "dataset").members
    return [{"prompt": m.example.messages[-2].content, "completion": m.example.output} for m in members]


def _add(root: Path, pairs: Pairs, name: str) -> None:
    path = root / name
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    add(ProjectFolder(root, Config()), [path], _Silent())
    path.unlink()


def _commit(root: Path) -> None:
    _git(root, "add", "-A")
    _git(root, "commit", "-qm", "data")


def _git(root: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "gc.auto=0", *arguments]
    return subprocess.run(command, cwd=root, input=stdin, capture_output=True, check=True).stdout


def _size(root: Path) -> int:
    """Return the bytes of all objects."""
    return sum(path.stat().st_size for path in (root / ".git" / "objects").rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
