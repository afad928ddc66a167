"""Rows in JSON: one per line, in an array, consecutive objects, or rows that an expression selects in a document."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jmespath
from jmespath.exceptions import JMESPathError

from tunewright.core.errors import UserError
from tunewright.core.strict_json import ConstantError, DuplicateKeyError, repeated_key, strict_decoder
from tunewright.core.text import first_of
from tunewright.data.readers.encodings import escaped, invalid_byte_positions
from tunewright.data.readers.mapping import PARENT, Parent, compile_jmespath, require_groups_found, search_jmespath
from tunewright.data.readers.row_errors import CODES, JsonPath, RowError
from tunewright.data.readers.schemas import ROW_SHAPES


class RawRow(NamedTuple):
    """A row, or its error, with the line where it starts (its number if several start on one line)."""

    line: int
    row: dict[str, Any] | RowError
    above: JsonPath = ()
    """For a row inside a document: its path."""
    parent: Parent | None = None
    """For a row inside a document: the objects above it."""


_CHUNK = 1 << 16
LONGEST_ROW = 1 << 26  # characters: an unclosed quote must not read the rest of a large file into memory
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = json.JSONDecoder()


def parse_json_row(line: bytes | str) -> dict[str, Any]:
    """Return a line of JSON as an object; duplicate keys, NaN and Infinity are RowErrors, as in RFC 8259 and 7493.

    In a ``str``, bytes that are not UTF-8 may be lone surrogates, as from Python's surrogateescape.
    """
    try:
        text = line.decode() if isinstance(line, bytes) else line
        if not text.isascii():
            text.encode("utf-8", "surrogateescape").decode()
        row = strict_decoder.decode(text)
    except UnicodeError as error:
        where = (
            f": {error.reason} at byte {error.start + 1} of the line" if isinstance(error, UnicodeDecodeError) else ""
        )
        raise RowError("E101", f"not UTF-8{where}") from None
    except json.JSONDecodeError as error:
        raise RowError("E102", f"not JSON: {error.msg.removesuffix(' at')} at character {error.colno}") from None
    except RecursionError:
        raise RowError("E106", "nested too deep") from None
    except (DuplicateKeyError, ConstantError) as error:
        raise strict_fault(error) from None
    except ValueError as error:  # an integer of more digits than Python parses
        raise RowError("E102", f"unreadable JSON: {error}") from None
    return row_object(row)


def row_object(value: Any) -> dict[str, Any]:
    """Return an object, or an array as an object with the keys 0, 1, …; any other value is a RowError."""
    if isinstance(value, list) and value:
        return {str(place): item for place, item in enumerate(value)}
    if not isinstance(value, dict):
        raise RowError("E103", f"a row is an object, {ROW_SHAPES}")
    return value


def strict_fault(error: DuplicateKeyError | ConstantError) -> RowError:
    """Return the error as a fault of a row."""
    return RowError("E104" if isinstance(error, DuplicateKeyError) else "E105", str(error))


def json_lines(text: TextIO) -> Iterator[RawRow]:
    """Yield the rows of JSON Lines, skipping blank lines; only a part of a line that is too long is held."""
    number = 0
    while line := text.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and line[-1] != "\n":
            while (rest := text.readline(LONGEST_ROW)) and rest[-1] != "\n":
                pass
            yield RawRow(number, RowError("E108", f"the row has over {LONGEST_ROW - 1:,} characters"))
        elif not line.isspace():
            try:
                yield RawRow(number, parse_json_row(line))
            except RowError as fault:
                yield RawRow(number, fault)


def json_array(text: TextIO, path: Path) -> Iterator[RawRow]:
    """Yield the items of an array, read one by one; invalid JSON is a UserError, as the end of its row is unknown."""
    cursor = _Cursor(text, path)
    cursor.peek()
    cursor.step()
    if cursor.peek() == "]":
        cursor.step()
    else:
        while True:
            cursor.peek()
            yield cursor.row()
            mark = cursor.peek()
            if mark not in (",", "]"):
                raise cursor.refusal("a comma or ] is missing" if mark else "the array does not end")
            cursor.step()
            if mark == "]":
                break
    if cursor.peek():
        raise cursor.refusal("text after the end of the array")


def json_objects(text: TextIO, path: Path) -> Iterator[RawRow]:
    """Yield consecutive objects, each over several lines."""
    cursor = _Cursor(text, path)
    while cursor.peek():
        yield cursor.row()


def number_if_ambiguous(rows: Iterator[RawRow], path: Path, notes: list[str]) -> Iterator[RawRow]:
    """Yield the rows, with numbers (from 1) instead of lines if the first two start on one line, and a note of that.

    A place must be unique, and ``json.dump`` writes an array on one line.
    """
    first = next(rows, None)
    if first is None:
        return
    try:
        second = next(rows, None)
    except UserError:
        yield first
        raise
    together = [first] if second is None else [first, second]
    if second is None or second.line != first.line:
        yield from together
        yield from rows
        return
    notes.append(numbers_note(path))
    for number, row in enumerate(chain(together, rows), start=1):
        yield row._replace(line=number)


def numbers_note(path: Path) -> str:
    """Return the note that places are row numbers."""
    return f"{path}: places are row numbers (FILE:NUMBER), not lines, because several rows start on one line"


class _Cursor:
    """A position in a text that is only partly in memory."""

    def __init__(self, text: TextIO, path: Path) -> None:
        self.text, self.path = text, path
        self.buffer = ""
        self.at = 0
        self.line = 1

    def peek(self) -> str:
        """Return the next character other than white space; "" at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.at)
            assert match is not None
            self._move(match.end())
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def step(self) -> None:
        """Skip the character that ``peek`` returned."""
        self._move(self.at + 1)

    def row(self) -> RawRow:
        """Return the JSON value that begins here."""
        while True:
            start = self.line
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                # A token that the buffer's end cuts is a fault near it; the longest besides strings is a pair of \u
                # escapes (12 characters).
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if not cut or not self._more():
                    self._move(min(error.pos, len(self.buffer)))
                    raise self.refusal(error.msg) from None
                continue
            except RecursionError:
                raise self.refusal("nested too deep") from None
            except ValueError as error:  # an integer of more digits than Python parses
                raise self.refusal(str(error)) from None
            if end == len(self.buffer) and self._more():
                continue  # a number may continue
            foreign = escaped(self.buffer[self.at : end])
            if foreign is not None:
                line = start + self.buffer.count("\n", self.at, self.at + foreign)
                value = RowError("E101", f"not UTF-8: invalid byte in line {line}")
            self._move(end)
            return RawRow(start, value)

    def _decode(self) -> tuple[dict[str, Any] | RowError, int]:
        try:
            value, end = strict_decoder.raw_decode(self.buffer, self.at)
        except (DuplicateKeyError, ConstantError) as error:
            return strict_fault(error), _PLAIN.raw_decode(self.buffer, self.at)[1]
        try:
            return row_object(value), end
        except RowError as fault:
            return fault, end

    def _more(self) -> bool:
        held = len(self.buffer) - self.at
        if held > LONGEST_ROW:
            raise self.refusal(f"a row of more than {LONGEST_ROW:,} characters (for a document of rows, see data.rows)")
        # Double the buffer, so that a long row is not decoded again for each small piece of it.
        chunk = self.text.read(max(_CHUNK, held))
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        return bool(chunk)

    def _move(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def refusal(self, reason: str) -> UserError:
        """Return the error that the file cannot be read from here on."""
        return UserError(
            f"Unreadable JSON from here on: {reason}",
            where=f"{self.path}:{self.line}",
            fix="Correct it, or write one object per line, so that a fault affects one row only.",
        )


_WHERE = "data.rows (--rows)"
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}]|NaN|-?Infinity', re.DOTALL)
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class _Document:
    """A JSON text, its value, and the places of its objects and faults."""

    text: str
    path: Path
    value: Any = None
    objects: list[dict[str, Any]] = field(default_factory=list)
    """The objects in the order of their ends, as the decoder yields them."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of each of ``objects``."""
    faults: list[tuple[int, RowError]] = field(default_factory=list)
    """Faults of the text that do not prevent reading, sorted by place."""

    def line(self, place: int) -> int:
        """Return the line (from 1) of a place in the text."""
        return bisect_left(self._breaks, place) + 1

    def __post_init__(self) -> None:
        self._breaks = [match.start() for match in re.finditer("\n", self.text)]


def check_expression(expression: str) -> jmespath.parser.ParsedResult:
    """Return the compiled expression."""
    return compile_jmespath(expression, _WHERE, "Such as values(@), *[] or data.rows: docs/how-to/file-formats.md.")


def document_rows(
    text: TextIO, path: Path, expression: str, notes: list[str], groups: Sequence[str] = ()
) -> Iterator[RawRow]:
    """Yield the objects that an expression selects in a JSON document, which is held in memory.

    A row that is an object of the document has its line, its path and the objects above it. Rows have numbers instead
    of lines if two of them start on one line. If an item is anything else, such as an object created by the expression,
    rows are numbered from 1 in the result, with a note.
    """
    whole = text.read()
    if not whole.strip():
        return
    document = _parse_document(whole, path)
    found = _select(document, expression)
    places = {id(each): number for number, each in enumerate(document.objects)}
    if all(id(item) in places for item in found):
        yield from _rows_in_place(document, found, places, groups, notes)
        return
    require_groups_found(groups, [None], path)
    if document.faults:
        place, fault = document.faults[0]
        raise _outside_rows(document, place, fault)
    notes.append(
        f"{path}: places are row numbers in the result of data.rows, not lines, because not all rows are objects of "
        "the document"
    )
    for number, item in enumerate(found, start=1):
        try:
            yield RawRow(number, row_object(item))
        except RowError as fault:
            yield RawRow(number, fault)


def _parse_document(text: str, path: Path) -> _Document:
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
    except ValueError as error:  # an integer of more digits than Python parses
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


def _select(document: _Document, expression: str) -> list[Any]:
    try:
        found = search_jmespath(check_expression(expression), document.value)
    except JMESPathError as error:
        raise UserError(f"{expression!r} fails on {document.path}: {error}", where=_WHERE) from None
    if isinstance(found, list) and found:
        return found
    kind = {dict: "one object", str: "a text", bool: "true or false"}.get(type(found), "a number")
    what = "nothing" if found is None or found == [] else f"{kind} instead of a list of rows"
    raise UserError(
        f"{expression!r} selects {what} in {document.path}",
        where=_WHERE,
        fix=_shape(document.value, document.path.name),
    )


def _shape(value: Any, file_name: str) -> str:
    if isinstance(value, dict):
        hint = rows_hint(value, file_name)
        return f"The document's keys: {first_of(value)}.{f' Its rows seem to be at {hint}.' if hint else ''}"
    items = [row_object(each) for each in value if isinstance(each, dict | list)] if isinstance(value, list) else []
    if not items:
        return "The document has no objects, and rows are objects."
    there = first_of(dict.fromkeys(key for item in items for key in item))
    return f"The document is an array of rows with the keys {there}. If they are the rows, leave data.rows out."


def _rows_in_place(
    document: _Document, found: list[Any], places: dict[int, int], groups: Sequence[str], notes: list[str]
) -> Iterator[RawRow]:
    spans = [document.spans[places[id(item)]] for item in found]
    fault_places = [place for place, _ in document.faults]
    inside = [range(*(bisect_left(fault_places, place) for place in span)) for span in spans]
    covered = {number for numbers in inside for number in numbers}
    for number, (place, fault) in enumerate(document.faults):
        if number not in covered:  # a duplicate key of the document may have hidden rows
            raise _outside_rows(document, place, fault)
    paths = _paths_to(document.value, {id(item) for item in found})
    require_groups_found(groups, (parent for _, parent in paths.values()), document.path)
    starts = {start for start, _ in spans}
    numbered = len({document.line(start) for start in starts}) < len(starts)
    if numbered:
        notes.append(numbers_note(document.path))
    for number, (item, (start, _), faults) in enumerate(zip(found, spans, inside, strict=True), start=1):
        row = document.faults[faults[0]][1] if faults else item
        yield RawRow(number if numbered else document.line(start), row, *paths[id(item)])


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


def _outside_rows(document: _Document, place: int, fault: RowError) -> UserError:
    where = f"{document.path}:{document.line(place)}"
    return UserError(f"Outside the rows that data.rows selects: {fault}", where=where, fix=CODES[fault.code][1])


def rows_hint(document: dict[str, Any], file_name: str) -> str | None:
    """Return the expression for the rows in a document whose values seem to contain them; None if no value does.

    Rows are objects, or arrays of texts. An only key that is a part of the file's name differs from file to file.
    """
    if not document:
        return None
    if all(isinstance(value, dict) for value in document.values()):
        return "values(@)"
    lists = [key for key, value in document.items() if _holds_rows(value)]
    if len(lists) == len(document) and (len(lists) > 1 or lists[0] in file_name):
        return "*[]"
    return _key(lists[0]) if lists else None


def array_hint(item: dict[str, Any]) -> str | None:
    """Return the expression for rows in the objects of an array like this item, which has the rows under a key.

    Objects of which only some are one text, such as the pieces of a sentence with marked words, are no rows.
    """
    key = next((key for key, value in item.items() if _holds_rows(value) and len(set(map(_is_text, value))) == 1), None)
    return None if key is None else f"[].{_key(key)}[]"


def _is_text(item: Any) -> bool:
    return isinstance(item, dict) and len(item) == 1 and isinstance(next(iter(item.values())), str)


def _key(name: str) -> str:
    return name if _PLAIN_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _holds_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    texts = all(isinstance(item, list) and len(item) > 1 and all(isinstance(x, str) for x in item) for item in value)
    return texts or all(isinstance(item, dict) for item in value)
