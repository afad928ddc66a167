"""Results on the terminal: paragraphs, lists, and tables with one line a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tunewright.render import blocks

if TYPE_CHECKING:
    from rich.console import RenderableType

_WORD = 10  # characters
_COLOURS = {"": "", "yes": "green", "no": "bold red", "open": "yellow"}


def rendered(*sections: blocks.Section) -> list[RenderableType]:
    """Return sections for the terminal. Titles, figures and details are left out; tables have the numbers."""
    parts: list[RenderableType] = []
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, blocks.Lead):
            parts.append(block.text)
        elif isinstance(block, blocks.Notes) and not block.detail:
            parts += block.lines
        elif isinstance(block, blocks.Table) and not block.detail:
            parts.append(_table(block))
    return parts


def _table(block: blocks.Table) -> Table:
    table = Table()
    places = [place for place, column in enumerate(block.head) if not column.detail]
    for place in places:
        column = block.head[place]
        name = column.name
        if name[1:2].islower():  # no acronym
            name = name[0].lower() + name[1:]
        spaced = any(" " in row.cells[place].text for row in block.rows)
        # Words wrap at their blanks, a number never does, and a heading only if it has several words.
        whole = not spaced if column.words else spaced or " " not in name
        texts = [name, *(row.cells[place].text for row in block.rows)]
        table.add_column(
            name,
            # A word is broken only if it is longer than a narrow terminal has room for.
            min_width=min(_WORD, max(len(word) for text in texts for word in text.split() or [""])),
            justify="left" if column.words else "right",
            no_wrap=whole,
            overflow="ellipsis" if whole else "fold",
        )
    for row in block.rows:
        cells = (row.cells[place] for place in places)
        table.add_row(*(Text(cell.text, style=_COLOURS[cell.tone]) for cell in cells))
    return table
