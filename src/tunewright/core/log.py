"""Append-only records: files with one JSON object per line, such as reviews and openings of the test set.

They are the user's own, under an author's name. Each line is checked, and a line that was changed by hand is
an error that names file and line. Results that can be computed again are in journals (`model_io/replies.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tunewright.core.errors import UserError, first_fault
from tunewright.core.io import canonical_json, writing
from tunewright.core.io import digest as json_digest
from tunewright.core.locks import lock_file

_T = TypeVar("_T")
RESTORE = "Restore the file, from git for example."


def line_digest(facts: Mapping[str, Any]) -> str:
    """Return 16 digits of the SHA-256 of the fields' canonical JSON."""
    return json_digest(facts)[:16]


def sealed_line(facts: Mapping[str, Any]) -> str:
    """Return a line of these fields and their digest, which reveals later changes by hand."""
    return canonical_json({**facts, "digest": line_digest(facts)}) + "\n"


def require_seal(spelled: str, line: bytes, where: str, name: str) -> None:
    """Refuse a line that differs from the canonical spelling of its fields; ``name`` is its kind, such as "review"."""
    if spelled.encode() != line + b"\n":
        raise UserError(f"The {name} was changed: its digest does not match", where=where, fix=RESTORE)


class SealedLine(BaseModel):
    """A line of a record that holds the digest of its other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spells_none: ClassVar[bool] = False
    """Fields without a value are written, as null."""

    @property
    def line(self) -> str:
        """The text of the line, with its digest."""
        return sealed_line(self.model_dump(mode="json", exclude_none=not self.spells_none))

    @classmethod
    def parse(cls, line: bytes, where: str, name: str) -> Self:
        """Parse a line; it raises the errors of `parse_line` and `require_seal`."""
        parsed = parse_line(cls._unsealed, line, where, f"Not a {name}")
        require_seal(parsed.line, line, where, name)
        return parsed

    @classmethod
    def _unsealed(cls, line: bytes) -> Self:
        return cls.model_validate({key: value for key, value in dict(json.loads(line)).items() if key != "digest"})


def parse_line(validate: Callable[[bytes], _T], line: bytes, where: str, wrong: str, fix: str = RESTORE) -> _T:
    """Parse a line of a record, without its line end; ``wrong`` begins the error, such as "Not a review"."""
    try:
        return validate(line)
    except ValidationError as error:
        why = first_fault(error)
    except (ValueError, TypeError) as error:
        why = str(error)
    raise UserError(f"{wrong}: {why}", where=where, fix=fix)


def numbered_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip())


def whole_lines(data: bytes) -> tuple[bytes, bool]:
    """Return a record without an incomplete last line, and whether it had one; a missing last line end is added."""
    end = data.rfind(b"\n") + 1
    try:
        json.loads(data[end:])
    except ValueError:
        return data[:end], end < len(data)
    return data + b"\n", False


def extend(path: Path, news: Callable[[bytes], str]) -> None:
    """Append the lines that ``news`` returns to a locked record, after removing an incomplete line left by a crash."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path) as file:
            data = file.read()
            whole, _ = whole_lines(data)
            if added := news(whole):
                file.truncate(min(len(whole), len(data)))
                file.write(whole[len(data) :] + added.encode())  # first a line end that an editor omitted
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def held(path: Path) -> Iterator[BinaryIO]:
    """Open a record for reading and appending, at its beginning and locked."""
    while True:
        with path.open("a+b") as file:
            lock_file(file)
            # While this process waited for the lock, a purge may have replaced the file.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.seek(0)
                yield file
                return


AUTHOR_VARIABLE = "TUNEWRIGHT_AUTHOR"
"""Names the author of what a command records, if it is not git's user.name."""

_author: ContextVar[str | None] = ContextVar("tunewright_author", default=None)


@contextmanager
def authored_by(name: str) -> Iterator[None]:
    """Record changes under this name while the block runs, only in its thread."""
    before = _author.set(name)
    try:
        yield
    finally:
        _author.reset(before)


def stated_author() -> str | None:
    """Return the name of :func:`authored_by`, else the variable's value, else None."""
    return _author.get() or " ".join(os.environ.get(AUTHOR_VARIABLE, "").split()) or None
