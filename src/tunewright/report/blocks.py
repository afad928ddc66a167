"""What a section of the page is made of; each kind of block has a template of its own."""

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
    """Sentences under one another."""

    template: ClassVar[str] = "notes.html.j2"
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A drawing, an ``<svg>`` element, and what is said of it."""

    template: ClassVar[str] = "figure.html.j2"
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table, and what stands small under it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table, its heading first."""

    cells: tuple[Cell, ...]
    decides: bool = False


@dataclass(frozen=True)
class Table:
    """A table; ``label`` is what a screen reader calls it."""

    template: ClassVar[str] = "table.html.j2"
    label: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: Literal["numbers", "lineage"] = "numbers"


@dataclass(frozen=True)
class ShownAnswer:
    """An answer cut into pieces, each the same as in the reference, extra, or missing from the answer."""

    name: str
    right: bool
    mark: str
    """``✓ right``, or of graded answers the score."""
    pieces: tuple[tuple[Literal["same", "extra", "missing"], str], ...]


@dataclass(frozen=True)
class ShownItem:
    """A test item as the page lays it out."""

    number: int
    input: str
    reference: str
    answers: tuple[ShownAnswer, ...]


@dataclass(frozen=True)
class Items:
    """Test items, folded away behind a summary if there is one."""

    template: ClassVar[str] = "items.html.j2"
    items: tuple[ShownItem, ...]
    summary: str = ""


Block = Lead | Notes | Figure | Table | Items


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading that can be linked to."""

    anchor: str
    title: str
    blocks: tuple[Block, ...] = field(default=())


def cells(*texts: str | Cell) -> tuple[Cell, ...]:
    """Cells of texts, most of which have no note."""
    return tuple(each if isinstance(each, Cell) else Cell(each) for each in texts)
