"""CSV for spreadsheets: out so that no cell runs as a formula, in again whatever the spreadsheet made of the file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import write_text

_MOST_FAULTS = 50
# What spreadsheets take for the beginning of a formula (OWASP, "CSV Injection"), quoted before by us or not.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_QUOTED = re.compile(r"'+[=+\-@\t\r\n＝＋－＠]")


def safe_cell(text: str) -> str:
    """The text as no spreadsheet takes it for a formula: with a ' before it, if it begins like one."""
    return f"'{text}" if _FORMULA.match(text) else text


def restored_cell(cell: str) -> str:
    """What `safe_cell` was given."""
    return cell[1:] if _QUOTED.match(cell) else cell


def one_line_end(text: str) -> str:
    """The text with line ends as they were: spreadsheets rewrite them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_sheet(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a new CSV file, each cell by `safe_cell`, whole or not at all.

    Raises:
        UserError: the file is there already, or the disk refuses.
    """
    if path.exists():
        raise UserError("there is a file of this name", where=str(path), fix="Choose another name.")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    table.writerow(columns)
    table.writerows([safe_cell(cell) for cell in row] for row in rows)
    # The byte-order mark is how spreadsheets know UTF-8.
    write_text(path, "\ufeff" + text.getvalue())


def read_sheet(path: Path, needed: Sequence[str], made_by: str) -> list[tuple[int, dict[str, str]]]:
    """The rows as they are, each with the line it starts at, from 1; empty rows are left out.

    Separated by comma, semicolon or tab: spreadsheets choose by the locale.

    Args:
        needed: columns that there must be.
        made_by: the command that writes such files.

    Raises:
        UserError: the file cannot be read, a column lacks, or a row has another number of fields.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8", where=str(path), fix="Save it as CSV UTF-8.") from None
    head = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: Sequence[str] = ()
    start = 1
    try:
        for fields in reader:
            if not header:
                header = fields
                _check_header(header, path, needed, made_by)
            elif any(fields):
                if len(fields) != len(header):
                    raise UserError(f"{len(fields)} fields where the header has {len(header)}", where=f"{path}:{start}")
                rows.append((start, dict(zip(header, fields, strict=True))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"not CSV that can be read from here on: {error}", where=f"{path}:{start}") from None
    if not header:
        _check_header(header, path, needed, made_by)
    return rows


def _check_header(header: Sequence[str], path: Path, needed: Sequence[str], made_by: str) -> None:
    missing = [name for name in needed if header.count(name) != 1]
    if missing:
        fix = f"Start from a file that `{made_by}` wrote."
        raise UserError(f"no column {', '.join(missing)}", where=f"{path}:1", fix=fix)


def refuse_faulty(faults: Sequence[str]) -> None:
    """Refuse a file with faulty rows.

    Args:
        faults: each begins with file:line.

    Raises:
        UserError: there is one; the first 50 are named.
    """
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults[:_MOST_FAULTS])
        more = f"\n  and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        raise UserError(f"faulty rows, no verdict was recorded:\n{listed}{more}", fix="Mend them and import again.")
