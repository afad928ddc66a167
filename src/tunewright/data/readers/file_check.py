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
from tunewright.core.io import canonical_json, writing
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import count_of
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.pii import LABELS, find_in_value
from tunewright.data.pii.message_texts import message_texts
from tunewright.data.readers import Fault, SourceRow, check_mapping, scan_pairs, source_size
from tunewright.data.readers.calls import declared_tools
from tunewright.data.readers.repairs import repair_turns
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.schemas import Conversation, parse_conversation
from tunewright.data.readers.sources import Source, open_source
from tunewright.data.readers.turns import Turn
from tunewright.data.readers.validate import example_from_turns, groups_of, metadata_of, texts_of
from tunewright.data.row_file import RowFile


@dataclass(frozen=True)
class CheckedFile:
    """Result for one file: numbers of examples and faulty rows, and the error if it cannot be read to the end."""

    source: str
    examples: int
    faulty: int
    notes: tuple[str, ...]
    unreadable: dict[str, str | None] | None
    """The entries of ``UserError.as_dict``."""


@dataclass(frozen=True)
class FileCheck:
    """Result of a check of several files."""

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
        """Number of faults by code."""
        return dict(sorted(Counter(fault.code for fault in self.faults).items()))

    @property
    def summary(self) -> str:
        """Text on rows and faults, and on secrets by kind."""
        examples = sum(file.examples for file in self.files)
        unreadable = sum(file.unreadable is not None for file in self.files)
        faulty = count_of(len(self.faults), "faulty row")
        lines = [f"{count_of(examples, 'example')} and {faulty} in {count_of(len(self.files), 'file')}"]
        if unreadable:
            lines[0] += f", {count_of(unreadable, 'file')} not readable to the end"
        if self.secrets:
            kinds = ", ".join(f"{LABELS[kind]}: {count:,}" for kind, count in self.secrets.items())
            lines.append(f"secrets ({kinds}): `tunewright data add` refuses them without --redact")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {"ok": self.ok, "counts": self.counts, **asdict(self)}


def check_files(
    paths: Sequence[Path],
    data: DataConfig,
    reporter: Reporter,
    rows: list[SourceRow] | None = None,
    workers: Workers = THIS_PROCESS,
) -> FileCheck:
    """Read files row by row and collect every fault.

    ``rows`` receives the examples; without it they are not held, so that files of any length can be checked. A file
    that cannot be read is part of the result, and the other files are checked.

    Raises:
        UserError: a template or JMESPath of the config is invalid.
    """
    check_mapping(data)
    faults: list[Fault] = []
    secrets: Counter[str] = Counter()
    with reporter.task("checking", sum(source_size(path) for path in paths), "bytes") as task:
        files = tuple(_checked(path, data, faults, secrets, task, rows, workers) for path in paths)
    return FileCheck(files, tuple(faults), dict(secrets.most_common()))


def _checked(
    path: Path,
    data: DataConfig,
    faults: list[Fault],
    secrets: Counter[str],
    task: Task,
    rows: list[SourceRow] | None,
    workers: Workers,
) -> CheckedFile:
    notes: list[str] = []
    examples, before, unreadable, file = 0, len(faults), None, RowFile()
    try:
        for row in scan_pairs(path, data, notes, task, workers):
            if isinstance(row, Fault):
                faults.append(row)
            else:
                examples += 1
                if rows is not None:
                    rows.append(row.stored(file))
                texts = [text for m in row.example.messages for text in message_texts(m)]
                texts += [*row.groups.items(), *texts_of(row.metadata)]
                found = (f for name, text in texts for f in find_in_value(name, text))
                secrets.update(f.kind for f in found if f.category == "secret" and f.kind not in data.allow)
    except UserError as error:
        unreadable = error.as_dict()
    return CheckedFile(str(path), examples, len(faults) - before, tuple(notes), unreadable)


@dataclass(frozen=True)
class Change:
    """A difference between a corrected copy and the file; ``code`` is None if there was no fault."""

    source: str
    line: int
    code: str | None
    what: str
    left_out: bool = False
    """True if the row is not in the copy, because no safe repair exists."""
    before: str | None = None
    """The conversation as it was, if it was repaired."""
    after: str | None = None
    """The conversation in the copy."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.what}"


def fix_file(path: Path, out: Path, data: DataConfig, task: Task | None = None) -> list[Change]:
    """Write a corrected copy of a file of pairs as chat rows (JSON Lines, UTF-8), and return each change.

    A fault is repaired if there is only one way to do so (docs/how-to/file-formats.md). Rows with other faults are left
    out and listed. The config's system turn is not written, since it is put before pairs when they are added.

    Raises:
        UserError: ``out`` exists, no row is left, the errors of ``scan_pairs``, a full disk. Nothing is written then.
    """
    if out.exists():
        same = path.exists() and out.samefile(path)
        what = "The copy would overwrite the original" if same else "The file exists already"
        raise UserError(what, where=str(out), fix="Name a new file; files are not corrected in place.")
    notes: list[str] = []
    source = open_source(path, data, notes, task)
    changes: list[Change] = []
    plain = data.model_copy(update={"system_prompt": None})
    with _new_file(out) as copy:
        written = 0
        for row in _fixed_rows(source, plain, changes):
            copy.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
        if not written:
            raise UserError("Every row has a fault that cannot be repaired", where=str(path), fix="Correct the file.")
    return _changes_of_the_whole(path, source, notes) + changes


def _changes_of_the_whole(path: Path, source: Source, notes: Sequence[str]) -> list[Change]:
    changes = [Change(str(path), 1, None, note.removeprefix(f"{path}: ")) for note in notes]
    encoding = source.encoding
    if encoding and encoding.mark:
        changes.insert(0, Change(str(path), 1, None, f"{encoding.name} with a byte-order mark written as plain UTF-8"))
    return changes


def _fixed_rows(source: Source, data: DataConfig, changes: list[Change]) -> Iterator[dict[str, Any]]:
    kinds: set[str] = set()
    for line, row, above, parent in source.rows:
        try:
            if isinstance(row, RowError):
                raise row
            groups = groups_of(row, data, parent)
            conversation = parse_conversation(row, data, above, parent)
            turns, done = _repaired(conversation, data)
            metadata, lost = metadata_of(row, conversation, data)
        except RowError as fault:
            changes.append(Change(source.name, line, fault.code, f"left out: {fault}", left_out=True))
            continue
        if conversation.kind not in kinds and conversation.kind != "OpenAI chats":
            kinds.add(conversation.kind)
            what = f"{conversation.kind} written as chat rows, from here on"
            changes.append(Change(source.name, line, None, what))
        dropped = [key for key in data.drop_columns if key in row]
        if dropped:
            changes.append(Change(source.name, line, None, f"dropped by data.drop_columns: {', '.join(dropped)}"))
        texts = (_as_lines(conversation.turns), _as_lines(turns))
        changes += [Change(source.name, line, code, what, False, *texts) for code, what in done]
        lost += [key for key in metadata if key in _CHAT_KEYS]  # these keys have a meaning in chat rows
        if lost:
            changes.append(Change(source.name, line, None, f"keys not in the copy: {', '.join(lost)}"))
            metadata = {key: value for key, value in metadata.items() if key not in lost}
        plain = {key: groups.get(key) for key in data.group_by}
        tools = {"tools": json.loads(declared_tools(conversation.tools).text)} if conversation.tools else {}
        yield {**metadata, **plain, "messages": [_written(turn) for turn in turns], **tools}


def _as_lines(turns: Sequence[Turn]) -> str:
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _repaired(conversation: Conversation, data: DataConfig) -> tuple[list[Turn], list[tuple[str, str]]]:
    """Return the repaired turns, and each repair with its code; raises the first fault without a repair."""
    turns, done = list(conversation.turns), []
    while True:
        try:
            example_from_turns(turns, data, conversation.tools)
        except RowError as fault:
            repaired = repair_turns(turns, fault)
            if repaired is None:
                raise
            turns = repaired[0]
            done.append((fault.code, repaired[1]))
        else:
            return turns, done


def _written(turn: Turn) -> dict[str, Any]:
    written = {"role": turn.role, "content": turn.content}
    if turn.rest.get("weight") == 0:
        written["weight"] = 0
    if turn.calls:
        written["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _as_text(call.arguments)}}
            for call in turn.calls
        ]
    if turn.call_id is not None:
        written["tool_call_id"] = turn.call_id
    return written


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else canonical_json(arguments)


_CHAT_KEYS = {"messages", "system", "system_prompt", "only_last"}


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """Yield a new text file that is discarded if an exception is raised."""
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
