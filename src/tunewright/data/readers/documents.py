"""Rows inside a JSON document, selected by a JMESPath expression."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jmespath
from jmespath.exceptions import JMESPathError

from tunewright.core.errors import UserError
from tunewright.core.strict_json import repeated_key
from tunewright.data.readers.encodings import invalid_byte_positions
from tunewright.data.readers.json_rows import RawRow, numbers_note
from tunewright.data.readers.mapping import PARENT, Parent, compile_jmespath, require_groups_found, search_jmespath
from tunewright.data.readers.row_errors import CODES, JsonPath
from tunewright.data.readers.validate import RowError, row_object

_WHERE = "data.rows (--rows)"
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}]|NaN|-?Infinity', re.DOTALL)
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOST_KEYS = 8


@dataclass
class _Document:
    """A JSON text, its value, and the places of its objects and faults."""

    text: str
    path: Path
    value: Any = None
    objects: list[dict[str, Any]] = field(default_factory=list)
    """In the order of their ends, as the decoder yields them."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of each of ``objects``."""
    faults: list[tuple[int, RowError]] = field(default_factory=list)
    """Faults of the text that do not prevent reading, sorted by place."""

    def line(self, place: int) -> int:
        """Return the line (from 1) of a place in the text."""
        return bisect_left(self._breaks, place) + 1

    def __post_init__(self) -> None:
        self._breaks = [match.start() for match in re.finditer("\n", self.text)]

    def fault_in(self, start: int, end: int) -> RowError | None:
        """Return the first fault between two places."""
        at = bisect_left(self.faults, start, key=lambda fault: fault[0])
        return self.faults[at][1] if at < len(self.faults) and self.faults[at][0] < end else None


def check_expression(expression: str) -> jmespath.parser.ParsedResult:
    """Return the compiled expression.

    Raises:
        UserError: the expression is not valid JMESPath.
    """
    return compile_jmespath(expression, _WHERE, "Such as values(@), *[] or data.rows: docs/how-to/file-formats.md.")


def document_rows(
    text: TextIO, path: Path, expression: str, notes: list[str], groups: Sequence[str] = ()
) -> Iterator[RawRow]:
    """Yield the objects that an expression selects in a JSON document, which is held in memory.

    A row that is an object of the document has its line, its path and the objects above it. Rows have numbers instead
    of lines if two of them start on one line. If an item is anything else, such as an object created by the expression,
    rows are numbered from 1 in the result, with a note.

    Args:
        groups: the groups of data.group_by that are above the rows.

    Raises:
        UserError: not one JSON document (with file and line), an expression that fails or does not select a list, or a
            group that is above no row.
    """
    whole = text.read()
    if not whole.strip():
        return
    document = _read(whole, path)
    found = _found(document, expression)
    places = {id(each): number for number, each in enumerate(document.objects)}
    if all(id(item) in places for item in found):
        yield from _rows_in_place(document, found, places, groups, notes)
        return
    require_groups_found(groups, [None], path)
    if document.faults:
        place, fault = document.faults[0]
        raise _refused(document, place, fault)
    notes.append(
        f"{path}: places are row numbers in the result of data.rows, not lines, because not all rows are objects of "
        "the document"
    )
    for number, item in enumerate(found, start=1):
        try:
            yield RawRow(number, row_object(item))
        except RowError as fault:
            yield RawRow(number, fault)


def _read(text: str, path: Path) -> _Document:
    document = _Document(text, path)
    doubles: dict[int, str] = {}

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            doubles[len(document.objects)] = repeated_key(pairs)
        document.objects.append(row)
        return row

    try:
        document.value = json.JSONDecoder(object_pairs_hook=keep).decode(text)
    except json.JSONDecodeError as error:
        extra = error.msg == "Extra data"
        what = "text after the end of the document" if extra else error.msg
        fix = "data.rows is for one JSON document; leave it out for JSON Lines or an array of rows." if extra else None
        raise UserError(f"Not one JSON document: {what}", where=f"{path}:{error.lineno}", fix=fix) from None
    except RecursionError:
        raise UserError("Unreadable JSON: nested too deep", where=str(path)) from None
    except ValueError as error:  # a whole number of more digits than Python reads
        raise UserError(f"Unreadable JSON: {error}", where=str(path)) from None
    document.spans, constants = _tokens(text)
    faults = [(at, RowError("E105", f"{name} is not JSON")) for at, name in constants]
    faults += [(document.spans[n][0], RowError("E104", f'duplicate key "{key}"')) for n, key in doubles.items()]
    faults += [
        (at, RowError("E101", f"not UTF-8: invalid byte in line {document.line(at)}"))
        for at in invalid_byte_positions(text)
    ]
    document.faults = sorted(faults, key=lambda fault: fault[0])
    return document


def _tokens(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, str]]]:
    """Return the spans of a JSON text's objects, in the order of their ends, and constants that JSON does not allow."""
    spans: list[tuple[int, int]] = []
    constants: list[tuple[int, str]] = []
    open_at: list[int] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "{":
            open_at.append(match.start())
        elif token == "}":
            spans.append((open_at.pop(), match.end()))
        elif not token.startswith('"'):
            constants.append((match.start(), token))
    return spans, constants


def _found(document: _Document, expression: str) -> list[Any]:
    try:
        found = search_jmespath(check_expression(expression), document.value)
    except JMESPathError as error:
        raise UserError(f"{expression!r} fails on {document.path}: {error}", where=_WHERE) from None
    if isinstance(found, list) and found:
        return found
    kind = {dict: "one object", str: "a text", bool: "true or false"}.get(type(found), "a number")
    what = "nothing" if found is None or found == [] else f"{kind} instead of a list of rows"
    raise UserError(f"{expression!r} selects {what} in {document.path}", where=_WHERE, fix=_shape(document.value))


def _shape(value: Any) -> str:
    if isinstance(value, dict):
        return f"The document's keys: {list_keys(value)}."
    items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    if not items:
        return "The document has no objects, and rows are objects."
    there = list_keys(dict.fromkeys(key for item in items for key in item))
    return f"The document is an array of objects with the keys {there}. If they are the rows, leave data.rows out."


def list_keys(keys: Iterable[str]) -> str:
    """Return at most eight keys as text."""
    names = list(keys)
    more = f" and {len(names) - _MOST_KEYS:,} more" if len(names) > _MOST_KEYS else ""
    return f"{', '.join(names[:_MOST_KEYS])}{more}"


def _rows_in_place(
    document: _Document, found: list[Any], places: dict[int, int], groups: Sequence[str], notes: list[str]
) -> Iterator[RawRow]:
    spans = [document.spans[places[id(item)]] for item in found]
    covered: set[int] = set()
    for start, end in spans:
        at = bisect_left(document.faults, start, key=lambda fault: fault[0])
        while at < len(document.faults) and document.faults[at][0] < end:
            covered.add(at)
            at += 1
    for number, (place, fault) in enumerate(document.faults):
        if number not in covered:  # a duplicate key of the document may have hidden rows
            raise _refused(document, place, fault)
    paths = _paths_to(document.value, {id(item) for item in found})
    require_groups_found(groups, (parent for _, parent in paths.values()), document.path)
    starts = {start for start, _ in spans}
    numbered = len({document.line(start) for start in starts}) < len(starts)
    if numbered:
        notes.append(numbers_note(document.path))
    for number, (item, (start, end)) in enumerate(zip(found, spans, strict=True), start=1):
        line = number if numbered else document.line(start)
        yield RawRow(line, document.fault_in(start, end) or item, *paths[id(item)])


def _paths_to(value: Any, wanted: set[int]) -> dict[int, tuple[JsonPath, Parent | None]]:
    """Return the path from the document to each wanted object, and the objects above it."""
    paths: dict[int, tuple[JsonPath, Parent | None]] = {}
    ahead: list[tuple[JsonPath, Parent | None, Any]] = [((), None, value)]
    while ahead:
        path, parent, inner = ahead.pop()
        if id(inner) in wanted:
            paths[id(inner)] = path, parent
        if isinstance(inner, dict):
            # A shallow copy, so that "parent" does not become a key of the document.
            above: Parent | None = {**inner, PARENT: parent}
            items: Iterable[tuple[str | int, Any]] = inner.items()
        else:
            above, items = parent, enumerate(inner)
        ahead += [((*path, key), above, each) for key, each in items if isinstance(each, dict | list)]
    return paths


def _refused(document: _Document, place: int, fault: RowError) -> UserError:
    where = f"{document.path}:{document.line(place)}"
    return UserError(f"Outside the rows that data.rows selects: {fault}", where=where, fix=CODES[fault.code][1])


def rows_hint(document: dict[str, Any]) -> str | None:
    """Return the expression for the rows in a document whose values seem to contain them; None if none do."""
    if not document:
        return None
    if all(isinstance(value, dict) for value in document.values()):
        return "values(@)"
    lists = [key for key, value in document.items() if _holds_rows(value)]
    if len(lists) == len(document) and len(lists) > 1:
        return "*[]"
    return _key(lists[0]) if lists else None


def array_hint(items: Sequence[dict[str, Any]]) -> str | None:
    """Return the expression for rows in the objects of an array, if all have a list of objects under one key."""
    keys = [key for key in items[0] if all(_holds_rows(item.get(key)) for item in items)] if items else []
    return f"[].{_key(keys[0])}[]" if keys else None


def _key(name: str) -> str:
    return name if _PLAIN_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
