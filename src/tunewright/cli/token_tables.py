"""Rows and their tokens as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunewright.chat.view import TokenView
from tunewright.data.versions import Member
from tunewright.training.lengths import PERCENTILES, LengthReport

_BAR = 40
_MOST_NAMED = 20


def row_document(member: Member, counts: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return a row as JSON, with the rows of its cluster and those of them with its output where they are counted."""
    return {
        **({"cluster_rows": counts[0], "same_output": counts[1]} if counts else {}),
        "key": member.key,
        "split": member.split,
        "cluster": member.cluster,
        "groups": list(member.groups),
        "mixed": member.mixed,
        "messages": [m.as_dict() for m in member.example.messages],
    }


def row_heading(member: Member, counts: tuple[int, int] | None = None) -> str:
    """Which row it is, and where it belongs."""
    more = ["generic mix-in"] if member.mixed else list(member.groups)
    if counts is not None and counts[0] > 1:
        more = [f"of {counts[0]:,} rows, {counts[1]:,} with this output", *more]
    return ", ".join([f"row {member.key[:12]}, split {member.split}, cluster {member.cluster[:12]}", *more])


def conversation_text(member: Member) -> Text:
    """The turns, one after the other."""
    text = Text()
    for message in member.example.messages:
        weight = "" if message.weight else " (weight 0: not trained)"
        text.append(f"{message.role}{weight}\n", style="bold")
        text.append(f"{''.join(map(harmless, message.content))}\n")
    return text


def tokens_text(tokens: Sequence[TokenView]) -> Text:
    """Tokens with a space between them, their own spaces as · and line ends as ⏎; what is trained, in ⟦ ⟧ and green."""
    text = Text()
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        text.append("⟦ " if trained else "", style="green")
        for token in run:
            style = "bold magenta" if token.control else "green" if trained else "default"
            text.append(_visible(token.text), style=f"{style} underline" if trained else style)
            text.append("\n" if "\n" in token.text else " ")
        text.append("⟧ " if trained else "", style="green")
    trained_count = sum(token.trained for token in tokens)
    text.append(f"\n{len(tokens):,} tokens, {trained_count:,} trained", style="dim")
    return text


def _visible(text: str) -> str:
    shown = text.replace(" ", "·").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
    return "".join(map(harmless, shown))


def harmless(character: str) -> str:
    """Control and format characters by their code: they could not be seen, or would play tricks on the terminal."""
    return character if character.isprintable() or character in "\n\t" else f"<U+{ord(character):04X}>"


def check_tables(report: LengthReport, *, dropping: bool) -> list[RenderableType]:
    """Percentiles by split, a histogram, and what is wrong."""
    table = Table(title=f"Rows in tokens, version {report.version[:12]}, {report.base}", title_justify="left")
    for name in ("split", "rows", *map(_percentile, PERCENTILES), "tokens", "trained"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for split in report.splits:
        lengths = (f"{split.percentiles[p]:,}" for p in PERCENTILES)
        share = f"{split.trained / split.tokens:.1%}" if split.tokens else "-"
        table.add_row(split.split, f"{split.rows:,}", *lengths, f"{split.tokens:,}", share)
    parts: list[RenderableType] = [table, *([_histogram(report)] if report.histogram else [])]
    if report.look_alikes:
        parts.append(f"Text that looks like a control token, and stays text: in {report.look_alikes:,} examples.")
    if report.too_long:
        what = "left out of the training" if dropping else "training would refuse them (train.on_overlength: error)"
        parts.append(f"Over {report.max_length:,} tokens: {len(report.too_long):,}; {what}, test rows apart:")
        parts += _named([f"{row['split']}: {row['name']}: {row['tokens']:,} tokens" for row in report.too_long])
    if report.faults:
        parts.append(f"Cannot be trained on: {len(report.faults):,}:")
        parts += _named(report.faults)
    if not report.too_long and not report.faults:
        parts.append(
            f"Every row is whole and within {report.max_length:,} tokens, and ends with its end token, trained."
        )
    return parts


def _percentile(percent: int) -> str:
    return {0: "shortest", 50: "median", 100: "longest"}.get(percent, f"{percent}%")


def _histogram(report: LengthReport) -> Text:
    most = max(one.rows for one in report.histogram)
    width = len(f"{report.histogram[-1].last:,}")
    text = Text()
    for one in report.histogram:
        bar = "█" * round(_BAR * one.rows / most) or "▏" * (one.rows > 0)
        text.append(f"{one.first:>{width},} to {one.last:>{width},}  ")
        text.append(bar, style="red" if one.first > report.max_length else "cyan")
        text.append(f" {one.rows:,}\n")
    text.rstrip()
    return text


def _named(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - _MOST_NAMED} more: --json lists all"] if len(lines) > _MOST_NAMED else []
    return [*(f"  {line}" for line in lines[:_MOST_NAMED]), *more]
