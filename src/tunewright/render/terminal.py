"""Results on the terminal: paragraphs, lists, and tables with one line a row."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunewright.render import blocks

_WORD = 10  # characters
_SENTENCE = 100  # characters
_BAR = 40  # characters of the longest bar
_COLOURS = {"": "", "yes": "green", "no": "bold red", "open": "yellow"}


Part = blocks.Section | blocks.Block | RenderableType
"""A part of a result: a document, or something of rich."""


def rendered(*parts: Part) -> Iterator[RenderableType]:
    """Yield parts for the terminal, without titles, figures and details; tables have the numbers."""
    for part in parts:
        if isinstance(part, blocks.Section):
            yield from rendered(*part.blocks)
        elif isinstance(part, blocks.Lead):
            yield part.text
        elif isinstance(part, blocks.Notes):
            yield from () if part.detail else part.lines
        elif isinstance(part, blocks.Table):
            yield from () if part.detail else (_table(part),)
        elif not isinstance(part, blocks.Block):
            yield part


def _table(block: blocks.Table) -> Table:
    # Lines between rows of sentences, which wrap.
    table = Table(show_lines=any(len(cell.text) > _SENTENCE for row in block.rows for cell in row.cells))
    places = [place for place, column in enumerate(block.head) if not column.detail]
    for place in places:
        column = block.head[place]
        name = column.name
        if name.split(" ")[0][1:].islower():  # no acronym
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
        table.add_row(*(_cell(block, row.cells[place], place) for place in places))
    return table


def _cell(block: blocks.Table, cell: blocks.Cell, place: int) -> Text:
    bar = ""
    if block.head[place].of == "bar":
        length = block.length(cell, place)
        bar = ("█" * round(_BAR * length) or "▏" * (length > 0)) + " "
    return Text(bar + cell.text, style=_COLOURS[cell.tone])
