"""Blocks as GitHub Markdown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from tunewright.render.blocks import Block, Drawn, Lead, Notes, Section, Table

_MARKUP = re.compile(r"[\\`*_\[\]<>|~&#@$]")
_OPENS_A_LIST = re.compile(r"^(\d+(?=[.)](\s|$))|(?=[-+]))(.)")
# GitHub detects mentions, issues, addresses and emojis in the rendered text, where backslash escapes no longer
# show.
_REFERS = re.compile(r"[@#](?=\w)|\bGH-(?=\d)|:(?=//|[a-z+-][\w+-]*:)|\bwww\.(?=\w)", re.IGNORECASE)
_BREAK = "\u200b"  # zero width


def plain(text: str) -> str:
    """Return ``text`` on one line, escaped so that Markdown shows it literally.

    Markup is escaped. A zero-width space keeps GitHub from detecting a mention, an issue or an address. Control
    characters, which could reverse the line's direction, become the replacement character.
    """
    line = " ".join(text.split())
    line = "".join("\ufffd" if unicodedata.category(each) in {"Cc", "Cf", "Cs"} else each for each in line)
    line = _MARKUP.sub(r"\\\g<0>", _REFERS.sub(rf"\g<0>{_BREAK}", line))
    return _OPENS_A_LIST.sub(r"\1\\\3", line)


def bullets(lines: Sequence[str]) -> str:
    """Return a list of lines that are Markdown already."""
    return "\n".join(f"- {line}" for line in lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[bool] = ()) -> str:
    """Return a table of cells that are Markdown already.

    Columns of ``words`` are aligned left, by default the first one; other columns are aligned right.
    """
    left = words or [place == 0 for place in range(len(head))]
    marks = ["---" if each else "---:" for each in left]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def markdown(*parts: Section | Block) -> list[str]:
    """Return the paragraphs, lists and tables of sections and blocks; a deciding row is bold."""
    found = [block for part in parts for block in (part.blocks if isinstance(part, Section) else (part,))]
    return [_block(block) for block in found if not isinstance(block, Drawn)]


def _block(block: Block) -> str:
    match block:
        case Lead(text):
            return plain(text)
        case Notes(lines):
            return bullets([plain(line) for line in lines])
        case Table():
            words = [column.words for column in block.head]
            rows = [[plain(cell.text) for cell in row.cells] for row in block.rows]
            for row, cells in zip(block.rows, rows, strict=True):
                cells[0] = f"**{cells[0]}**" if row.decides else cells[0]
            return table([plain(column.name) for column in block.head], rows, words)
        case _:
            raise AssertionError(f"no Markdown for {type(block).__name__}")
