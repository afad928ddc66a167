"""A run's curves drawn with characters: the losses as a plot, the task's metric as a row of bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import plotille
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.text import Text

from tunewright.config import MetricName
from tunewright.metrics import metric_label, score_text

_LOSSES = {
    "loss": ("train loss", "cyan"),
    "pair_loss": ("of the pairs", "blue"),
    "replay_kl": ("replay KL", "yellow"),
    "replay_loss": ("of replay", "yellow"),
    "eval_loss": ("dev loss", "magenta"),
}
_HEIGHT = 10
_MOST_POINTS = 200
_MOST_BARS = 24
_BARS = "▁▂▃▄▅▆▇█"
_FEWEST_LINES = 24  # on a lower terminal the plot would push everything else away


class Curves:
    """What `rich` draws anew as the points come; nothing before the first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.points: dict[str, list[tuple[int, float]]] = {}
        self._drawn: tuple[object, Panel] | None = None

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of the curves at this step."""
        for name, value in numbers.items():
            self.points.setdefault(name, []).append((step, value))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.points or console.height < _FEWEST_LINES:
            return
        state = (options.max_width, {name: len(points) for name, points in self.points.items()})
        if self._drawn is None or self._drawn[0] != state:
            self._drawn = state, self._panel(options.max_width)
        yield self._drawn[1]

    def _panel(self, width: int) -> Panel:
        text = Text.from_ansi(self._plot(width - 24))
        legend = [
            (f"  ━ {label} {self.points[name][-1][1]:.3f}", colour)
            for name, (label, colour) in _LOSSES.items()
            if name in self.points
        ]
        text.append_text(Text.assemble("\n", *legend))
        for name, points in self.points.items():
            if name not in _LOSSES:  # the deciding metric
                values = [value for _, value in points]
                text.append(
                    f"\n  {bars(values)} {_named(name, values[-1])} on dev (best {score_text(name, max(values))})",
                    "green",
                )
        return Panel(text, title="Losses by step", title_align="left", border_style="dim", width=width)

    def _plot(self, width: int) -> str:
        figure = plotille.Figure()
        figure.width, figure.height = width, _HEIGHT
        figure.color_mode = "names"
        figure.linesep = "\n"
        figure.x_label, figure.y_label = "step", "loss"
        figure.x_ticks_fkt = lambda low, _high: f"{low:,.0f}"
        figure.y_ticks_fkt = lambda low, _high: f"{low:.2f}"
        curves = {name: self.points[name] for name in _LOSSES if name in self.points}
        highest = max(value for points in curves.values() for _, value in points)
        figure.set_x_limits(min_=0, max_=self.total)
        figure.set_y_limits(min_=0, max_=highest or 1)
        for name, points in curves.items():
            shown = thinned(points)
            figure.plot([step for step, _ in shown], [value for _, value in shown], lc=_LOSSES[name][1])
        drawn: str = figure.show()
        return drawn


def _named(metric: MetricName, share: float) -> str:
    """A score with its metric's name, which a percentage alone does not say."""
    text = score_text(metric, share)
    return f"{text} {metric_label(metric)}" if text.endswith("%") else text


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points: means of neighbours, where there are more."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def bars(shares: Sequence[float]) -> str:
    """The latest shares from 0 to 1, one character each."""
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares[-_MOST_BARS:])
