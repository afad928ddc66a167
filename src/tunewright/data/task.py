"""The task of a file of pairs, from the shape of its answers, and the metric that fits it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from tunewright.config import DataConfig, Split
from tunewright.core.errors import UserError
from tunewright.core.options import TaskName
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, excerpts
from tunewright.data.add import map_columns
from tunewright.data.examples import MOST_CLASSES, Example
from tunewright.data.given_split import split_by_name, unused_split_notice
from tunewright.data.options import ColumnMapping
from tunewright.data.readers import Fault, SourceRow, scan_pairs
from tunewright.data.readers.row_errors import RowsElsewhereError
from tunewright.data.readers.schemas import PREFERENCE_KEYS
from tunewright.data.readers.source_files import is_hub_name, source_files
from tunewright.data.readers.sources import first_values, open_source, shown_columns


@dataclass(frozen=True)
class Task:
    """A kind of task: its answers, its metrics as the config names them, and the reason for the first metric."""

    answers: str
    metric: str | dict[str, Any]
    why: str
    extra_metrics: tuple[str, ...] = ()


TASKS: dict[TaskName, Task] = {
    "labels": Task("one of a set of answers", "exact_match", "an answer is right or wrong"),
    "short": Task("short facts, numbers or codes", "exact_match", "almost right is wrong"),
    "json": Task("JSON objects", "json", "a row with four of five right fields counts as that", ("json_valid",)),
    "sql": Task(
        "SQL",
        {"exact_match": {"collapse_whitespace": True}},
        "line breaks do not matter; a function of yours that runs the queries judges better",
    ),
    "calls": Task("function calls", "call_ast_match", "function and arguments count, their order does not"),
    "text": Task("summaries, notes and other text", "rouge_l", "it counts shared words in the same order", ("chrf",)),
    "chat": Task(
        "conversations",
        "chrf",
        "a rough guide, because a good answer may share no words with the reference; then ask people",
    ),
}
"""docs/how-to/metrics.md has the reasons and the trap of each metric."""

_OTHER_SCRIPT = Task(TASKS["text"].answers, "chrf", "parts of words count, in every script")
_UNEVEN = Task(
    TASKS["labels"].answers, "macro_f1", "one answer has most of the rows, and here each answer counts alike"
)
_LOOKED_AT = 1_000  # rows
_MOSTLY = 0.9
_LATIN = 0.99
_READING = ("rows", "sheet", "header_row", "input", "output")
_SHORT = 50  # characters
_LABEL = 100  # characters of the longest usual label
_MOST_LABELS = 20  # labels in a proposed instruction
_SQL = re.compile(r"\s*\(?\s*(select|with|insert|update|delete|create|alter)\b", re.IGNORECASE)
_CHATS = {"messages", "interactions", "conversation", "conversations", *PREFERENCE_KEYS}
_IDS = {"id", "idx", "index", "key", "nr", "no", "uuid"}
# Names of columns in English, German, French and Spanish.
_INPUT = re.compile(
    "input|prompt|question|query|text|utterance|sentence|message|document|dialogue|dialog|article|instruction|source|"
    "request|eingabe|frage|anfrage|nachricht|satz|beschreibung|texte|entrée|requête|pregunta|texto|entrada|mensaje"
)
_OUTPUT = re.compile(
    "output|completion|answer|response|reply|labels?|intent|category|class|target|summary|abstract|sql|code|reference|"
    "query|ausgabe|antwort|kategorie|klasse|absicht|zusammenfassung|réponse|catégorie|étiquette|résumé|respuesta|"
    "categoría|etiqueta|resumen"
)


class AmbiguousColumnsError(UserError):
    """Several ``columns``, here with their first values, may be the input or the ideal output."""

    def __init__(self, columns: Mapping[str, Any], where: str) -> None:
        self.columns = list(columns)
        what = "The input and the ideal output are not clear from the names of the columns"
        do = "Use --input COLUMN --output COLUMN, or templates such as '{{ key[0].text }}'."
        super().__init__(what, where=where, fix=f"{do} Columns: {shown_columns(columns)}")


@dataclass(frozen=True)
class TaskOfAnswers:
    """The task of some answers with the reason for it."""

    name: TaskName
    because: str
    variants: dict[TaskName, Task]
    """Tasks whose usual metric does not fit these answers, with another one."""

    @property
    def task(self) -> Task:
        """The task, with a metric that fits these answers."""
        return self.variants.get(self.name, TASKS[self.name])

    @property
    def metrics(self) -> dict[str, Any]:
        """Keys of the config's section ``evaluate``."""
        extra = {"extra_metrics": self.task.extra_metrics} if self.task.extra_metrics else {}
        return {"metric": self.task.metric, **extra}


@dataclass(frozen=True)
class Proposal(TaskOfAnswers):
    """Sources as they were named, the first one's format and columns, and the task of their answers."""

    sources: tuple[str, ...]
    format: str
    data: DataConfig
    first: Example
    rows: int
    """Examples among the first rows, which are all rows of small sources; of a split by names, those of train."""
    splits: Mapping[str, Split]
    """The split of each source, if all are files whose names say it; empty if not."""
    labels: tuple[str, ...]
    """The different answers, in order of appearance; empty if there are many, or if rows were not read."""

    @property
    def columns(self) -> dict[str, Any]:
        """Settings of the config's section ``data`` that read the rows."""
        return {key: value for key in _READING if (value := getattr(self.data, key)) is not None}

    @property
    def lines(self) -> list[str]:
        """Lines on the format, the columns and the first row."""
        first = excerpts([self.first.input_text, self.first.output])
        named = [f"{key}: {value}" for key, value in self.columns.items()]
        return [f"{self.sources[0]}: {self.format}", *named, f"First input: {first[0]}", f"First output: {first[1]}"]

    @property
    def instruction(self) -> str | None:
        """Line on the instruction that all prompts share; None if the first row has a system turn of its own."""
        if self.first.messages[0].role == "system":
            return None
        if self.name == "labels" and self.labels:
            such = json.dumps(f"Answer with one of: {', '.join(self.labels)}.", ensure_ascii=False)
            return f"Instruction: none. data.system_prompt in tunewright.yaml adds one, such as {such}"
        return "Instruction: none (data.system_prompt in tunewright.yaml adds one, for every prompt)"

    @property
    def training_rows(self) -> int:
        """Return about how many of ``rows`` are for training, once dev and test are drawn if no file is theirs."""
        given = self.splits.values()
        drawn = {"dev": self.data.val_size, "test": self.data.test_size}
        return round(self.rows * (1 - sum(share for split, share in drawn.items() if split not in given)))

    def paths(self, directory: Path) -> list[str]:
        """Return the sources for a project in ``directory``; relative paths become relative to it."""
        return [
            name if is_hub_name(name) or Path(name).is_absolute() else Path(os.path.relpath(name, directory)).as_posix()
            for name in self.sources
        ]

    def sections(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Return the config's sections for a project in ``directory``."""
        sources: list[Any] = self.paths(directory)
        if self.splits:
            pairs = zip(sources, self.sources, strict=True)
            sources = [{"path": path, "split": self.splits[name]} for path, name in pairs]
        return {"data": {"sources": sources, **self.columns}, "evaluate": self.metrics}


def propose(sources: Sequence[str], mapping: ColumnMapping, reporter: Reporter) -> Proposal:
    """Look at the first rows of all files; columns that ``mapping`` does not name are found by their names.

    Raises:
        AmbiguousColumnsError: the names of the columns do not say which are input and output.
        UserError: a file cannot be read, or none of its first rows is an example.
    """
    splits = _splits_by_name(sources)
    if splits:  # training files decide the format, and their rows are counted
        sources = sorted(sources, key=lambda name: splits[name] != "train")
    files = source_files(sources, reporter)
    if not splits and (notice := unused_split_notice(files)):
        reporter.say(notice)
    file = files[0]
    data = map_columns(DataConfig(), mapping, [file])
    try:
        rows = list(islice(scan_pairs(file, data, []), _LOOKED_AT))
    except UserError as error:
        if isinstance(error, RowsElsewhereError) or not _unmapped(file, data):
            raise
        rows = []
    examples = [row.example for row in rows if isinstance(row, SourceRow)]
    if not examples and (columns := _unmapped(file, data)):
        input_, output = _pair(columns, data, str(file))
        data = data.model_copy(update={"input": input_, "output": output})
        rows = list(islice(scan_pairs(file, data, []), _LOOKED_AT))
        examples = [row.example for row in rows if isinstance(row, SourceRow)]
    _require_example(rows)
    count, whole = len(examples), len(rows) < _LOOKED_AT
    for other in files[1:]:
        if (left := _LOOKED_AT - len(examples)) > 0:
            rows = list(islice(scan_pairs(other, data, []), left))
            _require_example(rows)
            whole = whole and len(rows) < left
            more = [row.example for row in rows if isinstance(row, SourceRow)]
            examples += more
            count += len(more) if not splits or split_by_name(other) == "train" else 0
    kind = open_source(file, data, []).kind
    labels = tuple(dict.fromkeys(example.output.strip() for example in examples))
    return Proposal(
        **vars(task_of(examples)),
        sources=tuple(sources),
        format=kind,
        data=data,
        first=examples[0],
        rows=count,
        splits=splits,
        labels=labels if whole and len(labels) <= _MOST_LABELS and all(map(str.isprintable, labels)) else (),
    )


def _splits_by_name(sources: Sequence[str]) -> dict[str, Split]:
    """Return each source's split, if all are files whose names say it and train and test are among them."""
    named = {name: split_by_name(Path(name)) for name in sources if Path(name).is_file()}
    splits = {name: split for name, split in named.items() if split is not None}
    return splits if len(splits) == len(set(sources)) and {"train", "test"} <= set(splits.values()) else {}


def _require_example(rows: Sequence[SourceRow | Fault]) -> None:
    faults = [row for row in rows if isinstance(row, Fault)]
    if faults and len(faults) == len(rows):
        what = f"None of the first rows is an example: {faults[0].reason}"
        raise UserError(what, where=f"{faults[0].source}:{faults[0].line}", fix=faults[0].fix)


def _unmapped(file: Path, data: DataConfig) -> dict[str, Any]:
    """Return the columns or keys of the first rows, if no format and nothing in ``data`` says which are the pair's.

    Each has its first value.
    """
    if data.input is not None and data.output is not None:
        return {}
    columns = first_values(file, data)
    return columns if len(columns) > 1 and _CHATS.isdisjoint(columns) else {}


def _pair(columns: Mapping[str, Any], data: DataConfig, where: str) -> tuple[str, str]:
    """Return the columns of the input and the output; one of them may be given."""
    if data.input is not None or data.output is not None:
        wanted = _INPUT if data.input is None else _OUTPUT
        rest = [name for name in columns if name not in (data.input, data.output)]
        named = [name for name in rest if wanted.fullmatch(name.strip().casefold())]
        others = named or [name for name in rest if name.strip().casefold() not in _IDS]
        if len(others) != 1:
            raise AmbiguousColumnsError(columns, where)
        return data.input or others[0], data.output or others[0]
    plain = {name: name.strip().casefold() for name in columns}
    outputs = [name for name in columns if _OUTPUT.fullmatch(plain[name])]
    inputs = [name for name in columns if _INPUT.fullmatch(plain[name])]
    if len(inputs) > 1:  # text to SQL has the columns question and query
        inputs = [name for name in inputs if name not in outputs]
    outputs = [name for name in outputs if name not in inputs]
    if len(inputs) == 1 and len(outputs) == 1:
        return inputs[0], outputs[0]
    others = [name for name in columns if plain[name] not in _IDS]
    if len(others) == 2 and others[0] not in outputs:
        return others[0], others[1]
    raise AmbiguousColumnsError(columns, where)


def task_of(examples: Sequence[Example]) -> TaskOfAnswers:
    """Return the task of the answers, the observation that decides it, and metrics that fit better than the usual."""
    examples = examples[:_LOOKED_AT]
    letters = [each for example in examples for each in example.output if each.isalnum()]
    counts = Counter(example.output.strip() for example in examples)
    variants: dict[TaskName, Task] = {}
    if sum(each.isascii() for each in letters) < _LATIN * len(letters):  # rouge_l reads words of a-z and 0-9
        variants["text"] = _OTHER_SCRIPT
    if 1 < len(counts) <= MOST_CLASSES and 2 * max(counts.values()) > len(examples):
        variants["labels"] = _UNEVEN
    return TaskOfAnswers(*_task_and_reason(examples), variants)


def _task_and_reason(examples: Sequence[Example]) -> tuple[TaskName, str]:
    answers, count = [example.output.strip() for example in examples], len(examples)
    calls = sum(bool(example.messages[-1].calls) for example in examples)
    if calls:
        return "calls", f"{calls:,} of {count_of(count, 'answer')} call functions"
    forms: dict[TaskName, Callable[[str], object]] = {"json": _is_object, "sql": _SQL.match}
    for name, matches in forms.items():
        number = sum(bool(matches(answer)) for answer in answers)
        if number >= _MOSTLY * count:
            return name, f"{number:,} of {count_of(count, 'answer')} are {TASKS[name].answers}"
    times, length = Counter(answers), median(map(len, answers))
    repeated = sum(number for number in times.values() if number > 1)
    if repeated >= _MOSTLY * count and length <= _LABEL:
        first = "the first " if count == _LOOKED_AT else ""
        return "labels", f"{count_of(len(times), 'different answer')} in {first}{count_of(count, 'row')}"
    turns = sum(any(message.role == "assistant" for message in example.prompt) for example in examples)
    if turns >= count / 2:
        return "chat", f"{turns:,} of {count_of(count, 'row')} have earlier answers"
    return (
        "short" if length <= _SHORT else "text",
        f"the median answer has {count_of(round(length), 'character')}, and few are repeated",
    )


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
