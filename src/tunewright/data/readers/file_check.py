"""All faults of files of pairs, and corrected copies of them; the files themselves are never changed."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.io import writing
from tunewright.core.progress import Reporter, Task
from tunewright.core.wording import count_of
from tunewright.data.pii import LABELS, find_in_value
from tunewright.data.readers import Fault, SourceRow, check_mapping, scan_pairs, source_size
from tunewright.data.readers.metadata import metadata_of, texts_of
from tunewright.data.readers.repair import mend
from tunewright.data.readers.schemas import Conversation, Turn, conversation_of
from tunewright.data.readers.sources import Source, open_source
from tunewright.data.readers.validate import RowError, example_from_turns, groups_of


@dataclass(frozen=True)
class CheckedFile:
    """One file: how many rows are examples, how many are faulty, and why it cannot be read (to its end), if so."""

    source: str
    examples: int
    faulty: int
    notes: tuple[str, ...]
    unreadable: dict[str, str | None] | None
    """As ``UserError.as_dict``."""


@dataclass(frozen=True)
class FileCheck:
    """All that is wrong with some files."""

    files: tuple[CheckedFile, ...]
    faults: tuple[Fault, ...]
    secrets: dict[str, int]
    """Secrets by kind, without those that data.allow lets through: `data add` refuses them, and says where they are."""

    @property
    def ok(self) -> bool:
        """True if every row of every file is an example, and none holds a secret."""
        return not self.faults and not self.secrets and all(file.unreadable is None for file in self.files)

    @property
    def counts(self) -> dict[str, int]:
        """How many faults there are of each code."""
        return dict(sorted(Counter(fault.code for fault in self.faults).items()))

    @property
    def summary(self) -> str:
        """Rows and faults in one sentence, and secrets by kind in another."""
        examples = sum(file.examples for file in self.files)
        unreadable = sum(file.unreadable is not None for file in self.files)
        faulty = count_of(len(self.faults), "faulty row")
        told = [f"{count_of(examples, 'example')} and {faulty} in {count_of(len(self.files), 'file')}"]
        if unreadable:
            told[0] += f", {count_of(unreadable, 'file')} not readable to the end"
        if self.secrets:
            kinds = ", ".join(f"{LABELS[kind]}: {count:,}" for kind, count in self.secrets.items())
            told.append(f"secrets ({kinds}): `tunewright data add` refuses them, by line, unless it has --redact")
        return "\n".join(told)

    def as_dict(self) -> dict[str, Any]:
        """Return the check as ``--json`` prints it."""
        return {"ok": self.ok, "counts": self.counts, **asdict(self)}


def check_files(
    paths: Sequence[Path], data: DataConfig, reporter: Reporter, rows: list[SourceRow] | None = None
) -> FileCheck:
    """Read files row by row and collect every fault.

    ``rows`` gets the rows that are examples; without it they are not held, so that files of any length can be checked.
    A file that cannot be read is told in the result, and the others are checked all the same.

    Raises:
        UserError: the config's templates or JMESPath are none.
    """
    check_mapping(data)
    faults: list[Fault] = []
    secrets: Counter[str] = Counter()
    with reporter.task("checking", sum(source_size(path) for path in paths), "bytes") as task:
        files = tuple(_checked(path, data, faults, secrets, task, rows) for path in paths)
    return FileCheck(files, tuple(faults), dict(secrets.most_common()))


def _checked(
    path: Path,
    data: DataConfig,
    faults: list[Fault],
    secrets: Counter[str],
    task: Task,
    rows: list[SourceRow] | None,
) -> CheckedFile:
    notes: list[str] = []
    examples, before, unreadable = 0, len(faults), None
    try:
        for row in scan_pairs(path, data, notes, task):
            if isinstance(row, Fault):
                faults.append(row)
            else:
                examples += 1
                if rows is not None:
                    rows.append(row)
                texts = [("", m.content) for m in row.example.messages]
                texts += [*row.groups.items(), *texts_of(row.metadata)]
                found = (f for name, text in texts for f in find_in_value(name, text))
                secrets.update(f.kind for f in found if f.category == "secret" and f.kind not in data.allow)
    except UserError as error:
        unreadable = error.as_dict()
    return CheckedFile(str(path), examples, len(faults) - before, tuple(notes), unreadable)


@dataclass(frozen=True)
class Change:
    """What a corrected copy has otherwise than the file, by the file's line; no ``code`` where there was no fault."""

    source: str
    line: int
    code: str | None
    what: str
    left_out: bool = False
    """The row is not in the copy, because there is no safe way to mend it."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.what}"


def fix_file(path: Path, out: Path, data: DataConfig, task: Task | None = None) -> list[Change]:
    """Write a corrected copy of a file of pairs as chat rows (JSON Lines, UTF-8), and list each change.

    A fault is mended where that leaves no choice (docs/formats.md); a row with any other fault is left out and named.
    The config's system turn is not written: it is put before pairs when they are added.

    Raises:
        UserError: ``out`` exists or is the file itself, no row is left, what ``scan_pairs`` raises, a full disk.
            Nothing is written then.
    """
    if out.exists():
        same = path.exists() and out.samefile(path)
        what = "the copy would replace the file that it is made of" if same else "there is a file already"
        raise UserError(what, where=str(out), fix="Name a new file; nothing is corrected in place.")
    notes: list[str] = []
    source = open_source(path, data, notes, task)
    changes: list[Change] = []
    plain = data.model_copy(update={"system_prompt": None})
    with _new_file(out) as copy:
        written = 0
        for row in _fixed_rows(path, source, plain, changes):
            copy.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
        if not written:
            raise UserError("no row is left to copy", where=str(path), fix="Check the file: each row has a fault.")
    return _changes_of_the_whole(path, source, notes) + changes


def _changes_of_the_whole(path: Path, source: Source, notes: Sequence[str]) -> list[Change]:
    changes = [Change(str(path), 1, None, note.removeprefix(f"{path}: ")) for note in notes]
    encoding = source.encoding
    if encoding and encoding.mark:
        changes.insert(0, Change(str(path), 1, None, f"{encoding.name} with a byte-order mark: now UTF-8 without one"))
    return changes


def _fixed_rows(path: Path, source: Source, data: DataConfig, changes: list[Change]) -> Iterator[dict[str, Any]]:
    kinds: set[str] = set()
    for line, row, above, parent in source.rows:
        try:
            if isinstance(row, RowError):
                raise row
            groups = groups_of(row, data, parent)
            conversation = conversation_of(row, data, above, parent)
            turns, done = _mended(conversation, data)
            metadata, lost = metadata_of(row, conversation, data)
        except RowError as fault:
            changes.append(Change(str(path), line, fault.code, f"left out: {fault}", left_out=True))
            continue
        if conversation.kind not in kinds and conversation.kind != "OpenAI chats":
            kinds.add(conversation.kind)
            what = f"{conversation.kind} written as chat rows, here and below"
            changes.append(Change(str(path), line, None, what))
        dropped = [key for key in data.drop_columns if key in row]
        if dropped:
            changes.append(Change(str(path), line, None, f"left out, as data.drop_columns says: {', '.join(dropped)}"))
        changes += [Change(str(path), line, code, what) for code, what in done]
        lost += [key for key in metadata if key in _CHAT_KEYS]  # in a chat row they would mean something
        if lost:
            changes.append(Change(str(path), line, None, f"keys that are not in the copy: {', '.join(lost)}"))
            metadata = {key: value for key, value in metadata.items() if key not in lost}
        plain = {key: groups.get(key) for key in data.group_by}
        yield {**metadata, **plain, "messages": [_written(turn) for turn in turns]}


def _mended(conversation: Conversation, data: DataConfig) -> tuple[list[Turn], list[tuple[str, str]]]:
    """The turns without faults, and each mend with the code of its fault; raises the first fault without a mend."""
    turns, done = list(conversation.turns), []
    while True:
        try:
            example_from_turns(turns, data)
        except RowError as fault:
            mended = mend(turns, fault)
            if mended is None:
                raise
            turns = mended[0]
            done.append((fault.code, mended[1]))
        else:
            return turns, done


def _written(turn: Turn) -> dict[str, Any]:
    weight = {"weight": 0} if turn.rest.get("weight") == 0 else {}
    return {"role": turn.role, "content": turn.content, **weight}


_CHAT_KEYS = {"messages", "system", "system_prompt", "only_last"}


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """A new text file, written row by row, that is there only if nothing was raised."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).rename(path)
        finally:
            Path(name).unlink(missing_ok=True)
