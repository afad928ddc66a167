"""Blocks that make up a result. The terminal, the report, Markdown and the studio lay them out.

A terminal is narrow, and a comment is short: both leave out figures and the notes of cells. A
terminal also leaves out blocks that are marked as details.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal


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
    detail: bool = False


Tone = Literal["tuned", "prompting", "plain"]
"""Colour of an arm in figures."""
SERIES: tuple[Tone, ...] = ("tuned", "prompting", "plain")
"""Colours of lines next to each other; further lines have the same colours, dashed."""


@dataclass(frozen=True)
class Bar:
    """One row of a figure: a value with its 95% interval, in the axis's unit."""

    label: str
    value: float
    low: float
    high: float
    text: str
    tone: Tone
    margin: float | None = None
    """The margin of this row only, drawn as a vertical tick."""


@dataclass(frozen=True)
class Figure:
    """Values with their 95% intervals on one axis, a row each. A table has the same numbers."""

    template: ClassVar[str] = "figure.html.j2"
    name: str
    """Prefix of the drawing's ids, unique on the page."""
    title: str
    """The accessible title, read by screen readers."""
    bars: tuple[Bar, ...]
    axis: str
    """The axis's label."""
    limits: tuple[float, float] | None = None
    """Ends of the axis; None fits them to the bars."""
    margin: float | None = None
    """Bars are differences, with lines at zero and at this margin."""
    zero: bool = False
    """Bars are differences, with a line at zero."""
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """One arm: the indices of the bands where it is scored, with values and interval ends."""

    name: str
    tone: Tone
    points: tuple[tuple[int, float, float, float], ...]


@dataclass(frozen=True)
class Bands:
    """Bands of items next to each other, each with all arms from 0 to 100. A table has the same numbers."""

    template: ClassVar[str] = "figure.html.j2"
    name: str
    """Prefix of the drawing's ids, unique on the page."""
    title: str
    """The accessible title, read by screen readers."""
    bands: tuple[str, ...]
    series: tuple[Series, ...]
    axis: str
    """The label of the scores."""
    below: str
    """The label of the bands."""
    caption: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    points: tuple[tuple[float, float], ...]
    tone: Tone = "plain"
    dots: bool = False
    """Mark each point: there are few."""
    joined: bool = True


@dataclass(frozen=True)
class Lines:
    """Lines over one axis. A table has the same numbers."""

    template: ClassVar[str] = "figure.html.j2"
    name: str
    """Prefix of the drawing's ids, unique on the page."""
    title: str
    """The accessible title, read by screen readers."""
    lines: tuple[Line, ...]
    axis: str
    """The label of the values."""
    below: str = "step"
    doubling: bool = False
    """Equal ratios are equally far apart, and each point of the first line has a tick."""
    mark: tuple[float, str] | None = None
    """A place on the axis below that is marked, with its label."""
    band: tuple[float, float] | None = None
    """An interval on the axis below that is shaded."""
    lower: Lines | None = None
    """A lower panel on the same axis."""
    from_zero: bool = True
    """Whether the axis of the values always begins at zero."""
    caption: str = ""


ToneOfResult = Literal["", "yes", "no", "open"]
"""Colour of a result: good, bad or undecided."""


@dataclass(frozen=True)
class Cell:
    """A table cell, with an optional note in small print."""

    text: str
    note: str = ""
    tone: ToneOfResult = ""
    link: str = ""
    """The address of its page in the studio, which other renderers leave out."""


@dataclass(frozen=True)
class Row:
    """A table row, its heading first."""

    cells: tuple[Cell, ...]
    decides: bool = False


@dataclass(frozen=True)
class Column:
    """A table's column of numbers, or of words."""

    name: str
    words: bool = False
    detail: bool = False
    of: Literal["", "alias", "bar", "digest", "row", "tenant"] = ""
    """Kind of thing in the column: the studio links to its page, digests are shown as code, and counts with a bar."""


@dataclass(frozen=True)
class Table:
    """A table; ``label`` is its accessible name, read by screen readers."""

    template: ClassVar[str] = "table.html.j2"
    label: str
    head: tuple[Column, ...]
    rows: tuple[Row, ...]
    kind: Literal["numbers", "lineage"] = "numbers"
    detail: bool = False

    def length(self, cell: Cell, place: int) -> float:
        """Return the length of a count's bar, as a share of the longest bar in its column."""
        counts = [int(each.cells[place].text.replace(",", "")) for each in self.rows]
        return int(cell.text.replace(",", "")) / max(*counts, 1)


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


Drawn = Figure | Bands | Lines
Block = Lead | Notes | Drawn | Table | Items


@dataclass(frozen=True)
class Section:
    """A part of the page, with a linkable heading."""

    anchor: str
    title: str
    blocks: tuple[Block, ...] = field(default=())


def table(
    label: str, head: Iterable[str | Column], rows: Iterable[Row | Iterable[str | Cell]], *, detail: bool = False
) -> Table:
    """Return a table with this accessible name.

    By default the first column has words, and the other columns have numbers. A row may be given as its cells.
    """
    columns = (each if isinstance(each, Column) else Column(each, words=place == 0) for place, each in enumerate(head))
    found = (each if isinstance(each, Row) else row(*each) for each in rows)
    return Table(label, tuple(columns), tuple(found), detail=detail)


def row(*texts: str | Cell, decides: bool = False) -> Row:
    """Return a row of cells; most of them are texts without a note."""
    return Row(tuple(each if isinstance(each, Cell) else Cell(each) for each in texts), decides)


def words(*names: str) -> tuple[str | Column, ...]:
    """Return columns of words."""
    return tuple(Column(name, words=True) for name in names)
