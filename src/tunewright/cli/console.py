"""The terminal: a command's result on stdout, as text or as one JSON document; progress and notes on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tunewright.cli.stopping import STOPPED, stoppable
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.training import distributed

if TYPE_CHECKING:
    from tunewright.cli.curves import Curves

FAILED = 1
USER_ERROR = 2
MEASURED_NO = 3
CANT_TELL = 4
RESUMES = "what was finished is kept, and the same command resumes from there"
"""Of commands whose work is kept piece by piece."""
READER_LEFT = 128 + signal.SIGPIPE
"""As shells report a command whose output nobody reads any more, such as in ``| head -1``."""
_LOG_WIDTH = 120
_PIPE_WIDTH = 10**6
"""Columns of a pipe, where no cell may be cut and no row broken."""


def _leave_reader() -> NoReturn:
    """End quietly when the reader of stdout or stderr has closed it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())  # so that the interpreter's last flush has somewhere to go
    raise SystemExit(READER_LEFT)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        _leave_reader()


def _write(text: str) -> None:
    try:
        # Flushed, since `serve` runs on for long after it has printed its address.
        print(text, end="", flush=True)
    except BrokenPipeError:
        _leave_reader()


def plain_text(part: RenderableType) -> str:
    """Return what `Session.show` prints in a pipe: no boxes, and one line for each row of a table."""
    if isinstance(part, Table):
        part.box = None
        part.pad_edge = False
        for column in part.columns:
            column._cells = [_on_one_line(cell) for cell in column._cells]
    console = Console(file=io.StringIO(), width=_PIPE_WIDTH, soft_wrap=True)
    with console.capture() as captured:
        console.print(part, markup=False, highlight=False)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _on_one_line(cell: RenderableType) -> RenderableType:
    """Return a table's cell with its line ends escaped."""
    if isinstance(cell, Text) and "\n" in cell.plain:
        return Text("\\n").join(cell.split("\n", allow_blank=True))
    return cell.replace("\n", "\\n") if isinstance(cell, str) else cell


class _BarTask:
    """A bar, and curves above it once there are points to draw."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self.progress = progress
        self.task_id = progress.add_task(title, total=total, note="")
        self.total = total
        self.curves: Curves | None = None

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.progress.update(self.task_id, advance=steps, note=note)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.curves is None:
            from tunewright.cli.curves import Curves

            self.curves = Curves(self.total)
        self.curves.add(step, numbers)

    def __rich__(self) -> RenderableType:
        return self.progress if self.curves is None else Group(self.curves, self.progress)


class _LineTask:
    """Progress where there is no terminal to draw on (a log, CI): a line every quarter of a minute."""

    every_s = 15.0
    short_s = 2.0  # work done sooner than this is not worth a line
    burst_s = 1.0  # advances this soon after the first one belong to it

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self.console = console
        self.title = title
        self.total = total
        self.unit = unit
        self.done = self.first = 0
        self.began = self.told = self.since = time.monotonic()
        self.first_at: float | None = None

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        now = time.monotonic()
        self.first_at = now if self.first_at is None else self.first_at
        if now - self.first_at < self.burst_s:
            # What a resumed task had done already, or a whole batch after warming up: it does not show the speed.
            self.first, self.since = self.done, now
        finished = self.done == self.total and now - self.began > self.short_s
        if now - self.told < self.every_s and not finished:
            return
        self.told = now
        parts = [f"{self.title}: {self.done}/{self.total} {self.unit}", note, self._left(now)]
        self.console.print(", ".join(part for part in parts if part))

    def _left(self, now: float) -> str:
        """Return the time left by the speed since the first advances, or nothing before there are later ones."""
        if self.done == self.total:
            return "0 s left"
        if self.done == self.first:
            return ""
        return f"{_duration((now - self.since) / (self.done - self.first) * (self.total - self.done))} left"

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Nothing is drawn on a log: each evaluation says its numbers itself."""


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class ConsoleReporter:
    """Reports to the terminal, on stderr."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: Progress | None = None

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self.console.print(f"Warning: {message}", style="yellow", markup=False, highlight=False)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        if not self.console.is_terminal:
            yield _LineTask(self.console, title, total, unit)
            return
        if self.bars is not None:  # within another task: a bar below its, gone when it is done
            bar = _BarTask(self.bars, title, total)
            yield bar
            self.bars.remove_task(bar.task_id)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self.bars = Progress(*columns, console=self.console)
        bar = _BarTask(self.bars, title, total)
        try:
            with Live(bar, console=self.console, refresh_per_second=4):
                yield bar
        finally:
            self.bars = None


class Session:
    """One command under way."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # It says at each import that a kernel of the hub, which nothing here uses, is not installed.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        # A log has no width of its own: rows are not to be broken there.
        on_terminal = sys.stderr.isatty()
        self.console = _Console(
            stderr=True,
            soft_wrap=not on_terminal,
            width=None if on_terminal else _LOG_WIDTH,
            quiet=not distributed.is_main(),
        )
        self.reporter = ConsoleReporter(self.console)

    def show(self, document: dict[str, Any], *people: RenderableType, alone: str | None = None) -> None:
        """Print the command's result on stdout: ``document`` with ``--json``, else text and tables for people.

        ``alone`` is for a result that scripts read line by line: it is all of stdout, and ``people`` go to stderr.
        """
        if not distributed.is_main():
            return
        if self.as_json:
            self.print_out(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        elif alone is not None:
            self.print_out(alone)
            for part in people:
                self.console.print(part, markup=False, highlight=False)
        elif sys.stdout.isatty():
            for part in people:
                _Console().print(part, markup=False, highlight=False)
        else:
            self.print_out("".join(map(plain_text, people)))

    def print_out(self, text: str) -> None:
        """Print on stdout exactly this text. Ends the command where the reader of a pipe has closed it."""
        if distributed.is_main():
            _write(text)

    def tell_standing(self, project: Path | None) -> None:
        """Whether reviewers have accepted a project's current dataset version, if it has one."""
        if project is None or not (project / "dataset").is_dir():
            return
        from tunewright.config.project import ProjectFolder
        from tunewright.data.review.status import standing

        try:
            told = standing(ProjectFolder(project).dataset)
        except UserError as error:
            told = f"Whether the current version is accepted cannot be told: {error.what}"
        if told is not None:
            self.reporter.say(told)


@contextmanager
def session(
    as_json: bool,
    project: Path | None = None,
    *,
    together: bool = False,
    kept: str = "nothing half done is kept; run the same command again",
) -> Iterator[Session]:
    """Run a command: a UserError becomes one clear message and exit code 2, a stop by Ctrl-C or SIGTERM one and 130.

    Of the project it says at the end whether reviewers have accepted the current dataset version. With ``together``
    the command may run in several processes at once, one of which speaks for all. ``kept`` says what a stopped command
    leaves behind and how to resume it.
    """
    current = Session(as_json=as_json)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with stoppable(kept, as_json=as_json, quiet=not distributed.is_main()):
            yield from _run(current, project, together=together)
    except UserError as error:
        _fail(current, error.as_dict(), f"Error: {error}", USER_ERROR)
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        what = "another process of this run was lost; the same command goes on from the last checkpoint"
        _fail(current, {"what": what, "where": None, "fix": None}, f"Error: {what}", FAILED)
    except KeyboardInterrupt:
        what = f"stopped; {kept}"
        _fail(current, {"what": what, "where": None, "fix": None}, f"\n{what[0].upper()}{what[1:]}.", STOPPED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(current: Session, project: Path | None, *, together: bool) -> Iterator[Session]:
    if together:
        distributed.join()
    elif distributed.count() > 1:
        raise UserError("this command runs in one process; `train` alone runs in several", where="WORLD_SIZE")
    try:
        yield current
    except typer.Exit:
        current.tell_standing(project)
        raise
    current.tell_standing(project)
    if together:
        distributed.leave()


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _fail(current: Session, document: dict[str, Any], text: str, code: int) -> NoReturn:
    if not distributed.first_to_fail():
        raise typer.Exit(code)
    current.console.quiet = False
    if current.as_json:
        _write(json.dumps({"error": document}, indent=2, ensure_ascii=False) + "\n")
    else:
        current.console.print(text, style="red", markup=False, highlight=False)
    raise typer.Exit(code)
