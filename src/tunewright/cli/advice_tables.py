"""Advice as people read it."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunewright.advisor.result import AdviceResult
from tunewright.advisor.signals import Signals
from tunewright.advisor.wording import changes, expectations, measured
from tunewright.cli.tables import prompting_tables
from tunewright.evidence.base import Interval, Score
from tunewright.metrics import axis_label

_COLOURS = {"fine-tune": "bold green", "prompt": "bold cyan", "retrieve": "bold cyan", "can't tell": "bold yellow"}
_WIDTH = 41


def advice_tables(result: AdviceResult) -> list[RenderableType]:
    """Arms, the score over k beside the pilot's, the four signals, and the answer with what would change it."""
    signals, decision = result.signals, result.decision
    answer = Text(f"Answer: {decision.answer}", style=_COLOURS[decision.answer])
    if decision.arm is not None:
        answer.append(f" ({decision.arm})")
    lines = [decision.why, "What would change this answer:", *(f"  - {c}" for c in changes(signals, decision))]
    lines += [f"Few pairs: {line}" for line in expectations(signals)]
    answer.append("".join(f"\n  {line}" for line in lines), style="default")
    return [
        *prompting_tables(signals.prompting),
        scores_plot(signals),
        signals_table(signals),
        answer,
        f"Advice: {result.file}",
    ]


def signals_table(signals: Signals) -> Table:
    """What was measured, a row for each signal."""
    table = Table(title="Signals", title_justify="left", show_lines=True)
    table.add_column("signal", no_wrap=True)
    table.add_column("measured", overflow="fold")
    for name, told in measured(signals).items():
        table.add_row(name, Text(told))
    return table


def scores_plot(signals: Signals) -> Table:
    """Scores with their intervals on one axis: each kind of demonstrations over k, and the pilots."""
    rows: list[tuple[str, str, Score]] = [
        (curve.name, str(point.shots), point.score) for curve in signals.context.curves for point in curve.points
    ]
    if signals.gain is not None:
        rows += [("pilot", f"{part.rows:,} rows", part.score) for part in signals.gain.parts]
    top = max((score.interval.high for _, _, score in rows), default=1.0)
    table = Table(title=f"{axis_label(signals.metric)} over k, with 95% intervals", title_justify="left")
    for name in ("demonstrations", "k", f"0 to {100 * top:.0f}", ""):
        table.add_column(name, justify="right" if name == "k" else "left", no_wrap=True)
    before = None
    for kind, shots, score in rows:
        if before not in (None, kind):
            table.add_section()
        table.add_row("" if kind == before else kind, shots, bar(score, top), f"{100 * score.value:.1f}")
        before = kind
    return table


def bar(score: Score, top: float) -> str:
    """An interval with its value on an axis from 0 to ``top``, drawn with characters: ``    ├──●───┤``."""

    def place(share: float) -> int:
        return round(share / (top or 1.0) * (_WIDTH - 1))

    interval: Interval = score.interval
    line = [" "] * _WIDTH
    for column in range(place(interval.low), place(interval.high) + 1):
        line[column] = "─"
    line[place(interval.low)] = "├"
    line[place(interval.high)] = "┤"
    line[place(score.value)] = "●"
    return "".join(line).rstrip()
