"""CSV for spreadsheets: written so that no cell runs as a formula, read back however a spreadsheet saved it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import write_text

# Characters that start a formula in a spreadsheet (OWASP, "CSV Injection"), with or without our quote.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_QUOTED = re.compile(r"'+[=+\-@\t\r\n＝＋－＠]")


def safe_cell(text: str) -> str:
    """Return the text with a leading ' if a spreadsheet would run it as a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def restored_cell(cell: str) -> str:
    """Return the text that :func:`safe_cell` was given."""
    return cell[1:] if _QUOTED.match(cell) else cell


def one_line_end(text: str) -> str:
    """Return the text with ``\\n`` line ends: spreadsheets rewrite them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_sheet(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a new CSV file of :func:`sheet` atomically."""
    if path.exists():
        raise UserError("The file already exists", where=str(path), fix="Choose another name.")
    write_text(path, sheet(columns, rows))


def sheet(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the text of a CSV file, each cell by :func:`safe_cell`."""
    text = io.StringIO()
    # Spreadsheets recognise UTF-8 by the byte-order mark.
    text.write("\ufeff")
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    table.writerow(columns)
    table.writerows([safe_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def read_sheet(path: Path, needed: Sequence[str], made_by: str) -> list[tuple[int, dict[str, str]]]:
    """Return the rows with the line each starts at (from 1), without empty rows.

    The separator is a comma, semicolon or tab: spreadsheets choose by locale. The columns
    ``needed`` must exist; ``made_by`` is the command that writes these files.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read the file: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("The file is not UTF-8", where=str(path), fix="Save it as CSV UTF-8.") from None
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
        raise UserError(f"Invalid CSV: {error}", where=f"{path}:{start}") from None
    if not header:
        _check_header(header, path, needed, made_by)
    return rows


def _check_header(header: Sequence[str], path: Path, needed: Sequence[str], made_by: str) -> None:
    missing = [name for name in needed if header.count(name) != 1]
    if missing:
        fix = f"Start from a file that `{made_by}` wrote."
        raise UserError(f"Missing or repeated column: {', '.join(missing)}", where=f"{path}:1", fix=fix)
