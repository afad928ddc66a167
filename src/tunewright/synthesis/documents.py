"""Passages of documents: PDF by page, DOCX, HTML and Markdown by heading, plain text as a whole.

As a program, it prints the sections of one document, within limits of memory and time.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile, ZipFile

from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import expansion_limit, file_digest
from tunewright.core.processes import run
from tunewright.core.text import normalize

if TYPE_CHECKING:
    from docx.table import Table

_INSTALL = f"Install it: {install_command('documents')}"
_BEGINNING = "the beginning"
SEPARATOR = "\n\n"

FEWEST_CHARACTERS = 80
"""A shorter passage, such as a heading alone, holds no answer."""

MAX_MEMORY = 2 << 30
"""Bytes of address space of the process that parses a document."""
MAX_SECONDS = 300
"""Its processor time."""

_SUPPORTED = "Supported: .pdf, .docx, .html, .htm, .md, .markdown and .txt."


@dataclass(frozen=True)
class DocumentSection:
    """A part of a document: ``page 3`` or ``heading "Fees"``, and its text."""

    at: str
    text: str


def parse_document(data: bytes, path: Path) -> list[DocumentSection]:
    """Return a document's sections; call it in a process with limits."""
    found = READERS[path.suffix.lower()](data, path)
    sections = [DocumentSection(section.at, _clean(section.text)) for section in found]
    size, limit = sum(len(section.text) for section in sections), expansion_limit(len(data))
    if size > limit:
        raise _expanded(f"{size:,} characters of text", limit, path)
    return sections


def _expanded(size: str, limit: int, path: Path) -> UserError:
    what = f"The document contains {size} (limit for a file of this size: {limit:,})"
    return UserError(what, where=str(path), fix="Split it, or leave it out.")


def _clean(text: str) -> str:
    """Return the text in NFC, with spaces collapsed and at most one empty line in a row."""
    text = normalize(text.replace("\r\n", "\n").replace("\xa0", " ").replace("\x00", ""))
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text.encode("utf-8", "ignore").decode())
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", SEPARATOR, re.sub(r" ?\n ?", "\n", text)).strip()


def _pdf(data: bytes, path: Path) -> list[DocumentSection]:
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError:
        raise UserError("Reading PDF requires pypdf", where=str(path), fix=_INSTALL) from None
    try:
        reader = pypdf.PdfReader(BytesIO(data))
        # Many files are encrypted with an empty password, which only forbids printing or copying.
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError("The PDF is encrypted", where=str(path), fix="Save it without a password.")
        pages = enumerate(reader.pages, start=1)
        return [DocumentSection(f"page {number}", page.extract_text()) for number, page in pages]
    except UserError:
        raise
    except (PyPdfError, *_DAMAGED) as error:
        raise _damaged("PDF", path, error) from None


def _docx(data: bytes, path: Path) -> list[DocumentSection]:
    try:
        import docx
        from docx.opc.exceptions import PackageNotFoundError
        from docx.table import Table
    except ImportError:
        raise UserError("Reading DOCX requires python-docx", where=str(path), fix=_INSTALL) from None
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        what = "The document is encrypted, or in the format of Word 97 (.doc)"
        raise UserError(what, where=str(path), fix="Save it as .docx without a password.")
    sections = _Sections()
    try:
        with ZipFile(BytesIO(data)) as archive:
            size, limit = sum(member.file_size for member in archive.infolist()), expansion_limit(len(data))
        if size > limit:
            raise _expanded(f"{size:,} bytes", limit, path)
        for block in docx.Document(BytesIO(data)).iter_inner_content():
            if isinstance(block, Table):
                for row in _rows(block):
                    sections.add(" | ".join(row))
            elif (block.style.name or "" if block.style else "").startswith(
                ("Heading", "Title")
            ) and block.text.strip():
                sections.head(block.text)
            else:
                sections.add(block.text)
    except UserError:
        raise
    except (PackageNotFoundError, BadZipFile, SyntaxError, *_DAMAGED) as error:
        raise _damaged("DOCX", path, error) from None
    return sections.done


def _rows(table: Table) -> Iterator[list[str]]:
    """Yield the cells' texts of each row, a merged cell once in each row that it covers."""
    from docx.table import _Cell

    # `row.cells` would repeat a cell for each column that it spans (a few bytes can state any number), takes quadratic
    # time for a column of merged cells, and fails where the rows of a foreign table do not fit each other.
    above: dict[int, str] = {}
    for row in table.rows:
        texts, column = [], row.grid_cols_before
        for cell in row._tr.tc_lst:
            text = above.get(column, "") if cell.vMerge == "continue" else _Cell(cell, table).text.strip()
            above[column] = text
            texts.append(text)
            column += cell.grid_span
        yield texts


def _html(data: bytes, path: Path) -> list[DocumentSection]:
    try:
        from lxml import etree, html
    except ImportError:
        raise UserError("Reading HTML requires lxml", where=str(path), fix=_INSTALL) from None
    try:
        data.decode()
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None  # the parser finds the one that the page declares
    try:
        parser = html.HTMLParser(encoding=encoding, remove_comments=True, remove_pis=True)
        root = html.document_fromstring(data, parser=parser)
    except (etree.ParserError, etree.LxmlError, *_DAMAGED) as error:
        raise _damaged("HTML", path, error) from None
    sections = _Sections()
    walker = etree.iterwalk(root, events=("start", "end"))
    for event, node in walker:
        if node.tag not in _INLINE and node.tag not in _SKIPPED:
            sections.end()
        if event == "end":
            sections.text(node.tail or "")
        elif node.tag in _SKIPPED:
            walker.skip_subtree()
        elif node.tag in _HEADINGS:
            sections.head(" ".join(node.text_content().split()))
            walker.skip_subtree()
        else:
            sections.text(node.text or "")
    return sections.done


_HEADINGS = {f"h{level}" for level in range(1, 7)}
_SKIPPED = {"script", "style", "noscript", "template", "nav", "head", "svg", "iframe"}
_INLINE = {"a", "abbr", "b", "bdi", "cite", "code", "em", "font", "i", "kbd", "label", "mark", "q", "s", "small"}
_INLINE |= {"span", "strong", "sub", "sup", "time", "u", "var", "wbr"}


def _markdown(data: bytes, path: Path) -> list[DocumentSection]:
    from markdown_it import MarkdownIt

    lines = _text(data, path).split("\n")
    tokens = MarkdownIt("commonmark").parse("\n".join(lines))
    heads = {
        token.map[0]: (token.map[1], tokens[place + 1].content)
        for place, token in enumerate(tokens)
        if token.type == "heading_open" and token.map and token.level == 0
    }
    sections = _Sections()
    line = 0
    while line < len(lines):
        if line in heads:
            line, title = heads[line]
            sections.head(title)
            continue
        sections.text(lines[line] + "\n")
        line += 1
    sections.end()
    return sections.done


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8: {error.reason}", where=str(path), fix="Save the document in UTF-8.") from None


class _Sections:
    """Sections under headings, built in the order of the document."""

    def __init__(self) -> None:
        self._found: list[tuple[str, list[str]]] = [(_BEGINNING, [])]
        self._open = ""

    def head(self, title: str) -> None:
        """Begin a section."""
        self.end()
        title = " ".join(title.split())
        self._found.append((f'heading "{title[:100]}"', [title]))

    def text(self, text: str) -> None:
        """Continue the open paragraph."""
        self._open += text

    def end(self) -> None:
        """End the open paragraph."""
        if self._open.strip():
            self._found[-1][1].append(self._open)
        self._open = ""

    def add(self, paragraph: str) -> None:
        """Add a paragraph."""
        self.text(paragraph)
        self.end()

    @property
    def done(self) -> list[DocumentSection]:
        """The sections that have a paragraph or a title."""
        self.end()
        return [DocumentSection(at, SEPARATOR.join(parts)) for at, parts in self._found if parts]


_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, NotImplementedError, OSError)
"""Exceptions that parsers of foreign bytes raise besides their own."""


def _damaged(kind: str, path: Path, error: Exception) -> UserError:
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return UserError(f"The {kind} is damaged: {detail}", where=str(path), fix="Save it again, or leave it out.")


READERS: dict[str, Callable[[bytes, Path], list[DocumentSection]]] = {
    ".pdf": _pdf,
    ".docx": _docx,
    ".html": _html,
    ".htm": _html,
    ".md": _markdown,
    ".markdown": _markdown,
    ".txt": lambda data, path: [DocumentSection(_BEGINNING, _text(data, path))],
}


def _print_sections(path: Path, memory: int, seconds: int) -> None:
    """Print a document's sections as JSON, or its error, within limits of address space and processor time."""
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        data = path.read_bytes()
        sections = [asdict(section) for section in parse_document(data, path)]
    except UserError as error:
        json.dump({"error": error.as_dict()}, sys.stdout)
    else:
        json.dump({"sections": sections}, sys.stdout)


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
    """Read a document and cut it into passages of at most ``longest`` characters."""
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


def _parse_apart(path: Path) -> list[DocumentSection]:
    """Return a document's sections, parsed in a process of its own: a parser may take too much memory and time."""
    command = (sys.executable, "-P", "-m", __name__, str(path), str(MAX_MEMORY), str(MAX_SECONDS))
    ran = run(command)
    if ran.code == 0:
        result = json.loads(ran.stdout)
        if error := result.get("error"):
            raise UserError(**error)
        return [DocumentSection(**section) for section in result["sections"]]
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
        # A cut in the first half would leave pieces too short to ask about; a finer mark is better then.
        end = next((end for end in ends if end > longest // 2), longest)
        yield from _piece(text, start, start + end)
        start += end
    yield from _piece(text, start, len(text))


def _piece(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    piece = text[start:end]
    if piece.strip():
        yield start + len(piece) - len(piece.lstrip()), piece.strip()


if __name__ == "__main__":
    _print_sections(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
