"""Messages and progress on stderr: bars, curves and stages on a terminal, else lines or JSON."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tunewright.core import tracing
from tunewright.core.progress import Pace, Task, downsample
from tunewright.core.text import visible

log = logging.getLogger("tunewright")

StageDone = Callable[[str, bool, str], None]
"""Takes a finished stage's name, whether anything was computed (False: found done), and its result in words."""

_SOONEST_S = 10.0
"""Elapsed time before a pipeline's time left is shown."""
_LEAST_WEIGHT = 0.03
"""Share of the pipeline that must be done before its time left is shown."""
_LOSSES = {
    "loss": ("train loss", "cyan"),
    "pair_loss": ("of the pairs", "blue"),
    "replay_kl": ("replay KL", "yellow"),
    "replay_loss": ("of replay", "yellow"),
    "eval_loss": ("dev loss", "magenta"),
}
_HEIGHT = 10
_MOST_BARS = 24
_BARS = "▁▂▃▄▅▆▇█"
_FEWEST_LINES = 24  # on a terminal with fewer rows, the plot would leave no room for other output
_STAGES_LINES = 10  # further rows needed when a pipeline's stages are listed above


class Curves:
    """A plot that grows with its points; nothing is drawn before the first."""

    def __init__(self, total: int, fewest_lines: int = _FEWEST_LINES) -> None:
        self.total = total
        self.fewest_lines = fewest_lines
        self.points: dict[str, list[tuple[int, float]]] = {}
        self._drawn: tuple[object, Panel] | None = None

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add points of the curves at this step."""
        for name, value in numbers.items():
            self.points.setdefault(name, []).append((step, value))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.points or console.height < self.fewest_lines:
            return
        state = (options.max_width, {name: len(points) for name, points in self.points.items()})
        if self._drawn is None or self._drawn[0] != state:
            self._drawn = state, self._panel(options.max_width)
        yield self._drawn[1]

    def _panel(self, width: int) -> Panel:
        from tunewright.metrics import metric_label, score_text

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
                newest, best = score_text(name, values[-1]), score_text(name, max(values))
                if newest.endswith("%"):  # a percentage alone does not show the total
                    newest += f" {metric_label(name)}"
                text.append(f"\n  {bars(values)} {newest} on dev (best {best})", "green")
        return Panel(text, title="Losses by step", title_align="left", border_style="dim", width=width)

    def _plot(self, width: int) -> str:
        import plotille

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
            shown = downsample(points)
            figure.plot([step for step, _ in shown], [value for _, value in shown], lc=_LOSSES[name][1])
        drawn: str = figure.show()
        return drawn


def bars(shares: Sequence[float]) -> str:
    """Return the latest shares from 0 to 1, one character each."""
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares[-_MOST_BARS:])


class _BarTask:
    """A bar, and curves above it once there are points to draw."""

    def __init__(self, screen: _Screen, title: str, total: int) -> None:
        self.screen = screen
        self.pace = Pace(total)
        self.task_id = screen.bars.add_task(title, total=total, note="", pace=self.pace)
        self.total = total

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        self.pace.advance(steps, kept=kept)
        self.screen.bars.update(self.task_id, advance=steps, note=note)
        if kept and self.screen.current is not None and self.screen.bars.tasks[0].id == self.task_id:
            self.screen.current.kept += steps / self.total

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.screen.curves is None:
            more = _STAGES_LINES if self.screen.stages else 0
            self.screen.curves = Curves(self.total, _FEWEST_LINES + more)
        self.screen.curves.add(step, numbers)


@dataclass
class _Stage:
    name: str
    weight: float
    began: float | None = None
    ended: float | None = None
    computed: bool = True
    kept: float = 0.0
    """Share of its work that an earlier run had done."""
    result: str = ""

    @property
    def weight_here(self) -> float:
        """Its share of the time in this process."""
        return self.weight * max(1 - self.kept, 0.0)


class _Screen:
    """The display at the bottom of the terminal: stages, curves and bars."""

    def __init__(self, console: Console, stages: Mapping[str, float]) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self.bars = Progress(*columns, console=console)
        self.curves: Curves | None = None
        self.stages = [_Stage(name, weight) for name, weight in stages.items()]
        self._began = time.monotonic()
        if self.stages:
            self.stages[0].began = self._began

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._stages_table()] if self.stages else []
        parts += [self.curves] if self.curves is not None else []
        parts += [self.bars] if self.bars.tasks else []
        if not self.stages and (left := self.seconds_left()):
            parts.append(Text(f"about {_duration(left)} left"))
        return Group(*parts)

    @property
    def current(self) -> _Stage | None:
        """The stage in progress."""
        return next((stage for stage in self.stages if stage.ended is None), None)

    def done(self, name: str, computed: bool, result: str) -> None:
        """Mark a stage as done; the next one begins."""
        now = time.monotonic()
        place = [stage.name for stage in self.stages].index(name)
        stage = self.stages[place]
        stage.ended, stage.computed, stage.result = now, computed, result
        if place + 1 < len(self.stages):
            self.stages[place + 1].began = now

    def seconds_left(self) -> float | None:
        """Return an estimate for the rest of the pipeline or task, or None while too little has been measured.

        Weights are a pipeline's usual shares of the time. The stages so far give the time per unit
        of weight; stages and parts of them that were already done are ignored.
        """
        now, current = time.monotonic(), self.current
        pace: Pace | None = self.bars.tasks[0].fields["pace"] if self.bars.tasks else None
        left_here = pace.left() if pace else None
        if current is None or current.began is None:
            return None if self.stages else left_here
        here = pace.total - pace.kept if pace else 0
        finished = (pace.done - pace.kept) / here if pace and here else 0.0
        took = [(s.ended - s.began, s.weight_here) for s in self.stages if s.ended and s.began and s.computed]
        spent = sum(seconds for seconds, _ in took) + now - current.began
        weight = sum(share for _, share in took) + current.weight_here * finished
        if spent < _SOONEST_S or weight < _LEAST_WEIGHT * sum(stage.weight for stage in self.stages):
            return None
        later = sum(stage.weight for stage in self.stages if stage.began is None)
        rest = current.weight_here * (1 - finished) * spent / weight if left_here is None else left_here
        return rest + later * spent / weight

    def _stages_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        now = time.monotonic()
        for stage in self.stages:
            if stage.ended is not None and stage.began is not None:
                mark, style = ("✓", "green") if stage.computed else ("=", "dim")
                text, took = stage.result, _duration(stage.ended - stage.began) if stage.computed else "unchanged"
            elif stage.began is not None:
                mark, style, took = "●", "bold cyan", _duration(now - stage.began)
                text = self.bars.tasks[-1].description if self.bars.tasks else "loading"
            else:
                mark, style, text, took = "·", "dim", "", ""
            table.add_row(Text(mark, style), Text(stage.name, style), Text(took), Text(text, overflow="ellipsis"))
        left = self.seconds_left()
        ending = "" if left is None else f"about {_duration(left)} left"
        table.add_row("", Text("total"), Text(_duration(now - self._began)), Text(ending))
        return table


class LineTask:
    """Progress for a log or CI: a line every 15 seconds."""

    every_s = 15.0
    short_s = 2.0  # shorter work is not worth a line

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self.console = console
        self.title = title
        self.unit = unit
        self.pace = Pace(total)
        self.began = self.printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        self.pace.advance(steps, kept=kept)
        now, done, total, left = time.monotonic(), self.pace.done, self.pace.total, self.pace.left()
        finished = steps > 0 and done == total and now - self.began > self.short_s
        if now - self.printed < self.every_s and not finished:
            return
        self.printed = now
        parts = [f"{self.title}: {done}/{total} {self.unit}", note, "" if left is None else f"{_duration(left)} left"]
        self._print(", ".join(part for part in parts if part))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Draw nothing: in a log, each evaluation reports its numbers itself."""


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class ConsoleReporter:
    """Reports to the terminal, on stderr: bars in place where it can redraw (and ``live``), else lines as in a log."""

    line_task: type[LineTask] = LineTask
    """The kind of task when progress is printed as lines."""

    def __init__(self, console: Console, *, live: bool = True) -> None:
        self.console = console
        self._live = live and console.is_terminal and not console.is_dumb_terminal
        self._screen: _Screen | None = None
        self._display: Live | None = None
        self._loading = console.status("Loading torch and the base")

    def begin_loading(self) -> None:
        """Say on a terminal that torch and the base are loaded, until the first display or `end_loading`."""
        if self._live:
            self._loading.start()

    def end_loading(self) -> None:
        """Remove what `begin_loading` shows, if it is there."""
        self._loading.stop()

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self.console.print(f"Warning: {message}", style="yellow", markup=False, highlight=False)

    @contextmanager
    def pipeline(self, stages: Mapping[str, float]) -> Iterator[StageDone | None]:
        """Show stages, the current task and the time left in one view; yield a function to call after each.

        ``stages`` have their usual shares of the time. For progress as lines, it yields None.
        """
        if not self._live:
            yield None
            return
        with self._drawn(stages) as screen:
            yield screen.done

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        with (
            tracing.span(title, {"tunewright.total": total, "tunewright.unit": unit}),
            self._task(title, total, unit) as task,
        ):
            yield task

    @contextmanager
    def _task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        if not self._live:
            yield self.line_task(self.console, title, total, unit)
        elif self._screen is None:
            with self._drawn({}) as screen:
                yield _BarTask(screen, title, total)
        else:  # within another task or a pipeline: a bar below, gone when it is done
            screen = self._screen
            bar, curves = _BarTask(screen, title, total), screen.curves
            try:
                yield bar
            finally:
                screen.bars.remove_task(bar.task_id)
                screen.curves = curves

    @contextmanager
    def _drawn(self, stages: Mapping[str, float]) -> Iterator[_Screen]:
        self.end_loading()
        self._screen = _Screen(self.console, stages)
        try:
            with Live(self._screen, console=self.console, refresh_per_second=4) as self._display:
                yield self._screen
        finally:
            self._screen = self._display = None


# As JSON, one object a line, for collectors of containers' logs


def json_line(level: str, message: str, *, at: float, logger: str = "tunewright", **fields: object) -> str:
    """Return a line of the log; ``at`` is the time in seconds since 1970."""
    time_text = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
    record = {"time": time_text, "level": level, "logger": logger, "message": message, **fields, **tracing.ids()}
    return visible(json.dumps(record, ensure_ascii=False, default=str))


class JsonFormatter(logging.Formatter):
    """Formats records of any library as lines of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        level = record.levelname.lower()
        return json_line(level, record.getMessage(), at=record.created, logger=record.name, **fields)


@contextmanager
def json_log(*, quiet: bool) -> Iterator[None]:
    """Write every log record, Python warning and unexpected exception to stderr as JSON while the block runs.

    ``quiet`` leaves out messages and progress, since another process reports for this one.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root, level, hook = logging.getLogger(), log.level, sys.excepthook
    root.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _log_exception
    try:
        yield
    except typer.Exit:
        sys.excepthook = hook
        raise
    else:
        sys.excepthook = hook
    finally:
        # After another exception the hook stays, for the interpreter reports it after this block.
        logging.captureWarnings(False)
        log.setLevel(level)
        root.removeHandler(handler)


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(logging.Formatter().formatException((kind, error, trace)))
    message = f"{kind.__name__}: {error}"
    sys.stderr.write(json_line("critical", message, at=time.time(), exception=text) + "\n")


class _JsonTask(LineTask):
    """Progress with its numbers in fields, and the values measured since the last line."""

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        super().__init__(console, title, total, unit)
        self._measured: dict[str, float] = {}

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        self._measured |= {"step": step, **numbers}

    def _print(self, text: str) -> None:
        done, total = self.pace.done, self.pace.total
        fields: dict[str, object] = {"task": self.title, "done": done, "total": total, "unit": self.unit}
        if self._measured:
            fields["measured"], self._measured = self._measured, {}
        log.info(text, extra={"fields": fields})


class JsonReporter(ConsoleReporter):
    """Reports to the log of :func:`json_log`; questions are asked at the terminal."""

    line_task = _JsonTask

    def __init__(self, console: Console) -> None:
        super().__init__(console, live=False)

    def say(self, message: str) -> None:
        log.info(message)

    def warn(self, message: str) -> None:
        log.warning(message)

    def error(self, document: Mapping[str, Any]) -> None:
        """Report the error that ends the command, with its place and its fix."""
        log.error(document["what"], extra={"fields": {"where": document["where"], "fix": document["fix"]}})
