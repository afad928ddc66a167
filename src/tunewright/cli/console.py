"""The terminal: a command's result on stdout, as text or as one JSON document; progress and notes on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from tunewright.cli.live import ConsoleReporter, JsonReporter, json_log
from tunewright.cli.stopping import STOPPED, stoppable
from tunewright.core import tracing
from tunewright.core.errors import OUT_OF_MEMORY, UserError, missing_extra
from tunewright.core.io import refused
from tunewright.core.text import visible
from tunewright.render.terminal import Part, rendered
from tunewright.training import distributed

if TYPE_CHECKING:
    from tunewright.api import Project

FAILED = 1
USER_ERROR = 2
MEASURED_NO = 3
CANT_TELL = 4
RESUMES = "what was finished is kept, and the same command resumes from there"
"""State after a stopped command that stores its work piece by piece."""
NOTHING_KEPT = "nothing half done is kept; run the same command again"
"""State after a stopped command that stores its work at the end."""
READER_LEFT = 128 + signal.SIGPIPE
"""Exit code of a command whose reader has closed the pipe, as in ``| head -1``."""
_MEMORY_ERRORS = (
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "cannot map zero-fill pages",
    "failed to map segment",
    "can't start new thread",
)
"""Texts of torch's allocators, of imports, and of Python where it cannot start a thread."""
_LOG_WIDTH = 120
_PIPE_WIDTH = 10**6
"""Columns of a pipe, where no cell may be cut and no row wrapped."""


def _exit_on_closed_pipe() -> NoReturn:
    """End quietly when the reader of stdout or stderr has closed it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())  # so that the interpreter's last flush has somewhere to go
    raise SystemExit(READER_LEFT)


class _Console(Console):
    """A console that escapes control characters in the texts it prints: they may come from anybody's data.

    Strings are escaped before they are laid out, and everything else after it is rendered.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def on_broken_pipe(self) -> None:
        _exit_on_closed_pipe()


class _VisibleFormatter(logging.Formatter):
    """Formats the server's log."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _json_text(document: object, *, one_line: bool = False) -> str:
    """Return JSON: its control characters are within strings, where escapes mean the same."""
    return visible(json.dumps(document, indent=None if one_line else 2, ensure_ascii=False)) + "\n"


def _write(text: str) -> None:
    if sys.stdout.isatty():
        text = visible(text)
    try:
        # Flushed, since `serve` runs on for long after it has printed its address.
        print(text, end="", flush=True)
    except BrokenPipeError:
        _exit_on_closed_pipe()


def plain_text(part: RenderableType) -> str:
    """Return the text that `Session.show` prints in a pipe: no boxes, and one line for each row of a table."""
    if isinstance(part, Table):
        part.box = None
        part.pad_edge = False
        for column in part.columns:
            column.max_width = None
            column._cells = [_on_one_line(cell) for cell in column._cells]
    console = _Console(file=io.StringIO(), width=_PIPE_WIDTH, soft_wrap=True)
    with console.capture() as captured:
        console.print(part, markup=False, highlight=False)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _on_one_line(cell: RenderableType) -> RenderableType:
    """Return a table's cell with its line ends and control characters escaped."""
    if isinstance(cell, Text) and visible(cell.plain) != cell.plain:
        cell = Text(visible(cell.plain), cell.style)
    if isinstance(cell, Text) and "\n" in cell.plain:
        return Text("\\n").join(cell.split("\n", allow_blank=True))
    return cell.replace("\n", "\\n") if isinstance(cell, str) else cell


class Session:
    """A running command: its project, and where its result, notes and progress are printed."""

    def __init__(self, *, as_json: bool, log_json: bool = False) -> None:
        self.as_json = as_json
        self.log_json = log_json
        self.folder = Path()
        self.database_url: str | None = None
        """The database that ``--database-url`` names."""
        self.cluster: str | None = None
        """The Ray cluster that ``--cluster`` names."""
        if logging.lastResort is not None:
            logging.lastResort.setFormatter(_VisibleFormatter())
        # A log has no width, so rows are not wrapped there.
        on_terminal = sys.stderr.isatty()
        self.console = _Console(
            stderr=True,
            soft_wrap=not on_terminal,
            width=None if on_terminal else _LOG_WIDTH,
            quiet=not distributed.is_main_process(),
        )
        self.reporter = JsonReporter(self.console) if log_json else ConsoleReporter(self.console, live=not as_json)

    @cached_property
    def project(self) -> Project:
        """The project in the folder, with what ``--database-url`` and ``--cluster`` name. It must exist."""
        import tunewright

        opened = tunewright.open(self.folder, self.reporter)
        from tunewright.api import Project
        from tunewright.config.project import ProjectFolder

        folder = opened.folder.on_cluster(self.cluster)
        if self.database_url is not None:
            serve = folder.config.serve.model_copy(update={"database_url": self.database_url})
            folder = ProjectFolder(self.folder, folder.config.model_copy(update={"serve": serve}))
        return opened if folder is opened.folder else Project(folder, self.reporter)

    @cached_property
    def unopened(self) -> Project:
        """The folder's API without opening a project, for commands that need none."""
        from tunewright.api import Project
        from tunewright.config.project import ProjectFolder

        return Project(ProjectFolder(self.folder), self.reporter)

    def show(self, document: object, *people: Part, alone: str | None = None) -> None:
        """Print the command's result on stdout: ``document`` with ``--json``, else text, documents and tables.

        Dataclasses and models in ``document`` are printed by their fields, and paths as text.

        ``alone`` is for a result that scripts read line by line: it is the only output on stdout, and ``people`` go to
        stderr.
        """
        assert not hasattr(document, "as_dict"), "its JSON has more than its fields"
        self.reporter.end_loading()
        if not distributed.is_main_process():
            return
        if self.as_json:
            from pydantic_core import to_jsonable_python

            values = to_jsonable_python(document, by_alias=False)
            self.print_out(_json_text(values, one_line=self.log_json))
        elif alone is not None:
            self.print_out(alone)
            self.note(*people)
        elif sys.stdout.isatty():
            for part in rendered(*people):
                _Console().print(part, markup=False, highlight=False)
        else:
            self.print_out("".join(map(plain_text, rendered(*people))))

    def note(self, *people: Part) -> None:
        """Print text and tables on stderr."""
        for part in rendered(*people):
            if self.log_json:
                self.reporter.say(plain_text(part).rstrip())
            else:
                self.console.print(part, markup=False, highlight=False)

    def print_out(self, text: str) -> None:
        """Print text on stdout: unchanged in a pipe, with control characters escaped on a terminal.

        Ends the command if the reader has closed the pipe.
        """
        if distributed.is_main_process():
            _write(text)

    def report_review_status(self, project: Path | None) -> None:
        """Report whether reviewers have accepted a project's dataset version, if it has one."""
        if project is None or not (project / "dataset").is_dir():
            return
        from tunewright.config.project import ProjectFolder
        from tunewright.data.review.report import review_status

        try:
            text = review_status(ProjectFolder(project).dataset)
        except UserError as error:
            text = f"The review status of the current version cannot be read: {error.what}"
        if text is not None:
            self.reporter.say(text)


@contextmanager
def session(
    as_json: bool,
    project: Path | None = None,
    *,
    together: bool = False,
    kept: str = NOTHING_KEPT,
    log_json: bool = False,
    span: str | None = None,
) -> Iterator[Session]:
    """Run a command: a UserError becomes one message and exit code 2, Ctrl-C or SIGTERM a message and exit code 130.

    At the end it reports whether reviewers have accepted the dataset version of ``project``. With ``together``, several
    processes may run the command, one of which prints for all. ``span`` is its name in a trace.
    """
    quiet = not distributed.is_main_process()
    with json_log(quiet=quiet) if log_json else nullcontext():
        current = Session(as_json=as_json, log_json=log_json)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with stoppable(kept, as_json=as_json, log_json=log_json, quiet=quiet), _traced(current, span):
                if together:
                    distributed.init()
                elif distributed.world_size() > 1:
                    what = "This command runs in one process; `train` alone runs in several"
                    raise UserError(what, where="WORLD_SIZE")
                try:
                    yield current
                except typer.Exit:
                    current.report_review_status(project)
                    raise
                current.report_review_status(project)
                if together:
                    distributed.shutdown()
        except BaseException as error:
            failure = _failure(error, kept)
            if failure is None:
                raise
            _fail(current, *failure)
        finally:
            current.reporter.end_loading()
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _traced(current: Session, span: str | None) -> Iterator[None]:
    """Trace the command, if the standard variables of OpenTelemetry ask for it."""
    if not tracing.wanted() or not distributed.is_main_process():
        yield
        return
    warning = tracing.start()
    if warning is not None:
        current.reporter.warn(warning)
    try:
        with nullcontext() if span is None else tracing.command(f"tunewright {span}", ends=(typer.Exit,)):
            yield
    finally:
        tracing.stop()


def _failure(error: BaseException, kept: str) -> tuple[UserError, int] | None:
    """Return message and exit code of an error that users can act on; None for any other."""
    match error:
        case UserError():
            return error, USER_ERROR
        case KeyboardInterrupt():
            return UserError(f"Stopped; {kept}"), STOPPED
        case OSError() | MemoryError() | ImportError() | RuntimeError():
            if isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_ERRORS):
                return OUT_OF_MEMORY, USER_ERROR
            # Disk errors can reach every command; code that knows more about the file has translated its own already.
            message = refused(error) if isinstance(error, OSError) else missing_extra(error)
            if message is not None:
                return message, USER_ERROR
            if isinstance(error, RuntimeError) and distributed.is_peer_failure(error):
                lost = "Another process of this run was lost; the same command resumes from the last checkpoint"
                return UserError(lost), FAILED
    # The tokenizer got no threads: a Rust panic, whose class cannot be imported.
    if "ThreadPoolBuildError" in str(error):
        return UserError("No threads can be started", fix="Raise the limits of memory and of processes."), USER_ERROR
    return None


def _fail(current: Session, error: UserError, code: int) -> NoReturn:
    if not distributed.failed_first():
        raise typer.Exit(code)
    current.console.quiet = False
    if current.as_json:
        _write(_json_text({"error": error.as_dict()}, one_line=current.log_json))
    elif isinstance(current.reporter, JsonReporter) and code == STOPPED:
        current.reporter.say(f"{error}.")  # somebody asked for it
    elif isinstance(current.reporter, JsonReporter):
        current.reporter.error(error.as_dict())
    else:
        text = f"\n{error}." if code == STOPPED else f"Error: {error}"
        current.console.print(text, style="red", markup=False, highlight=False)
    raise typer.Exit(code)
