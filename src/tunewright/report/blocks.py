"""Blocks that make up a section of the page; each kind has its own template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Lead:
    """A paragraph."""

    template: ClassVar[str] = "lead.html.j2"
    text: str


@dataclass(frozen=True)
class Notes:
    """A list of sentences, one below the other."""

    template: ClassVar[str] = "notes.html.j2"
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A figure (an ``<svg>`` element) with its caption."""

    template: ClassVar[str] = "figure.html.j2"
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell, with an optional note in small print."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A table row, its heading first."""

    cells: tuple[Cell, ...]
    decides: bool = False


@dataclass(frozen=True)
class Table:
    """A table; ``label`` is its accessible name, read by screen readers."""

    template: ClassVar[str] = "table.html.j2"
    label: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: Literal["numbers", "lineage"] = "numbers"


@dataclass(frozen=True)
class ShownAnswer:
    """An answer split into pieces: equal to the reference, extra, or missing from the answer."""

    name: str
    right: bool
    mark: str
    """``✓ right``, or the score of a graded answer."""
    pieces: tuple[tuple[Literal["same", "extra", "missing"], str], ...]


@dataclass(frozen=True)
class ShownItem:
    """A test item as the page presents it."""

    number: int
    input: str
    reference: str
    answers: tuple[ShownAnswer, ...]


@dataclass(frozen=True)
class Items:
    """Test items, collapsed under a summary if there is one."""

    template: ClassVar[str] = "items.html.j2"
    items: tuple[ShownItem, ...]
    summary: str = ""


Block = Lead | Notes | Figure | Table | Items


@dataclass(frozen=True)
class Section:
    """A part of the page, with a linkable heading."""

    anchor: str
    title: str
    blocks: tuple[Block, ...] = field(default=())


def cells(*texts: str | Cell) -> tuple[Cell, ...]:
    """Return cells for texts, most of which have no note."""
    return tuple(each if isinstance(each, Cell) else Cell(each) for each in texts)
