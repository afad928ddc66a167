"""The ledger of a sweep: one line for every rung of every trial, never changed or removed.

A line is added by rewriting the file atomically, so a kill leaves the ledger without the line or with all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tunewright.config import MetricName
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import text_lines, write_text
from tunewright.core.log import numbered_lines, parse_line
from tunewright.metrics import score_text

LEDGER = "ledger.jsonl"

Event = Literal["timed", "measured", "finished", "diverged", "stopped", "promoted", "out", "left out", "winner"]
_RESULTS = {"measured", "finished", "diverged"}
_DECISIONS = {"promoted", "out", "left out", "winner"}
_RESTORE = "Restore it, or remove its folder to start the sweep again."


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Head(_Line):
    """The first line: settings of the sweep, its data, and the comparison of trials."""

    schema_version: Literal[1] = 1
    sweep: str
    dataset: str
    base: str
    template: str
    chosen_on: Literal["dev"] = "dev"
    metric: MetricName | None
    """None if no dev rows are answered; then only the dev loss decides."""
    steps: int
    rungs: tuple[int, ...]
    trials: dict[str, dict[str, Any]]
    """Trial settings by name: preset, learning_rate, and inputs, the digest that `tunewright train` looks up."""


class Entry(_Line):
    """An event of a trial. Measurements are of the dev split after ``step`` steps of the trial."""

    time: str
    """UTC, ISO 8601."""
    event: Event
    trial: str
    rung: int
    """Rung index from 1; 0 where an older version timed the first steps."""
    step: int
    steps: int = 0
    """Steps made for this line."""
    seconds: float = 0.0
    """Time spent for this line, including loading and evaluation."""
    training_seconds: float = 0.0
    """The part of the time spent on the steps: a record, which no decision uses."""
    dev_loss: float | None = None
    dev_metric: float | None = None
    why: str | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """A sort key, larger is better: the metric, then the dev loss."""
        assert self.dev_loss is not None
        return (0.0 if self.dev_metric is None else self.dev_metric, -self.dev_loss)


class Ledger:
    """The entries of one sweep, read from its file and appended to."""

    def __init__(self, folder: Path, head: Head) -> None:
        self.head = head
        self.path = folder / LEDGER
        self.entries: list[Entry] = []
        if not self.path.exists():
            self._text = head.model_dump_json() + "\n"
            return
        self._text = self.path.read_text(encoding="utf-8")
        there = None
        for number, line in numbered_lines(self._text.encode()):
            validate = Head.model_validate_json if number == 1 else Entry.model_validate_json
            found = parse_line(validate, line, f"{self.path}:{number}", "Not a valid ledger line", _RESTORE)
            if isinstance(found, Entry):
                self.entries.append(found)
            else:
                there = found
        if there != self.head:
            raise UserError("This is not the ledger of this sweep", where=f"{self.path}:1", fix=_RESTORE)

    @classmethod
    def stored(cls, folder: Path) -> Ledger:
        """Return the ledger in a sweep's folder."""
        path = folder / LEDGER
        try:
            first = text_lines(path.read_text(encoding="utf-8"))[:1]
            return cls(folder, Head.model_validate_json(first[0] if first else ""))
        except FileNotFoundError:
            raise UserError("The sweep has no ledger", where=str(path), fix="Run `tunewright train --sweep`.") from None
        except (ValidationError, UnicodeDecodeError) as error:
            what = f"Not a valid ledger: {' '.join(str(error).splitlines()[:2])}"
            raise UserError(what, where=f"{path}:1", fix=_RESTORE) from None

    def add(self, event: Event, trial: str, rung: int, step: int, **values: Any) -> Entry:
        """Append a line."""
        entry = Entry(
            time=now(),
            event=event,
            trial=trial,
            rung=rung,
            step=step,
            **values,
        )
        self._text += entry.model_dump_json(exclude_defaults=True) + "\n"
        write_text(self.path, self._text)
        self.entries.append(entry)
        return entry

    def decide(self, event: Event, trial: str, rung: int, step: int, why: str | None = None) -> None:
        """Append the decision on a trial at a rung, unless it is the last decision already."""
        decided = [e.event for e in self.entries if (e.trial, e.rung) == (trial, rung) and e.event in _DECISIONS]
        if not decided or decided[-1] != event:
            self.add(event, trial, rung, step, why=why)

    def result(self, trial: str, rung: int) -> Entry | None:
        """Return a trial's result at a rung, if it has one: measured, finished or diverged."""
        found = [e for e in self.entries if (e.trial, e.rung) == (trial, rung) and e.event in _RESULTS]
        return found[-1] if found else None

    def fate(self, trial: str) -> Entry | None:
        """Return the last decision on a trial, if there is one."""
        decided = [e for e in self.entries if e.trial == trial and (e.event in _DECISIONS or e.event == "diverged")]
        return decided[-1] if decided else None

    def steps_of(self, trial: str) -> int:
        """Return the furthest step that a trial has reached."""
        return max((e.step for e in self.entries if e.trial == trial and e.steps), default=0)

    def outcome(self, trial: str) -> str:
        """Return the last decision on a trial in words."""
        entry = self.fate(trial)
        if entry is None:
            return "not reached"
        if entry.event in {"out", "left out", "diverged"}:
            return f"{entry.event} at rung {entry.rung}" + (f": {entry.why}" if entry.why else "")
        return "the winner" if entry.event == "winner" else entry.event

    @property
    def seconds(self) -> float:
        """The time spent on the sweep so far."""
        return sum(entry.seconds for entry in self.entries)


def measured_text(entry: Entry, metric: MetricName | None) -> str:
    """Return a trial's dev result at a rung, such as ``62.5%, loss 0.512``."""
    if entry.dev_loss is None:
        return "diverged"
    score = f"{score_text(metric, entry.dev_metric)}, " if metric and entry.dev_metric is not None else ""
    return f"{score}loss {entry.dev_loss:.3f}"
