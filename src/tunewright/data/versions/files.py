"""Two kinds of plain text files that git can show: the rows of all versions, and the members of each version.

dataset/rows/AB.jsonl: AB are the first two digits of the pair key. A line is ``{"key": ..., "messages": [...]}`` and
lines are sorted by key. Except for purges, files only gain rows, so that every version can be read at any time, also
after a crash.

dataset/versions/DIGEST12/members.tsv: sorted lines of pair key, split and cluster.

A row with groups, of the generic mix-in, whose answer a model wrote, or that has a split by its authors, has a fourth
field with JSON:

    KEY	SPLIT	CLUSTER	{"groups":["customer=ACME"]}
    KEY	train	CLUSTER	{"mix":true}
    KEY	train	CLUSTER	{"generated":true}
    KEY	test	CLUSTER	{"given":"test"}

The SHA-256 of these lines is the version's digest. The file of a version that differs little from its parent has only
the difference, so that an added row costs a line, in git and on disk:

    from	DIGEST12
    -	KEY	SPLIT	CLUSTER
    +	KEY	SPLIT	CLUSTER
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, text_lines, write_text
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.data.readers.json_rows import parse_json_row
from tunewright.data.readers.row_errors import RowError
from tunewright.data.splits import SPLITS, Split

_REPAIR = "Restore the file, from git for example."
_KEY = re.compile(rb'"key":"([0-9a-f]{64})"')


@dataclass(frozen=True)
class StoredRow:
    """A valid line of a file of rows; ``line`` counts from 1."""

    line: int
    key: str
    example: Example


@dataclass(frozen=True)
class BadRow:
    """An invalid line: the reason, and the keys that it states or that its text has."""

    line: int
    keys: tuple[str, ...]
    reason: str
    fix: str = _REPAIR


def row_line(key: str, example: Example) -> str:
    """Return the line of a row, without the line break."""
    return canonical_json({"key": key, "messages": [m.as_dict() for m in example.messages]})


def rows_text(examples: Mapping[str, Example]) -> str:
    """Return the content of a file of rows, sorted by pair key."""
    return "".join(row_line(key, example) + "\n" for key, example in sorted(examples.items()))


def scan_rows(data: bytes) -> Iterator[StoredRow | BadRow]:
    """Yield every line of a file of rows, each checked against its key and its spelling."""
    for number, line in enumerate(data.splitlines(), start=1):
        claimed = tuple(key.decode() for key in _KEY.findall(line))
        try:
            row = parse_json_row(line)
            key, example = row["key"], Example.from_dicts(row["messages"])
            actual = example.pair_key
            spelled = row_line(key, example).encode()
        # ValueError: half a surrogate pair, which no encoding represents
        except (RowError, KeyError, TypeError, AttributeError, ValueError) as error:
            yield BadRow(number, claimed, f"Not a row of a dataset ({error})")
            continue
        if actual != key:
            keys = tuple(sorted({*claimed, actual}))
            reason = f"The row {json.dumps(key)} was changed: its text has the key {actual}"
            yield BadRow(number, keys, reason, f"{_REPAIR} To change an example, add the new pair as a row of a file.")
        elif spelled != line:
            yield BadRow(number, (key,), f"The row {json.dumps(key)} was changed: it was written in another spelling")
        else:
            yield StoredRow(number, key, example)


def parse_rows(data: bytes, where: str) -> dict[str, Example]:
    """Return the examples in a file of rows, by pair key; ``where`` names the file in errors."""
    rows: dict[str, Example] = {}
    for row in scan_rows(data):
        if isinstance(row, BadRow):
            raise UserError(row.reason, where=f"{where}:{row.line}", fix=row.fix)
        rows[row.key] = row.example
    return rows


def _shards(folder: Path, keys: Iterable[str]) -> list[tuple[Path, set[str]]]:
    """Return the files that have, or would have, the rows of these pair keys, in order."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        found[key[:2]].add(key)
    return [(folder / f"{prefix}.jsonl", mine) for prefix, mine in sorted(found.items())]


def write_rows(folder: Path, examples: Mapping[str, Example], reporter: Reporter) -> None:
    """Add examples by pair key; files that have them all are not rewritten."""
    shards = _shards(folder, examples)
    with reporter.task("saving rows", len(shards), "files") as task:
        for path, keys in shards:
            rows = {key: examples[key] for key in keys}
            there = parse_rows(path.read_bytes(), str(path)) if path.exists() else {}
            if rows.keys() - there.keys():
                write_text(path, rows_text(rows | there))
            task.advance()


def has_rows(folder: Path, keys: Iterable[str]) -> set[str]:
    """Return the pair keys that have a row in the files."""
    found: set[str] = set()
    for path, wanted in _shards(folder, keys):
        if path.is_file():
            found |= wanted & {key.decode() for key in _KEY.findall(path.read_bytes())}
    return found


def remove_rows(folder: Path, keys: Iterable[str]) -> None:
    """Remove rows that no version needs; missing ones are ignored."""
    for path, gone in _shards(folder, keys):
        there = parse_rows(path.read_bytes(), str(path)) if path.exists() else {}
        if gone & there.keys():
            kept = {key: example for key, example in there.items() if key not in gone}
            if kept:
                write_text(path, rows_text(kept))
            else:
                path.unlink()


def read_rows(folder: Path, keys: Iterable[str]) -> dict[str, Example]:
    """Return the examples of these pair keys, each checked against its key."""
    found: dict[str, Example] = {}
    for path, mine in _shards(folder, keys):
        if not path.is_file():
            raise UserError("Rows of the dataset are missing: the file does not exist", where=str(path), fix=_REPAIR)
        shard = parse_rows(path.read_bytes(), str(path))
        lost = sorted(mine - shard.keys())
        if lost:
            raise UserError(f"The row {lost[0]} is missing", where=str(path), fix=_REPAIR)
        found |= {key: shard[key] for key in mine}
    return found


MEMBERS = "members.tsv"


class Place(NamedTuple):
    """Place of a row in a version: split, cluster, sorted groups ("customer=ACME"), if it is mix-in, if generated.

    ``given`` is the split that its authors gave it; None: its split was drawn.
    """

    split: Split
    cluster: str
    groups: tuple[str, ...] = ()
    mixed: bool = False
    generated: bool = False
    given: Split | None = None


Places = dict[str, Place]

_RESTORE = "Restore the dataset folder, from git for example."
_FROM = "from\t"


class _Link(NamedTuple):
    """A version's file: all lines, or the difference from its parent; ``folder`` is the version's."""

    where: str
    folder: str
    lines: Sequence[str]
    parent: str | None
    size: int


def lines_sha256(lines: Iterable[str]) -> str:
    """Return the digest of lines, without holding all of them."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode())
    return whole.hexdigest()


def read_members(dataset: Path, digest: str, data: bytes | None = None, where: str = "") -> str:
    """Return the lines of all members of a version, verified against its full digest.

    ``data`` and ``where`` are content and name of its file, if it is not in the dataset yet.
    """
    chain = _chain(dataset, digest, data, where)
    text = _text(chain)
    if lines_sha256([text]) != digest:
        for count, link in enumerate(chain, start=1):
            actual = lines_sha256([_text(chain[:count])])
            if actual[:12] != link.folder:
                raise _wrong(f"The members were changed (digest {actual[:12]})", link.where)
    return text


def read_places(dataset: Path, digest: str) -> Places:
    """Return the place of each pair key in a version, verified, without reading rows; ``digest`` is the full one."""
    return places_of(read_members(dataset, digest), str(dataset / "versions" / digest[:12] / MEMBERS))


def places_of(text: str, where: str) -> Places:
    """Return the place of each pair key, from lines that have the version's digest; ``where`` is their file."""
    places: Places = {}
    for line in text_lines(text):
        key, split, cluster, *rest = (*line.split("\t", 3), "", "")[:4]
        known = next((each for each in SPLITS if each == split), None)
        place = Place(known, cluster, *_read_more(rest[0])) if known else None
        # A pulled version may come from another program.
        spelled = place is not None and list(place.groups) == sorted(set(place.groups))
        if place is None or not spelled or member_line(key, place) != f"{line}\n":
            raise _wrong("Invalid member: expected pair key, split and cluster", f"{where}: {line[:80]}")
        places[key] = place
    return places


def member_line(key: str, place: Place) -> str:
    """Return the line of a member, with the line break."""
    more: dict[str, Any] = {"groups": list(place.groups)} if place.groups else {}
    if place.mixed:
        more["mix"] = True
    if place.generated:
        more["generated"] = True
    if place.given:
        more["given"] = place.given
    return "\t".join([key, place.split, place.cluster, *([canonical_json(more)] if more else [])]) + "\n"


def _read_more(field: str) -> tuple[tuple[str, ...], bool, bool, Split | None]:
    """Return groups to given from the fourth field; a malformed field fails the check of spelling."""
    try:
        more = json.loads(field or "{}")
        given = next((split for split in SPLITS if split == more.get("given")), None)
        return tuple(map(str, more.get("groups", ()))), "mix" in more, "generated" in more, given
    except (AttributeError, TypeError, ValueError, RecursionError):
        return (), False, False, None


def members_file(dataset: Path, lines: Iterable[str], parent: str | None) -> Iterator[str]:
    """Yield the content of a version's file: all lines, or the difference from its parent.

    The chain of differences that a reader has to apply is at most half as large as all lines.
    """
    if parent is None or not (dataset / "versions" / parent[:12]).is_dir():
        yield from lines
        return
    text, chain = "".join(lines), _chain(dataset, parent)
    before, after = (set(text_lines(lines)) for lines in (read_members(dataset, parent), text))
    changes = [f"-\t{line}\n" for line in sorted(before - after)] + [f"+\t{line}\n" for line in sorted(after - before)]
    difference = f"{_FROM}{parent[:12]}\n" + "".join(changes)
    gone_through = sum(link.size for link in chain[1:])
    yield difference if 2 * (len(difference) + gone_through) <= len(text) else text


def _chain(dataset: Path, digest: str, data: bytes | None = None, where: str = "") -> list[_Link]:
    """Return the chain of files that make up a version's members: the full one first, the version's own last."""
    links: list[_Link] = []
    step: str | None = digest[:12]
    while step is not None:
        path = dataset / "versions" / step / MEMBERS
        if links or data is None:
            try:
                data, where = path.read_bytes(), str(path)
            except OSError as error:
                if links:
                    what = f"Cannot read the members of version {step}, which it builds on: {error.strerror}"
                    raise _wrong(what, f"{where}:1") from None
                raise _wrong(f"Cannot read the members: {error.strerror}", str(path)) from None
        links.append(_link(data, where, step))
        step = links[-1].parent
        if any(link.folder == step for link in links):
            raise _wrong("The version builds on itself", where)
    return links[::-1]


def _link(data: bytes, where: str, folder: str) -> _Link:
    lines = text_lines(data.decode(errors="replace").replace("\r\n", "\n"))
    if not lines or not lines[0].startswith(_FROM):
        return _Link(where, folder, lines, None, len(data))
    parent = lines[0].removeprefix(_FROM)
    if not re.fullmatch("[0-9a-f]{12}", parent):  # the digest becomes a path
        raise _wrong("Not the name of a version", f"{where}:1")
    return _Link(where, folder, lines[1:], parent, len(data))


def _text(chain: Sequence[_Link]) -> str:
    members = set(chain[0].lines)
    for link in chain[1:]:
        for number, line in enumerate(link.lines, start=2):
            sign, _, member = line.partition("\t")
            if sign not in ("-", "+") or (sign == "-") != (member in members):
                what = "Invalid change: it removes a member that does not exist, or adds one that does"
                raise _wrong(what, f"{link.where}:{number}")
            if sign == "-":
                members.remove(member)
            else:
                members.add(member)
    return "".join(f"{line}\n" for line in sorted(members))


def _wrong(what: str, where: str) -> UserError:
    return UserError(what, where=where, fix=_RESTORE)
