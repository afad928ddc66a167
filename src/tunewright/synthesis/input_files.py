"""Inputs without ideal outputs, read as rows of pairs are, and screened against held-out rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, listed
from tunewright.data.dedup import find_clusters
from tunewright.data.dedup.decontaminate import TEST, find_hits, read_items
from tunewright.data.examples import Example, find_labels
from tunewright.data.readers import Fault, SourceRow, fault_of, source_size
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.schemas import parse_conversation
from tunewright.data.readers.sources import open_source
from tunewright.data.readers.validate import example_from_turns, groups_of, metadata_of
from tunewright.data.screening import screen
from tunewright.data.splits import join_groups
from tunewright.data.versions import DatasetVersion

KNOWN = "the dataset has this input"
REPEATED = "repeats an earlier input of the files"
HELD_OUT = "near-duplicate of a dev or test input, or of their group"
CONTAINS = "contains a test input or a benchmark item"

_PLACEHOLDER = "?"
_MOST = 10


@dataclass(frozen=True)
class Input:
    """An input; its example ends with the ideal output if the file has one, else with a placeholder."""

    row: SourceRow
    answered: bool

    @property
    def place(self) -> str:
        """``FILE:LINE``."""
        return f"{self.row.source}:{self.row.line}"

    @property
    def example(self) -> Example:
        """The conversation."""
        return self.row.example


def read_inputs(paths: Sequence[Path], data: DataConfig, reporter: Reporter) -> list[Input]:
    """Read files of inputs, in any format of pairs; a row may lack the answer."""
    found: list[Input] = []
    faults: list[Fault] = []
    notes: list[str] = []
    with reporter.task("reading", sum(source_size(path) for path in paths), "bytes") as task:
        for path in paths:
            source = open_source(path, data, notes, task)
            for line, row, above, parent in source.rows:
                try:
                    if isinstance(row, RowError):
                        raise row
                    whole, settings, answered = _with_placeholder(row, data)
                    conversation = parse_conversation(whole, settings, above, parent)
                    example = example_from_turns(conversation.turns, settings, conversation.tools)
                    metadata, _ = metadata_of(whole, conversation, settings)
                    place = SourceRow(example, source.name, line, groups_of(row, settings, parent), metadata)
                    found.append(Input(place, answered))
                except RowError as fault:
                    faults.append(fault_of(fault, source.name, line))
    for note in notes:
        reporter.say(note)
    if faults:
        lines = listed(map(str, faults), len(faults), _MOST, "correct these first")
        what = f"{count_of(len(faults), 'faulty row')}, nothing was generated\n{lines}"
        raise UserError(what, fix="Correct the rows. A row needs an input, and may have an ideal output.")
    if not found:
        raise UserError("The files have no rows", where=", ".join(map(str, paths)), fix="Name files of inputs.")
    screen([each.row for each in found], data.allow, reporter, redact=False, presidio=None)
    return found


def _with_placeholder(row: Mapping[str, Any], data: DataConfig) -> tuple[dict[str, Any], DataConfig, bool]:
    """Return the row with an answer, the settings that read it, and whether the answer is its own."""
    whole = dict(row)
    if data.input is not None and "{" in data.input:
        # A template of the output would fail on a row without output.
        settings = data.model_copy(update={"output": f"{{{{ {_PLACEHOLDER!r} }}}}"})
        return whole, settings, False
    if data.input is not None and data.output is not None and data.input in row:
        answered = row.get(data.output) not in (None, "")
        return whole if answered else {**whole, data.output: _PLACEHOLDER}, data, answered
    for key in ("messages", "conversation", "conversations", "interactions"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            role = turns[-1].get("role", turns[-1].get("from"))
            if role in ("assistant", "gpt", "function_call"):
                return whole, data, True
            share = "from" in turns[-1]
            turn = {"from": "gpt", "value": _PLACEHOLDER} if share else {"role": "assistant", "content": _PLACEHOLDER}
            return {**whole, key: [*turns, turn]}, data, False
    asked, answer = ("instruction", "output") if "instruction" in row else ("prompt", "completion")
    if asked in row and row.get(answer) in (None, ""):
        return {**whole, answer: _PLACEHOLDER}, data, False
    return whole, data, True


def screen_inputs(
    project: ProjectFolder, version: DatasetVersion | None, inputs: Sequence[Input], reporter: Reporter
) -> dict[int, str]:
    """Return the reason why inputs must not become rows, by position, before anybody sees an answer.

    Clusters are made as in ``data add``: similar inputs, joined by groups.
    """
    reasons: dict[int, str] = {}
    known = {m.example.prompt_key for m in version.domain} if version else set()
    first: set[str] = set()
    for place, each in enumerate(inputs):
        if each.example.prompt_key in known:
            reasons[place] = KNOWN
        elif each.example.prompt_key in first:
            reasons[place] = REPEATED
        first.add(each.example.prompt_key)
    left = {each.example.pair_key: place for place, each in enumerate(inputs) if place not in reasons}
    examples = {key: inputs[place].example for key, place in left.items()}
    config = project.config.data
    if version is not None:
        held_out = _find_held_out(version, {key: inputs[place] for key, place in left.items()}, config, reporter)
        reasons |= {left[key]: HELD_OUT for key in held_out}
    against = {name: read_items(project.root / name) for name in config.benchmarks}
    if version is not None:
        against[TEST] = [m.example.input_text for m in version.domain_of("test")]
    labels = find_labels([m.example.output for m in version.domain]) if version else frozenset()
    for hit in find_hits(examples, against, reporter, labels) if against else ():
        if hit.how != "overlap":
            reasons.setdefault(left[hit.row], CONTAINS)
    return reasons


def _find_held_out(
    version: DatasetVersion, inputs: Mapping[str, Input], config: DataConfig, reporter: Reporter
) -> frozenset[str]:
    splits = {m.key: m.split for m in version.domain}
    rows = {m.key: m.example for m in version.domain} | {key: each.example for key, each in inputs.items()}
    names = find_clusters(list(rows.values()), config.dedup_threshold, reporter)
    clusters: dict[str, list[str]] = defaultdict(list)
    for key, name in zip(rows, names, strict=True):
        clusters[name].append(key)

    def held_out(clusters: Iterable[Sequence[str]]) -> frozenset[str]:
        near = (keys for keys in clusters if any(splits.get(key) in ("dev", "test") for key in keys))
        return frozenset(key for keys in near for key in keys if key in inputs and key not in splits)

    # Inputs like a held-out row leave by themselves; only then do groups join clusters, so that one such input does not
    # take its whole document along.
    alone = held_out(clusters.values())
    clusters = {name: [key for key in keys if key not in alone] for name, keys in clusters.items()}
    groups = {m.key: m.groups for m in version.domain}
    groups |= {key: tuple(f"{n}={v}" for n, v in each.row.groups.items()) for key, each in inputs.items()}
    return alone | held_out(join_groups(clusters, groups).values())
