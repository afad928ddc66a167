"""The log of a job: messages and progress as JSON, one object a line, among what the command prints as its result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.text import visible


@dataclass(frozen=True)
class JobProgress:
    """The newest state of the work that a job reported last."""

    done: int
    total: int
    text: str
    """Task, numbers and the time left, in a line."""

    def as_json(self) -> str:
        """Return it for the page's script."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class LogEntry:
    """A line of the file: the text for people, and what it reports."""

    text: str
    progress: JobProgress | None = None
    message: bool = False
    """True for a message of the command; False for a line of its result, or of a log by an earlier release."""

    @property
    def lines(self) -> list[str]:
        """The text's lines, without control characters."""
        return [visible(line) for line in self.text.splitlines()] or [""]


def read_entry(line: str) -> LogEntry:
    """Return what a line of the file says."""
    record = _record(line)
    if record is None:
        return LogEntry(line)
    text = _text(record)
    if isinstance(record.get("task"), str):
        done, total = record.get("done"), record.get("total")
        if isinstance(done, int) and isinstance(total, int) and total > 0:
            return LogEntry(text, JobProgress(min(done, total), total, visible(text)))
    return LogEntry(text, message=True)


def newest(content: bytes) -> tuple[JobProgress | None, str]:
    """Return the newest progress in the end of a log, and the first line of its newest message, or an empty text."""
    progress, message = None, ""
    for line in content.decode(errors="replace").splitlines()[::-1]:
        entry = read_entry(line)
        progress = progress or entry.progress
        if entry.message and not message:
            message = entry.lines[0]
        if progress and message:
            break
    return progress, message


def _record(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("message"), str) and "level" in found else None


def _text(record: dict[str, Any]) -> str:
    text: str = record["message"]
    if "exception" in record:
        return f"{text}\n{record['exception']}"
    if record["level"] == "error":
        return f"Error: {UserError(text, where=record.get('where'), fix=record.get('fix'))}"
    own = record.get("logger") == "tunewright"
    if record["level"] == "warning":
        return f"Warning: {text}" if own else f"Warning of {record.get('logger')}: {text}"
    return text
