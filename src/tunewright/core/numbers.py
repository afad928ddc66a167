"""Numbers that people can say aloud: run 3, evaluation 2.

A project's numbers.jsonl has a sealed line for each adapter and evaluation. A number is given once, and stays with the
name when that is deleted. Copies of a project that number in parallel may give a number twice: it is then refused, and
both names still work.
"""

from __future__ import annotations

from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.log import SealedLine, extend, numbered_lines, whole_lines

NUMBERS_FILE = "numbers.jsonl"


class _Number(SealedLine):
    folder: str
    number: int
    name: str


def read_numbers(folder: Path) -> dict[str, int]:
    """Return the number of each name that a folder of the project stores, or stored."""
    path = folder.parent / NUMBERS_FILE
    return _numbers(whole_lines(path.read_bytes())[0], folder) if path.is_file() else {}


def give_number(folder: Path, name: str) -> None:
    """Give the next number of the folder to a name that it stores, if it has none."""

    def news(data: bytes) -> str:
        known = _numbers(data, folder)
        number = max(known.values(), default=0) + 1
        return "" if name in known else _Number(folder=folder.name, number=number, name=name).line

    extend(folder.parent / NUMBERS_FILE, news)


def name_numbered(folder: Path, number: str) -> str | None:
    """Return the name with a number; None if no name has it, also if ``number`` is not one."""
    found = [name for name, each in read_numbers(folder).items() if str(each) == number]
    if len(found) > 1:
        raise UserError(
            f"The number {number} was given twice, in separate copies of the project",
            where=str(folder.parent / NUMBERS_FILE),
            fix=f"Use a name: {', '.join(found)}.",
        )
    return found[0] if found else None


def _numbers(data: bytes, folder: Path) -> dict[str, int]:
    path = folder.parent / NUMBERS_FILE
    lines = (_Number.parse(line, f"{path}:{place}", "number") for place, line in numbered_lines(data))
    return {line.name: line.number for line in lines if line.folder == folder.name}
