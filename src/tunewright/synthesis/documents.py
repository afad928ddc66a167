"""Passages of documents: PDF by page, DOCX, HTML and Markdown by heading, plain text as a whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import file_digest
from tunewright.core.processes import run
from tunewright.synthesis import document_formats
from tunewright.synthesis.document_formats import READERS, SEPARATOR, Section

FEWEST_CHARACTERS = 80
"""A shorter passage, such as a heading alone, holds no answer."""

MAX_MEMORY = 2 << 30
"""Bytes of address space of the process that parses a document."""
MAX_SECONDS = 300
"""Its processor time."""

_SUPPORTED = "Supported: .pdf, .docx, .html, .htm, .md, .markdown and .txt."


@dataclass(frozen=True)
class Passage:
    """A piece of a section; ``start`` counts characters of the document's extracted text."""

    name: str
    document: str
    """SHA-256 of the file."""
    at: str
    start: int
    text: str

    @property
    def place(self) -> str:
        """The passage for messages: ``manual.pdf, page 3``."""
        return f"{self.name}, {self.at}"


@dataclass(frozen=True)
class Document:
    """A document's passages, and the places of its sections that have no text or too little."""

    passages: tuple[Passage, ...]
    without_text: tuple[str, ...]
    too_short: tuple[str, ...]


def read_document(path: Path, longest: int) -> Document:
    """Read a document and cut it into passages.

    Args:
        path: the file; its suffix decides the format.
        longest: characters of a passage.

    Raises:
        UserError: the file is missing, empty, encrypted, damaged, without any text, or of another format; parsing it
            exceeds a limit; or a package is missing.
    """
    suffix = path.suffix.lower()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the document: {error.strerror}", where=str(path)) from None
    if suffix not in READERS:
        raise UserError("Unsupported document format", where=str(path), fix=_SUPPORTED)
    if not data.strip():
        raise UserError("The document is empty", where=str(path), fix="Leave it out.")
    sections = _parse_apart(path)
    if not any(section.text for section in sections):
        fix = "Run text recognition on it first (OCR), such as ocrmypdf." if suffix == ".pdf" else "Leave it out."
        what = "The document has no text: its pages may be scanned" if suffix == ".pdf" else "The document has no text"
        raise UserError(what, where=str(path), fix=fix)
    digest, start = file_digest(path), 0
    passages, without, short = [], [], []
    for section in sections:
        if not section.text:
            without.append(f"{path.name}, {section.at}")
            continue
        pieces = list(_pieces(section.text, longest))
        for offset, piece in pieces:
            passage = Passage(path.name, digest, section.at, start + offset, piece)
            if len(piece) < FEWEST_CHARACTERS:
                short.append(passage.place)
            else:
                passages.append(passage)
        start += len(section.text) + len(SEPARATOR)
    return Document(tuple(passages), tuple(without), tuple(short))


def _parse_apart(path: Path) -> list[Section]:
    """Return a document's sections, parsed in a process of its own: a parser is not trusted with memory and time."""
    command = (sys.executable, "-P", "-m", document_formats.__name__, str(path), str(MAX_MEMORY), str(MAX_SECONDS))
    ran = run(command)
    if ran.code == 0:
        result = json.loads(ran.stdout)
        if error := result.get("error"):
            raise UserError(**error)
        return [Section(**section) for section in result["sections"]]
    reason = ran.stderr.strip().rpartition("\n")[2]
    what = f"The document cannot be parsed: {reason[:200]}"
    if ran.code < 0 or reason.startswith("MemoryError"):
        what = f"Parsing the document takes over {MAX_MEMORY >> 30} GiB of memory or {MAX_SECONDS} s of processor time"
    raise UserError(what, where=str(path), fix="Split it, or leave it out.")


def _pieces(text: str, longest: int) -> Iterator[tuple[int, str]]:
    """Yield pieces with their offsets, cut at the last paragraph, line, sentence or word that fits."""
    start = 0
    while len(text) - start > longest:
        window = text[start : start + longest]
        ends = (window.rfind(mark) + len(mark) for mark in (SEPARATOR, "\n", ". ", " ") if mark in window)
        end = next((end for end in ends if end > longest // 2), longest)
        yield from _piece(text, start, start + end)
        start += end
    yield from _piece(text, start, len(text))


def _piece(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    piece = text[start:end]
    if piece.strip():
        yield start + len(piece) - len(piece.lstrip()), piece.strip()
