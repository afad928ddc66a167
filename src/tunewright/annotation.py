"""The annotation engine: people's verdicts on items, for label review and human evaluation.

It holds what both have in common: the log of verdicts, undos and notes, a reviewer's pass over a queue, leases of items
and verdicts from a spreadsheet. Each of the two has its rules: what an item is, when it is settled, who may see what.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import IO, Annotated, Any, BinaryIO, Generic, Literal, Protocol, TypeVar, cast
from weakref import finalize

from pydantic import BaseModel, ConfigDict, Field

from tunewright.core.clock import now
from tunewright.core.csv import one_line_end, read_sheet, restored_cell
from tunewright.core.errors import UserError
from tunewright.core.io import writing
from tunewright.core.locks import FILE_S, is_locked, lock_file, locked_folder

LEASE_S = 600  # seconds for which an item on one screen is offered to no other
_MOST_FAULTS = 50


class Mark(BaseModel):
    """An event of a log: what a reviewer did to an item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    reviewer: str
    when: Annotated[str, Field(description="UTC, ISO 8601.")]


class VerdictMark(Mark):
    """A verdict on an item; it replaces the reviewer's earlier one, which an undo brings back."""

    event: Literal["verdict"] = "verdict"
    verdict: str


class NoteMark(Mark):
    """A reviewer's note on an item, replacing any earlier one; an empty one removes it."""

    event: Literal["note"] = "note"
    text: str


class UndoMark(Mark):
    """Withdrawal of the reviewer's latest valid verdict on an item."""

    event: Literal["undo"] = "undo"


class Item(Protocol):
    """An item as a reviewer sees it."""

    @property
    def key(self) -> str: ...


MarkT = TypeVar("MarkT", bound=Mark)
VerdictMarkT = TypeVar("VerdictMarkT", bound=VerdictMark)
ItemT = TypeVar("ItemT", bound=Item)
VerdictT = TypeVar("VerdictT", bound=str)


@dataclass(frozen=True)
class AnnotationLog(Generic[VerdictMarkT]):
    """All events in order, and the verdicts and notes that result."""

    events: Sequence[BaseModel]
    torn: bool = False
    """True if the file ends in half a line, because a crash cut off the last event."""

    @cached_property
    def stacks(self) -> dict[str, dict[str, list[VerdictMarkT]]]:
        """The valid verdicts: item's key, then reviewer, to verdicts, latest last."""
        stacks: dict[str, dict[str, list[VerdictMarkT]]] = {}
        for event in self.events:
            if isinstance(event, VerdictMark):
                stacks.setdefault(event.key, {}).setdefault(event.reviewer, []).append(cast(VerdictMarkT, event))
            elif isinstance(event, UndoMark) and stacks.get(event.key, {}).get(event.reviewer):
                stacks[event.key][event.reviewer].pop()
        return stacks

    @cached_property
    def notes(self) -> dict[str, dict[str, str]]:
        """Item's key, then reviewer, to the note."""
        notes: dict[str, dict[str, str]] = {}
        for event in self.events:
            if isinstance(event, NoteMark):
                notes.setdefault(event.key, {})[event.reviewer] = event.text
        return {key: {name: text for name, text in said.items() if text} for key, said in notes.items()}

    def current_verdicts(self, key: str) -> dict[str, VerdictMarkT]:
        """Return the verdict of each reviewer on an item."""
        return {name: stack[-1] for name, stack in self.stacks.get(key, {}).items() if stack}

    def latest(self, reviewer: str, counts: Callable[[VerdictMarkT], bool]) -> VerdictMarkT | None:
        """Return the reviewer's newest valid verdict that ``counts``."""
        theirs = [stack[-1] for names in self.stacks.values() if (stack := names.get(reviewer))]
        places = {id(event): place for place, event in enumerate(self.events)}
        return max(filter(counts, theirs), key=lambda judged: places[id(judged)], default=None)


@dataclass(frozen=True)
class SheetImport:
    """The result of an import: recorded verdicts, known verdicts, rows without a verdict, and recorded notes."""

    recorded: int
    known: int
    blank: int
    notes: int = 0


class AnnotationSession(ABC, Generic[VerdictMarkT, ItemT, VerdictT]):
    """A reviewer's pass over a queue of items; each event is on disk before the next item is shown."""

    log: AnnotationLog[VerdictMarkT]
    verdict_keys: Sequence[tuple[str, VerdictT, str]]
    """Key, verdict, and the words on its button; the last one skips the item."""
    sheet_columns: Sequence[str]
    """The columns that an imported sheet needs: first the one with the item's key, then others and ``verdict``."""
    sheet_command: str
    """The command that writes the sheet."""
    note_kind: type[NoteMark] = NoteMark
    undo_kind: type[UndoMark] = UndoMark

    def __init__(self, reviewer: str) -> None:
        self.reviewer = reviewer
        self._skipped: set[str] = set()  # not offered again in this pass
        self.refresh()

    @abstractmethod
    def read_log(self) -> AnnotationLog[VerdictMarkT]:
        """Return the log as it is on disk."""

    @abstractmethod
    def append(self, events: Sequence[Any]) -> None:
        """Append events to the log on disk."""

    @abstractmethod
    def queue(self) -> Sequence[str]:
        """Return the keys of the items that may be open, each once, in the order in which they are offered."""

    @abstractmethod
    def is_open(self, key: str) -> bool:
        """Return whether an item needs a verdict of this reviewer; a skipped item does."""

    @abstractmethod
    def item(self, key: str) -> ItemT:
        """Return an item in the form that the reviewer may see."""

    @abstractmethod
    def judge(self, item: ItemT, verdict: VerdictT) -> None:
        """Record a verdict, replacing this reviewer's earlier one."""

    @abstractmethod
    def sheet_fault(self, cells: Mapping[str, str], where: str) -> str | None:
        """Return the fault of a sheet's row at ``where`` (its ``file:line``), or None."""

    @abstractmethod
    def sheet_marks(self, cells: Mapping[str, str]) -> list[Mark]:
        """Return the events of a faultless row: none for an empty or a known verdict."""

    def counts(self, judged: VerdictMarkT) -> bool:
        """Return whether a verdict is of this pass or an earlier one of its kind, so that it can be taken back."""
        return judged.key in self.queue()

    def refresh(self) -> None:
        """Read the log again: other reviewers, or this one elsewhere, may have judged items meanwhile."""
        self.log = self.read_log()
        self._skipped = set(filter(self._stays_skipped, self._skipped))

    def _stays_skipped(self, key: str) -> bool:
        mine = self.verdict(key)  # the skip may have been taken back elsewhere
        return mine is not None and mine.verdict == "skip"

    def next(self, leased: Collection[str] = ()) -> ItemT | None:
        """Return the next item to judge, or None; ``leased`` items are on other screens and skipped."""
        key = next((key for key in self.queue() if key not in leased and self._is_offered(key)), None)
        return None if key is None else self.item(key)

    def open_item(self, key: str) -> ItemT | None:
        """Return an item that was shown earlier; None if it left the queue or was judged meanwhile."""
        return self.item(key) if key in self.queue() and self._is_offered(key) else None

    def _is_offered(self, key: str) -> bool:
        return key not in self._skipped and self.is_open(key)

    def open_keys(self, most: int | None = None) -> list[str]:
        """Return the keys of the first ``most`` open items (None: all), including skipped items."""
        return list(islice(filter(self.is_open, self.queue()), most))

    def verdict(self, key: str) -> VerdictMarkT | None:
        """Return this reviewer's verdict on an item."""
        return self.log.current_verdicts(key).get(self.reviewer)

    def note_on(self, key: str) -> str:
        """Return this reviewer's note on an item, or an empty text."""
        return self.log.notes.get(key, {}).get(self.reviewer, "")

    def mark(self, kind: type[MarkT], key: str, **facts: Any) -> MarkT:
        """Return an event of this reviewer, now or at the time ``when``."""
        return kind(**{"key": key, "reviewer": self.reviewer, "when": now(), **facts})

    def record(self, events: Sequence[Mark]) -> None:
        """Record events together."""
        if events:
            self.append(events)
            self.refresh()
        self._skipped |= {event.key for event in events if isinstance(event, VerdictMark) and event.verdict == "skip"}

    def note(self, item: ItemT, text: str) -> str:
        """Store a note on the item, replacing this reviewer's earlier one; return a message to show."""
        text = text.strip()
        if text == self.note_on(item.key):
            return ""
        self.record([self.mark(self.note_kind, item.key, text=text)])
        return "Noted." if text else "The note was removed."

    def latest(self) -> VerdictMarkT | None:
        """Return this reviewer's newest verdict that can be taken back, including verdicts of an earlier pass."""
        return self.log.latest(self.reviewer, self.counts)

    def undo(self, key: str | None = None) -> ItemT | None:
        """Take back this reviewer's verdict on an item (None: the newest one), and return the item."""
        last = self.latest() if key is None else self.verdict(key)
        if last is None or not self.counts(last):
            return None
        self.record([self.mark(self.undo_kind, last.key)])
        self._skipped.discard(last.key)
        return self.item(last.key)

    def import_sheet(self, path: Path) -> SheetImport:
        """Record the verdicts and notes of a filled-in sheet: all, or none if a row is faulty.

        Raises:
            UserError: the file cannot be read, or rows are faulty; the message lists the first 50 by line.
        """
        rows = self._sheet_rows(path)
        marks = [mark for cells in rows for mark in self.sheet_marks(cells)]
        self.record(marks)
        filled = sum(bool(cells["verdict"].strip()) for cells in rows)
        recorded = sum(isinstance(mark, VerdictMark) for mark in marks)
        notes = sum(isinstance(mark, NoteMark) for mark in marks)
        return SheetImport(recorded, filled - recorded, len(rows) - filled, notes)

    def _sheet_rows(self, path: Path) -> list[dict[str, str]]:
        """Return the rows of a sheet, with the texts as they were before `write_sheet` and a spreadsheet."""
        rows, faults = [], []
        seen: dict[str, int] = {}
        for line, written in read_sheet(path, self.sheet_columns, self.sheet_command):
            cells = {name: one_line_end(restored_cell(cell)) for name, cell in written.items()}
            key = cells[self.sheet_columns[0]]
            wrong = self.sheet_fault(cells, f"{path}:{line}")
            if key in seen and not wrong:
                wrong = f"duplicate of line {seen[key]}"
            seen.setdefault(key, line)
            if wrong:
                faults.append(f"{path}:{line}: {wrong}")
            rows.append(cells)
        if faults:
            listed = "\n".join(f"  {each}" for each in faults[:_MOST_FAULTS])
            more = f"\n  and {len(faults) - _MOST_FAULTS:,} more" if len(faults) > _MOST_FAULTS else ""
            raise UserError(f"Faulty rows, no verdict was recorded:\n{listed}{more}", fix="Fix them and import again.")
        return rows


class Leases:
    """The item on each screen of a project, which is offered to no other screen for a time.

    Each process has a file in ``folder``, locked while the process lives: the leases of a killed process end with it.
    Ends are times of the system's monotonic clock, which all its processes share and a change of the date does not
    move; showing an item again renews its lease. On another system, which has another clock, the first verdict counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._held: dict[tuple[str, str], tuple[str, float]] = {}  # by screen and queue: leased item, lease's end

    def next(
        self, session: AnnotationSession[Any, ItemT, Any], screen: str, queue: str, key: str | None = None
    ) -> ItemT | None:
        """Return the session's next item, or the one with this key, leased to this screen.

        None: other screens have the item with this key, or every item that is left.
        """
        busy = UserError("Another process has been choosing a row for 10 s", where=str(self._folder), fix="Try again.")
        with locked_folder(self._folder, busy, FILE_S), writing(self._folder):
            time = monotonic()
            held = [lease for (other, _), lease in self._held.items() if other != screen]
            leased = [taken for taken, end in [*held, *self._of_others()] if 0 < end - time <= LEASE_S]
            item: ItemT | None
            if key is None:
                item = session.next(leased)
            elif key in leased:
                item = None
            else:
                item = session.item(key)
            if item is None:
                self._held.pop((screen, queue), None)
            else:
                self._held[screen, queue] = (item.key, time + LEASE_S)
            if self._file is None:
                self._file = tempfile.NamedTemporaryFile(dir=self._folder, delete=False, buffering=0)  # noqa: SIM115
                lock_file(cast(BinaryIO, self._file))
                finalize(self, self._file.close)
            self._file.seek(0)
            self._file.truncate()
            self._file.write("".join(f"{key} {end}\n" for key, end in self._held.values() if end > time).encode())
        return item

    def _of_others(self) -> list[tuple[str, float]]:
        """Return the leases of other processes, and remove the files of processes that have ended."""
        found = []
        for path in self._folder.glob("tmp*"):
            if self._file is not None and path.name == Path(self._file.name).name:
                continue
            if is_locked(path):
                leases = map(str.split, path.read_text().splitlines())
                found += [(key, float(end)) for key, end in leases]
            else:
                path.unlink(missing_ok=True)
        return found
