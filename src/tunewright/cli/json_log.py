"""Messages, progress and errors on stderr as JSON, one object a line, for collectors of containers' logs."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import typer
from rich.console import Console

from tunewright.cli.live import ConsoleReporter, LineTask
from tunewright.core import tracing
from tunewright.core.text import visible

log = logging.getLogger("tunewright")


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
        fields: dict[str, object] = {"task": self.title, "done": self.done, "total": self.total, "unit": self.unit}
        if self._measured:
            fields["measured"], self._measured = self._measured, {}
        log.info(text, extra={"fields": fields})


class JsonReporter(ConsoleReporter):
    """Reports to the log of :func:`json_log`; questions are asked at the terminal, if there is one."""

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
