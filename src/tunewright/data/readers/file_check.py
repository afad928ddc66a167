"""Files of pairs before they are added: all faults, and corrected copies; the files never change."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig, Split
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, new_file
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import count_of
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.examples import ROLES, Example, RowFile, call_id
from tunewright.data.pii import LABELS, find_in_value, message_texts, value_texts
from tunewright.data.readers import Fault, SourceRow, check_mapping, scan_pairs, source_size
from tunewright.data.readers.json_rows import RawRow
from tunewright.data.readers.row_errors import RowError, place
from tunewright.data.readers.schemas import Conversation, parse_conversation
from tunewright.data.readers.sources import SourceFile, open_source
from tunewright.data.readers.turns import Turn, TurnKeys, json_or_literal, read_turn
from tunewright.data.readers.validate import example_from_turns, groups_of, metadata_of

_CHAT_KEYS = {"messages", "system", "system_prompt", "only_last"}
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool"}

Repaired = tuple[list[Turn], str]
"""The repaired turns, and a description of the repair."""


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
    """Secrets by kind that data.allow does not permit: `data add` refuses them and names their places."""

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
        faulty = f" and {count_of(len(self.faults), 'faulty row')}" if self.faults else ""
        lines = [f"{count_of(examples, 'example')}{faulty} in {count_of(len(self.files), 'file')}"]
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
    given: Mapping[Path, Split | None] | None = None,
    own: Mapping[Path, DataConfig] | None = None,
) -> FileCheck:
    """Read files row by row and collect every fault; ``given`` maps files to their splits, ``own`` to their settings.

    ``rows`` receives the examples; without it they are not held, so that files of any length can be checked. A file
    that cannot be read is part of the result, and the other files are checked.
    """
    check_mapping(data)
    faults: list[Fault] = []
    secrets: Counter[str] = Counter()
    with reporter.task("checking", sum(source_size(path) for path in paths), "bytes") as task:
        files = tuple(
            _check_file(
                path, (own or {}).get(path, data), faults, secrets, task, rows, workers, (given or {}).get(path)
            )
            for path in paths
        )
    return FileCheck(files, tuple(faults), dict(secrets.most_common()))


def _check_file(
    path: Path,
    data: DataConfig,
    faults: list[Fault],
    secrets: Counter[str],
    task: Task,
    rows: list[SourceRow] | None,
    workers: Workers,
    split: Split | None,
) -> CheckedFile:
    notes: list[str] = []
    examples, before, unreadable, file = 0, len(faults), None, RowFile()
    try:
        for row in scan_pairs(path, data, notes, task, workers, split):
            if isinstance(row, Fault):
                faults.append(row)
            else:
                examples += 1
                if rows is not None:
                    rows.append(row.stored(file))
                texts = [text for m in row.example.messages for text in message_texts(m)]
                texts += [*row.groups.items(), *value_texts(row.metadata)]
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
    """True if the row is not in the copy, because no safe repair exists or because it was chosen."""
    before: str | None = None
    """The conversation as it was, if it was repaired."""
    after: str | None = None
    """The conversation in the copy."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.what}"


def fix_file(
    path: Path,
    out: Path,
    data: DataConfig,
    task: Task | None = None,
    leave_out: Collection[int] = (),
    answers: Mapping[int, str] | None = None,
) -> list[Change]:
    """Write a corrected copy of a file of pairs, and return each change.

    ``leave_out`` are lines (in a file without lines: numbers of rows) whose rows the copy lacks, with every row that
    repeats them. ``answers`` fill in the empty answers at their lines.

    The copy of a CSV file is a CSV file with the same columns, if the name ``out`` ends in .csv; other copies have chat
    rows (JSON Lines, UTF-8).

    A fault is repaired if there is only one way to do so (docs/how-to/file-formats.md). Rows with other faults are left
    out and listed. The config's system turn is not written, since it is put before pairs when they are added.
    Nothing is written if ``out`` exists, or if no row is left.
    """
    if out.exists():
        same = path.exists() and out.samefile(path)
        what = "The copy would overwrite the original" if same else "The file exists already"
        raise UserError(what, where=str(out), fix="Name a new file; files are not corrected in place.")
    notes: list[str] = []
    plain = data.model_copy(update={"system_prompt": None})
    chosen, answers = _chosen_pairs(path, plain, leave_out), answers or {}
    source = open_source(path, data, notes, task)
    changes: list[Change] = []
    table = out.suffix.lower() == ".csv"
    if table and not source.delimiter:
        what = f"Only the copy of a CSV file can be a CSV file (got {source.kind})"
        raise UserError(what, where=str(out), fix="End the name of the copy in .jsonl.")
    # Spreadsheets recognise UTF-8 by the byte-order mark.
    with (
        new_file(out) as temporary,
        temporary.open("w", encoding="utf-8-sig" if table else "utf-8", newline="") as copy,
    ):
        written = 0
        lines = csv.writer(copy, delimiter=source.delimiter or ",", lineterminator="\n")
        for row in _fix_rows(source, plain, changes, table, chosen, answers):
            if table:
                lines.writerows([row.values()] if written else [row, row.values()])
            else:
                copy.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
        if missing := answers.keys() - {change.line for change in changes}:
            raise UserError(f"The file has no row at line {min(missing)}", where=str(path), fix="Check the file again.")
        if not written:
            what = "Every row is left out" if chosen else "Every row has a fault that cannot be repaired"
            raise UserError(what, where=str(path), fix="Correct the file.")
    whole = [note.removeprefix(f"{path}: ") for note in notes]
    if source.encoding and source.encoding.mark and not table:
        whole.insert(0, f"{source.encoding.name} with a byte-order mark written as plain UTF-8")
    return [Change(str(path), 1, None, what) for what in whole] + changes


def _chosen_pairs(path: Path, data: DataConfig, lines: Collection[int]) -> dict[tuple[str, str], int]:
    """Return the pairs at these lines with the first of their lines."""
    chosen: dict[tuple[str, str], int] = {}
    missing = set(lines)
    for raw in open_source(path, data, []).rows if lines else ():
        if raw.line in lines:
            missing.discard(raw.line)
            with suppress(RowError):  # left out because of its fault
                chosen.setdefault(_pair(_parse(raw, data)[1]), raw.line)
    if missing:
        what = f"The file has no row at line {', '.join(map(str, sorted(missing)))}"
        raise UserError(what, where="--leave-out", fix="`tunewright data check FILE` names lines.")
    return chosen


def _pair(example: Example) -> tuple[str, str]:
    return example.prompt_key, example.output.strip()


def _parse(
    raw: RawRow, data: DataConfig, answer: str | None = None
) -> tuple[Conversation, Example, list[Turn], list[tuple[str, str]]]:
    """Return a row's conversation, and what `_repair` makes of it with this answer; raise a fault without a repair."""
    if isinstance(raw.row, RowError):
        raise raw.row
    conversation = parse_conversation(raw.row, data, raw.above, raw.parent)
    if answer is None:
        return conversation, *_repair(conversation, data)
    last = conversation.turns[-1]
    if last.role != "assistant" or not last.path or str(last.content or "").strip():
        raise UserError(f"The row at line {raw.line} has no empty answer", fix="Check the file again.")
    filled = replace(conversation, turns=(*conversation.turns[:-1], replace(last, content=answer)))
    example, turns, done = _repair(filled, data)
    return conversation, example, turns, [("E401", "the answer filled in"), *done]


def _fix_rows(
    source: SourceFile,
    data: DataConfig,
    changes: list[Change],
    table: bool,
    chosen: Mapping[tuple[str, str], int],
    answers: Mapping[int, str],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the copy; those of a ``table`` keep their columns, and ``chosen`` pairs are left out."""
    kinds: set[str] = set()
    for raw in source.rows:
        line, row = raw.line, raw.row
        try:
            conversation, example, turns, done = _parse(raw, data, answers.get(line))
            assert not isinstance(row, RowError)
            groups = groups_of(row, data, raw.parent)
            metadata, lost = metadata_of(row, conversation, data)
        except RowError as fault:
            changes.append(Change(source.name, line, fault.code, f"left out: {fault}", left_out=True))
            continue
        texts = (_as_lines(conversation.turns), _as_lines(turns))
        if (first := chosen.get(_pair(example))) is not None:
            what = "left out, as chosen" if first == line else f"left out: it repeats line {first}, which was chosen"
            changes.append(Change(source.name, line, None, what, True, texts[0]))
            continue
        changes += [Change(source.name, line, code, what, False, *texts) for code, what in done]
        if table:
            # Each turn is a column; a blank one is left out, or is the last one and filled in.
            filled = {str(turns[-1].path[0]): turns[-1].content} if line in answers else {}
            yield row | {str(turn.path[0]): "" for turn in conversation.turns if done and turn not in turns} | filled
            continue
        if conversation.kind not in kinds and conversation.kind != "OpenAI chats":
            kinds.add(conversation.kind)
            what = f"{conversation.kind} written as chat rows, from here on"
            changes.append(Change(source.name, line, None, what))
        dropped = [key for key in data.drop_columns if key in row]
        if dropped:
            changes.append(Change(source.name, line, None, f"dropped by data.drop_columns: {', '.join(dropped)}"))
        lost += [key for key in metadata if key in _CHAT_KEYS]  # these keys have a meaning in chat rows
        if lost:
            changes.append(Change(source.name, line, None, f"keys not in the copy: {', '.join(lost)}"))
            metadata = {key: value for key, value in metadata.items() if key not in lost}
        plain = {key: groups.get(key) for key in data.group_by}
        yield {**metadata, **plain, **example.as_row()}


def _as_lines(turns: Sequence[Turn]) -> str:
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _repair(conversation: Conversation, data: DataConfig) -> tuple[Example, list[Turn], list[tuple[str, str]]]:
    """Return the example, the repaired turns, and each repair with its code; raise a fault that has no repair."""
    turns = list(conversation.turns)
    done: list[tuple[str, str]] = []
    while True:
        try:
            return example_from_turns(turns, data, conversation.tools), turns, done
        except RowError as fault:
            path, repair = fault.path, _REPAIRS.get(fault.code)
            of_content = (i for i, turn in enumerate(turns) if turn.content_path == path)
            above = (i for i, turn in enumerate(turns) if turn.path and path[: len(turn.path)] == turn.path)
            at = next(of_content, next(above, None))
            repaired = None if repair is None or at is None else repair(list(turns), at, fault)
            if repaired is None:
                raise
            turns = repaired[0]
            done.append((fault.code, repaired[1]))


# Each repairs one fault of turns, at the place of the turn; None if there is no safe repair.
def _drop_key(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Drop a key without a value, a weight without effect, or a name, which no chat template renders."""
    turn, key, why = turns[at], str(error.path[-1]), ""
    if key not in turn.rest:
        return None
    value = turn.rest[key]
    if error.code == "E307":
        why = ": it has no effect"
        droppable = value is None or (turn.role != "assistant" and value == 0 and not isinstance(value, bool))
    else:
        droppable = error.code == "E309" or value in (None, "", [], {})
    turns[at] = replace(turn, rest={name: given for name, given in turn.rest.items() if name != key})
    return (turns, f"{place(error.path)} left out{why}") if droppable else None


def _correct_role(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    role, turn = turns[at].role, turns[at]
    if not isinstance(role, str):
        return None
    plain = role.strip().lower()
    known = _OTHER_NAMES.get(plain, plain)
    if known not in ROLES:
        return None
    key = str(turn.content_path[-1])
    # Read again, since calls and results have keys of their own.
    turns[at] = read_turn({**turn.rest, "role": known, key: turn.content}, turn.path, TurnKeys(("role",), (key,), {}))
    return turns, f'the role of {place(error.path)} is "{known}" instead of "{role}"'


def _result_text(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Write a result that is an object, a list or a number as JSON."""
    content = turns[at].content
    parts = isinstance(content, list) and any(isinstance(each, dict) and "type" in each for each in content)
    if turns[at].role != "tool" or content is None or parts:
        return None
    turns[at] = replace(turns[at], content=canonical_json(content))
    return turns, f"{place(error.path)}: the result written as JSON"


def _write_arguments(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Write absent or empty arguments as {}, and a Python literal as JSON."""
    calls = list(turns[at].calls)
    number = next(n for n, call in enumerate(calls) if call.arguments_path == error.path)
    given = calls[number].arguments
    value: Any = {}
    what = "no arguments written as {}"
    if given is not None and str(given).strip():
        what = "a Python literal written as JSON"
        try:
            value = json_or_literal(given) if isinstance(given, str) else None
        except ValueError:
            return None
    if not isinstance(value, dict):
        return None
    calls[number] = replace(calls[number], arguments=value)
    turns[at] = replace(turns[at], calls=tuple(calls))
    return turns, f"{place(error.path)}: {what}"


def _number_calls(turns: list[Turn], _at: int, _error: RowError) -> Repaired | None:
    """Number the calls, if the results after each turn with calls can be matched with them in one way only."""
    count = 0
    for at, turn in enumerate(turns):
        if not turn.calls:
            continue
        results = list(takewhile(lambda each: each.role == "tool", turns[at + 1 :]))
        ids, given = [call.id for call in turn.calls], [result.call_id for result in results]
        if len(ids) == len(given) and (len(ids) == 1 or given == [None] * len(given)):
            order = list(range(len(ids)))
        elif (
            all(isinstance(each, str) for each in (*ids, *given))
            and len(set(ids)) == len(ids)
            and set(given) <= set(ids)
        ):
            places = {each: number for number, each in enumerate(ids)}
            order = [places[each] for each in given]
        else:
            return None
        new = [call_id(count + n) for n in range(len(ids))]
        count += len(ids)
        calls = tuple(replace(call, id=each) for call, each in zip(turn.calls, new, strict=True))
        turns[at] = replace(turn, calls=calls)
        for place_, result in enumerate(results):
            turns[at + 1 + place_] = replace(result, call_id=new[order[place_]])
    return turns, "calls and results numbered by their order"


def _drop_blank(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Drop a blank last turn after an answer, or a blank system turn."""
    last = at == len(turns) - 1 and any(turn.role == "assistant" for turn in turns[:at])
    if not last and not (at == 0 and turns[0].role == "system"):
        return None
    del turns[at]
    return turns, f"{place(error.path)} left out: it is empty"


def _drop_repeated(turns: list[Turn], at: int, _error: RowError) -> Repaired | None:
    """Drop one of two consecutive turns of a role if it is blank or a repetition."""
    before, here = turns[at - 1], turns[at]
    if here.content == before.content and here.rest == before.rest and not here.calls:
        del turns[at]
        return turns, f"{place(here.path)} left out: it repeats the previous turn"
    for drop, turn in ((at - 1, before), (at, here)):
        if isinstance(turn.content, str) and not turn.content.strip() and not turn.calls:
            del turns[drop]
            return turns, f"{place(turn.path)} left out: it is empty"
    return None


def _drop_unanswered(turns: list[Turn], _at: int, _error: RowError) -> Repaired | None:
    """Drop the turns after the last trained answer, which would not be trained on."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.rest.get("weight", 1) == 1]
    if not answers:
        return None
    left = [place(turn.path) for turn in turns[answers[-1] + 1 :]]
    return turns[: answers[-1] + 1], f"{', '.join(left)} left out: no trained answer follows"


_REPAIRS: dict[str, Callable[[list[Turn], int, RowError], Repaired | None]] = {
    "E303": _drop_key,
    "E304": _correct_role,
    "E305": _result_text,
    "E306": _result_text,
    "E307": _drop_key,
    "E308": _drop_unanswered,
    "E309": _drop_key,
    "E401": _drop_blank,
    "E406": _drop_repeated,
    "E407": _drop_unanswered,
    "E504": _write_arguments,
    "E507": _number_calls,
    "E512": _number_calls,
}
