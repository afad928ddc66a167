"""Removal of markdown from a text, so that a judge cannot prefer it."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token

# CommonMark, with the two extensions that models write.
_PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])

_BLOCK_ENDS = {"paragraph_close", "heading_close", "tr_close"}
_CELL_ENDS = {"th_close", "td_close"}


def without_markdown(text: str) -> str:
    """Return the words of ``text`` without headings' marks, emphasis, bullets, rules, fences and table lines.

    Numbers of ordered lists stay: "1986. A good year" is a list to CommonMark. A link keeps its text, an image its
    description. Text without markdown is returned unchanged, apart from outer white space.
    """
    tokens = _PARSER.parse(text)
    if not any(_is_markup(token) for token in tokens):
        return text.strip()
    out: list[str] = []
    for token in tokens:
        if token.type == "list_item_open" and token.info:
            out.append(f"{token.info}{token.markup} ")
        elif token.type == "inline":
            out.append(_inline(token.children or ()))
        elif token.type in {"fence", "code_block", "html_block"}:
            out.append(token.content if token.content.endswith("\n") else f"{token.content}\n")
        elif token.type in _CELL_ENDS:
            out.append(" ")
        elif token.type in _BLOCK_ENDS:
            out.append("\n")
    return "".join(out).strip()


def _is_markup(token: Token) -> bool:
    if token.type == "inline":
        return any(child.type not in {"text", "softbreak", "html_inline"} for child in token.children or ())
    return token.type not in {"paragraph_open", "paragraph_close", "html_block"}


def _inline(tokens: Sequence[Token]) -> str:
    out = []
    for token in tokens:
        if token.type in {"softbreak", "hardbreak"}:
            out.append("\n")
        elif token.type == "image":
            out.append(_inline(token.children or ()))
        else:  # tokens that open or close emphasis or a link have no content
            out.append(token.content)
    return "".join(out)
