"""Reading a dataset: its versions and rows, searched, traced, compared and exported.

The functions that take a project are verbs: ``tunewright data show`` is :func:`show`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.csv import safe_cell
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, new_file, write_json, write_text
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.data import dedup, trace, versions
from tunewright.data.dedup.leakage import LeakageReport, measure_leakage
from tunewright.data.examples import Example, find_labels
from tunewright.data.readers.validate import rejected_messages
from tunewright.data.remove import count_measured
from tunewright.data.review.edits import superseded_keys
from tunewright.data.review.reviews import DrawEvent, NoteEvent, ReviewLog, UndoEvent, VerdictEvent, read_reviews
from tunewright.data.review.suspects import conflicts
from tunewright.data.splits import SPLITS, Split
from tunewright.data.trace import KnownPlaces, RowOrigin, RowUse, metadata_by_key, places_by_key, row_uses
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Member,
    list_versions,
    load_version,
    row_numbers,
    short,
)
from tunewright.data.versions import diff as differences
from tunewright.data.versions.diff import Diff


def version(project: OpenFolder, digest: str | None = None) -> DatasetVersion:
    """Return a dataset version (None: the current one)."""
    return load_version(project.folder.dataset, digest)


def log(project: OpenFolder) -> list[Manifest]:
    """Return the dataset's versions, newest last."""
    return list_versions(project.folder.dataset)


def show(project: OpenFolder, row: str) -> Member:
    """Return one row of the current version, by its number, the beginning of its key or ``FILE:LINE``."""
    return trace.find_row(project.folder.dataset, load_version(project.folder.dataset), row)


def numbers(project: OpenFolder) -> dict[str, int]:
    """Return the number of each row of the current version and its ancestors, by pair key."""
    return row_numbers(project.folder.dataset, load_version(project.folder.dataset).manifest)


def metadata(project: OpenFolder, key: str) -> dict[str, Any]:
    """Return a current row's metadata from its source file, by the row's full key."""
    manifest = load_version(project.folder.dataset).manifest
    return trace.metadata_by_key(project.folder.dataset, manifest).get(key, {})


def cluster_counts(project: OpenFolder, member: Member) -> tuple[int, int]:
    """Return the number of rows in a row's cluster, and how many of them share its output."""
    return dedup.cluster_counts(load_version(project.folder.dataset), member)


def leakage(project: OpenFolder) -> LeakageReport:
    """Return the similarity of held-out rows to training rows, compared with a random split."""
    return measure_leakage(load_version(project.folder.dataset), project.folder.config.seed, project.reporter)


def diff(project: OpenFolder, a: str, b: str | None = None) -> Diff:
    """Return the differences between two versions (the second: the current one by default)."""
    before, after = (load_version(project.folder.dataset, digest, without_purged=True) for digest in (a, b))
    return differences.diff(before, after)


def blame(project: OpenFolder, row: str) -> RowOrigin:
    """Return a current row's origin: its file and the version that added it; ``row`` as in :meth:`show`."""
    dataset, current = project.folder.dataset, load_version(project.folder.dataset)
    return trace.blame(dataset, current, trace.find_row(dataset, current, row).key)


def trained_by(project: OpenFolder, row: str) -> tuple[str, tuple[RowUse, ...]]:
    """Return a row's key and its use in each adapter's training.

    Args:
        row: as in :meth:`show`; also the key of an earlier version's row, since adapters may have seen it there.
    """
    key = trace.find_key(project.folder.dataset, load_version(project.folder.dataset), row)
    return key, trace.uses_of_row(project.folder.dataset, project.folder.adapters, key)


def checkout(project: OpenFolder, version: str) -> Manifest:
    """Make an existing version the current one, by its number, its digest or the beginning of it."""
    return versions.checkout(project.folder.dataset, version)


FLAGS = ("suspect", "wrong", "conflict", "generated", "edited", "mixed")
SORTS = ("newest", "input", "answer")
"""Orders of rows, besides the order of their numbers."""
NO_VERDICT = "none"
DISPUTED = "disputed"


@dataclass(frozen=True)
class RowQuery:
    """Conditions that a row must meet; every row meets an empty query."""

    words: str = ""
    """Words, separated by white space; each occurs in the key, input or output, ignoring case. Or a row's number."""
    split: str = ""
    answer: str = ""
    """The whole answer; a part of it where no row has this answer."""
    verdict: str = ""
    """A verdict that a reviewer gave, ``NO_VERDICT`` or ``DISPUTED``."""
    cluster: str = ""
    """First digits of the cluster."""
    source: str = ""
    """The file that the row was first read from."""
    flag: str = ""
    """One of ``FLAGS``."""
    sort: str = ""
    """One of ``SORTS``."""


class RowIndex:
    """The rows of a version, ready to be searched.

    Sources, metadata, edits and conflicts are looked up when the first query asks for them, and kept.
    """

    def __init__(self, dataset: Path, version: DatasetVersion) -> None:
        self._dataset = dataset
        self._version = version
        self._texts = tuple(f"{m.key} {m.example.input_text} {m.example.output}".casefold() for m in version.members)

    def find(
        self, query: RowQuery, reviews: ReviewLog, suspects: Mapping[str, object] = MappingProxyType({})
    ) -> list[Member]:
        """Return the matching rows in order; ``suspects`` has the keys of rows with that flag, the worst first."""
        members = self._version.members
        places: Sequence[int] = range(len(members))
        if query.split:
            places = [i for i in places if members[i].split == query.split]
        if query.cluster:
            places = [i for i in places if members[i].cluster.startswith(query.cluster.lower())]
        if query.source:
            sources = self._source_of_each
            places = [i for i in places if sources[i] == query.source]
        if query.flag in ("generated", "mixed"):
            places = [i for i in places if getattr(members[i], query.flag)]
        elif query.flag == "wrong":
            places = [i for i in places if reviews.finding(members[i].key) == "wrong"]
        elif query.flag:
            flagged = suspects if query.flag == "suspect" else self._flagged[query.flag]
            places = [i for i in places if members[i].key in flagged]
        if query.answer:
            wanted = query.answer.strip()
            whole = [i for i in places if members[i].example.output.strip() == wanted]
            part = wanted.casefold()
            places = whole or [i for i in places if part in members[i].example.output.casefold()]
        if query.verdict:
            places = [i for i in places if query.verdict in verdicts_on(reviews, members[i].key)]
        number = re.fullmatch(r"(?:row\s*|#)?(\d+)", query.words.strip().casefold())
        named = int(number[1]) if number else 0
        words = query.words.casefold().split()
        places = [
            i
            for i in places
            if all(word in self._texts[i] for word in words) or (named and self.numbers.get(members[i].key) == named)
        ]
        return sorted((members[i] for i in places), key=self._order(query, named, suspects))

    def _order(self, query: RowQuery, named: int, suspects: Mapping[str, object]) -> Callable[[Member], Any]:
        """Return the key by which the rows of a query are sorted; a row that the search names is the first."""
        rank = {key: place for place, key in enumerate(suspects)}

        def order(member: Member) -> tuple[bool, str | int, int]:
            number = self.numbers.get(member.key, 0)
            if query.sort in ("input", "answer"):
                text = member.example.input_text if query.sort == "input" else member.example.output
                return number != named, text.casefold(), number
            by = -number if query.sort == "newest" else rank.get(member.key, 0)
            return number != named, by, number

        return order

    @cached_property
    def answers(self) -> dict[str, int]:
        """The number of rows with each answer, in alphabetical order; empty if the answers are no classes."""
        outputs = [member.example.output for member in self._version.domain]
        found = find_labels(outputs)
        counts = Counter(output.strip() for output in outputs)
        return {label: counts[label] for label in sorted(found)}

    @cached_property
    def sources(self) -> list[str]:
        """All files that rows of the version were first read from."""
        return sorted(set(filter(None, self._source_of_each)))

    @cached_property
    def _source_of_each(self) -> list[str]:
        """The file of each member; empty if no import records it."""
        places = places_by_key(self._dataset, self._version.manifest)
        return [sys.intern(places.get(m.key, "").rpartition(":")[0]) for m in self._version.members]

    @cached_property
    def metadata(self) -> Mapping[str, Mapping[str, Any]]:
        """The metadata of each row with metadata, by pair key."""
        return metadata_by_key(self._dataset, self._version.manifest)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each row, by pair key."""
        return row_numbers(self._dataset, self._version.manifest)

    def flags_of(self, member: Member, reviews: ReviewLog) -> list[str]:
        """Return a row's flags; ``suspect`` is not among them."""
        flags = ["wrong"] if reviews.finding(member.key) == "wrong" else []
        flags += [flag for flag in ("conflict", "edited") if member.key in self._flagged[flag]]
        return flags + [flag for flag in ("generated", "mixed") if getattr(member, flag)]

    @cached_property
    def _flagged(self) -> dict[str, frozenset[str]]:
        return {
            "conflict": frozenset(each.key for each in conflicts(self._version.domain)),
            "edited": frozenset(superseded_keys(self._dataset, self._version.manifest).values()),
        }


def verdicts_on(reviews: ReviewLog, key: str) -> set[str]:
    """Return the current verdicts on a row, with ``DISPUTED`` if they differ; of a row without one, ``NO_VERDICT``."""
    verdicts = {str(judged.verdict) for judged in reviews.current_verdicts(key).values()}
    return (verdicts | ({DISPUTED} if reviews.disputed(key) else set())) or {NO_VERDICT}


@dataclass(frozen=True)
class RowHistory:
    """The history of a row of the current version; versions and reviews are sorted by time."""

    origin: RowOrigin
    versions: tuple[Manifest, ...]
    """Versions that have the row."""
    reviews: tuple[VerdictEvent | NoteEvent | UndoEvent, ...]
    """All verdicts and notes, and each verdict that was taken back."""
    adapters: tuple[RowUse, ...]
    """Adapters whose dataset version has the row, or may have it."""
    evaluations: tuple[str, ...]
    """Evaluations that measured on the row, by their folders' names."""


def row_history(project: ProjectFolder, version: DatasetVersion, key: str, places: KnownPlaces) -> RowHistory:
    """Return the history of a row, by its full key."""
    dataset = project.dataset
    events = [event for event in read_reviews(dataset).events if not isinstance(event, DrawEvent)]
    uses = row_uses(dataset, project.adapters, [key], places)[key]
    return RowHistory(
        origin=trace.blame(dataset, version, key),
        versions=tuple(each for each in list_versions(dataset) if key in (places.of(each.digest) or ())),
        reviews=tuple(event for event in events if event.key == key),
        adapters=tuple(use for use in uses if use.use != "absent"),
        evaluations=tuple(count_measured(project.evaluations, [key])),
    )


# Export

Format = Literal["chat", "alpaca", "csv", "parquet", "preference"]
FORMATS: tuple[Format, ...] = get_args(Format)

_NAMED = 5  # rows named in a refusal


@dataclass(frozen=True)
class Exported:
    """Result of an export; ``system`` is the turn that all rows share and that CSV cannot store."""

    path: Path
    format: Format
    version: str
    split: Split | None
    rows: int
    system: str | None = None


def export(
    project: OpenFolder,
    out: str | Path,
    form: Format = "chat",
    *,
    split: Split | None = None,
    version: str | None = None,
    metadata: bool = False,
) -> Exported:
    """Write a version (the current one by default), or one of its splits, to a file for other tools, atomically.

    chat: JSON lines of ``{"messages": [...], "tools": [...]}`` (OpenAI's format), tools only if the row has any.
    alpaca: one JSON array of instruction, input (always empty), output and, where a row has a system turn, system.
    csv: the columns prompt and completion. parquet: the column messages (and tools, as JSON, if a row has any), zstd,
    with the version's digest in the schema's metadata. preference: JSON lines of prompt, chosen and rejected, each a
    list of turns (TRL's format), one for each rejected answer; other rows are left out.

    ``metadata`` puts the source files' other keys before the messages of chat rows.

    Raises:
        UserError: metadata in a format other than chat, rows that the format cannot represent (named; nothing is
            written), an existing file, an empty split, an unknown format or split, a full disk.
    """
    dataset, reporter = project.folder.dataset, project.reporter
    chosen = load_version(dataset, version)
    rejected = trace.rejected_answers(dataset, chosen.manifest) if form == "preference" else {}
    extra = trace.metadata_by_key(dataset, chosen.manifest) if metadata else None
    return write_version(chosen, Path(out), form, reporter, split=split, metadata=extra, rejected=rejected)


def write_version(
    version: DatasetVersion,
    path: Path,
    form: Format,
    reporter: Reporter,
    *,
    split: Split | None = None,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    rejected: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> Exported:
    """Write a version as :func:`export` does, with metadata and rejected answers by pair key."""
    if form not in FORMATS:
        raise UserError(f"Unknown format {form!r}", where="--format", fix=f"Formats: {', '.join(FORMATS)}.")
    if split is not None and split not in SPLITS:
        raise UserError(f"Unknown split {split!r}", where="--split", fix=f"Splits: {', '.join(SPLITS)}.")
    if path.exists():
        raise UserError("The file exists already", where=str(path), fix="Choose another name, or delete it first.")
    if metadata is not None and form != "chat":
        raise UserError(f"--metadata requires the format chat (got {form})", fix="Export as chat.")
    members = [m for m in version.members if split in (None, m.split)]
    if not members:
        raise UserError(f"Version {short(version.digest)} has no {split} rows", where="--split")
    if form == "preference":
        return Exported(path, form, version.digest, split, _write_preferences(path, members, rejected, reporter))
    shared = _fit(members, form)
    examples = [m.example for m in members]
    with reporter.task("exporting", 1, "files") as task:
        if form == "chat":
            rows = ({**(metadata or {}).get(m.key, {}), **m.example.as_row()} for m in members)
            write_text(path, "".join(canonical_json(row) + "\n" for row in rows))
        elif form == "alpaca":
            facts = ({"instruction": e.prompt[-1].content, "input": "", "output": e.output} for e in examples)
            systems = ({} if (text := _system(e)) is None else {"system": text} for e in examples)
            write_json(path, [fact | system for fact, system in zip(facts, systems, strict=True)])
        elif form == "csv":
            _write_csv(path, examples)
        else:
            _write_parquet(path, examples, {"tunewright.version": version.digest, "tunewright.split": split or "all"})
        task.advance()
    mixed = sum(m.mixed for m in members)
    if mixed:
        reporter.warn(
            f"{mixed:,} of the {len(members):,} rows are generic mix-in, which the file does not mark. Added to a "
            "dataset, they would become domain rows."
        )
    if shared is not None:
        reporter.warn(
            f"CSV cannot store the system turn that all {len(members):,} rows share: it is not in {path}. To read the "
            f"file back as the same examples, set data.system_prompt to: {shared}"
        )
    formulas = [e for e in examples if any(safe_cell(text) != text for text in (e.prompt[-1].content, e.output))]
    if form == "csv" and formulas:
        reporter.warn(
            f"{count_of(len(formulas), 'row')} of {path} begin as a formula, and are written unchanged for other "
            "tools. A spreadsheet may run them: import the columns as text."
        )
    return Exported(path, form, version.digest, split, len(members), shared)


def _fit(members: Sequence[Member], form: Format) -> str | None:
    """Return the system turn that all rows share, if the format cannot store it."""
    if form in ("chat", "parquet"):
        return None
    _refuse(members, form, "functions and calls", lambda e: e.messages[0].role == "tools")
    _refuse(members, form, "weights on turns", lambda e: any(m.weight != 1 for m in e.messages))
    _refuse(members, form, "conversations of several turns", lambda e: sum(m.role == "user" for m in e.messages) > 1)
    _refuse(members, form, "thinking", lambda e: any(m.reasoning for m in e.messages))
    systems = {m.example.messages[0].content if m.example.messages[0].role == "system" else None for m in members}
    if form == "alpaca" or systems == {None}:
        return None
    if len(systems) > 1:
        common = max(systems, key=lambda s: sum(_system(m.example) == s for m in members))
        _refuse(members, form, "system turns that differ between rows", lambda e: _system(e) != common)
    return systems.pop()


def _system(example: Example) -> str | None:
    first = example.messages[0]
    return first.content if first.role == "system" else None


def _refuse(members: Sequence[Member], form: Format, what: str, wrong: Callable[[Example], bool]) -> None:
    found = [short(m.key) for m in members if wrong(m.example)]
    if found:
        more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
        raise UserError(
            f"{form} cannot represent {what}, which {len(found):,} of {len(members):,} rows have: "
            f"{', '.join(found[:_NAMED])}{more}",
            where="--format",
            fix="Export as chat or parquet.",
        )


def _write_preferences(
    path: Path, members: Sequence[Member], rejected: Mapping[str, Sequence[Any]], reporter: Reporter
) -> int:
    """Write a line for each rejected answer, and return the number of lines."""
    lines = []
    for member in members:
        messages = member.example.messages
        asked = max(i for i, message in enumerate(messages) if message.role == "user") + 1
        prompt, chosen = ([turn.as_dict() for turn in part] for part in (messages[:asked], messages[asked:]))
        row: dict[str, Any] = {"prompt": prompt, "chosen": chosen}
        if messages[0].role == "tools":
            row |= {"prompt": prompt[1:], "tools": json.loads(messages[0].content)}
        for answer in rejected.get(member.key, ()):
            turns = [turn.as_dict() for turn in rejected_messages(answer)]
            if turns != chosen:  # a reviewer may have chosen the answer since
                lines.append(canonical_json({**row, "rejected": turns}))
    if not lines:
        what = "No row has a rejected answer"
        raise UserError(what, where="--format", fix="Add preference rows, or export as chat.")
    write_text(path, "".join(line + "\n" for line in lines))
    without = sum(member.key not in rejected for member in members)
    if without:
        reporter.warn(f"{count_of(without, 'row')} without a rejected answer left out of {path}")
    return len(lines)


def _write_csv(path: Path, examples: Sequence[Example]) -> None:
    text = io.StringIO(newline="")
    # Quote every field: some readers take a lone carriage return outside of quotes for a line break.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["prompt", "completion"])
    writer.writerows([e.prompt[-1].content, e.output] for e in examples)
    write_text(path, text.getvalue())


def _write_parquet(path: Path, examples: Sequence[Example], facts: dict[str, str]) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    fields = [pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)]
    # Only if a row needs it: some readers refuse turns with an unknown key.
    if any(m.weight != 1 for e in examples for m in e.messages):
        fields.append(pa.field("weight", pa.int8()))
    if any(m.reasoning for e in examples for m in e.messages):
        fields.append(pa.field("reasoning_content", pa.string()))
    columns = []
    if any(m.calls for e in examples for m in e.messages):
        function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
        call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
        fields += [pa.field("tool_calls", pa.list_(call)), pa.field("tool_call_id", pa.string())]
    rows = [e.as_row() for e in examples]
    if any("tools" in row for row in rows):
        columns.append(pa.field("tools", pa.string()))  # as JSON: a column has one type, but schemas differ
        rows = [{**row, "tools": canonical_json(row["tools"])} if "tools" in row else row for row in rows]
    columns.insert(0, pa.field("messages", pa.list_(pa.struct(fields)), nullable=False))
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns, metadata=facts))
    with new_file(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
