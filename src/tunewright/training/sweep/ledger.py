"""The ledger of a sweep: every trial's every rung, one line each, nothing ever changed or removed.

A line is added by writing the file whole, so that a kill leaves the ledger as it was or with the line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tunewright.config import MetricName
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import text_lines, write_text

LEDGER = "ledger.jsonl"

Event = Literal["timed", "measured", "finished", "diverged", "stopped", "goes on", "out", "left out", "winner"]
_RESULTS = {"measured", "finished", "diverged"}
_DECISIONS = {"goes on", "out", "left out", "winner"}
_RESTORE = "Restore it; or remove its folder, and the sweep begins anew."


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Head(_Line):
    """The first line: what is swept, on what, and how it is compared."""

    schema_version: Literal[1] = 1
    sweep: str
    dataset: str
    base: str
    template: str
    chosen_on: Literal["dev"] = "dev"
    metric: MetricName | None
    """None where no dev rows are answered: then the dev loss decides alone."""
    steps: int
    rungs: tuple[int, ...]
    trials: dict[str, dict[str, Any]]
    """By name: preset, learning_rate, and inputs, the digest that `tunewright train` knows the run by."""


class Entry(_Line):
    """Something that happened to a trial. Measures are of the dev split after ``step`` steps of the trial."""

    time: str
    """UTC, ISO 8601."""
    event: Event
    trial: str
    rung: int
    """From 1; 0 for the few steps that tell how long a step takes."""
    step: int
    steps: int = 0
    """Made for this line."""
    seconds: float = 0.0
    """Spent for this line, loading and measuring included."""
    training_seconds: float = 0.0
    """Of them, on the steps."""
    dev_loss: float | None = None
    dev_metric: float | None = None
    why: str | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """The larger, the better: the metric, then the dev loss."""
        assert self.dev_loss is not None
        return (0.0 if self.dev_metric is None else self.dev_metric, -self.dev_loss)


class Ledger:
    """The entries of one sweep, read from its file and added to.

    Raises:
        UserError: the file is there and is no ledger of this sweep.
    """

    def __init__(self, folder: Path, head: Head) -> None:
        self.head = head
        self.path = folder / LEDGER
        self.entries: list[Entry] = []
        if self.path.exists():
            self._text = self.path.read_text(encoding="utf-8")
            self._read()
        else:
            self._text = head.model_dump_json() + "\n"

    def _read(self) -> None:
        for number, line in enumerate(text_lines(self._text), start=1):
            try:
                if number == 1:
                    there = Head.model_validate_json(line)
                else:
                    self.entries.append(Entry.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                what = f"not a line of a ledger: {'.'.join(map(str, first['loc']))} {first['msg']}"
                raise UserError(what, where=f"{self.path}:{number}", fix=_RESTORE) from None
        if not self._text or there != self.head:
            raise UserError("it is not the ledger of this sweep", where=f"{self.path}:1", fix=_RESTORE)

    def add(self, event: Event, trial: str, rung: int, step: int, **values: Any) -> Entry:
        """Write one more line."""
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
        """Write what became of a trial at a rung, unless that is what was decided last."""
        decided = [e.event for e in self.entries if (e.trial, e.rung) == (trial, rung) and e.event in _DECISIONS]
        if not decided or decided[-1] != event:
            self.add(event, trial, rung, step, why=why)

    def result(self, trial: str, rung: int) -> Entry | None:
        """Return how a trial did at a rung, if it is through: measured, finished or diverged."""
        found = [e for e in self.entries if (e.trial, e.rung) == (trial, rung) and e.event in _RESULTS]
        return found[-1] if found else None

    def fate(self, trial: str) -> Entry | None:
        """Return what became of a trial in the end, as far as it has been decided."""
        told = [e for e in self.entries if e.trial == trial and (e.event in _DECISIONS or e.event == "diverged")]
        return told[-1] if told else None

    def steps_of(self, trial: str) -> int:
        """Return the furthest step that a trial is known to have got to."""
        return max((e.step for e in self.entries if e.trial == trial and e.steps), default=0)

    @property
    def seconds(self) -> float:
        """Spent on the sweep so far."""
        return sum(entry.seconds for entry in self.entries)
