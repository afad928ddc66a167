"""Rows that contain an item of a test split or of a benchmark, word for word or nearly so.

The method follows GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C). Texts are compared as words in lower case
without punctuation; a shared run of 13 words is a hit, and runs of many items are ignored as boilerplate. Most domain
rows are shorter, so a text with fewer than 13 words is searched for as a whole. A text with fewer than 5 words, which
may occur by chance, counts only if it is the whole row.

An assistant turn counts if it contains an item, since a text that quotes a benchmark teaches it. It does not count

- with fewer than 5 words, or as a label: the output ``cancel`` does not reveal the test input ``cancel``;
- as a part of an item: an answer that quotes its input (a name, a clause) may also occur in another input.

``output_leakage`` compares outputs with outputs.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import normalize
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.examples import Example, find_labels
from tunewright.data.versions import DatasetVersion, Member, short

RUN = 13  # words
FEWEST = 5  # words
CONTAINED = 0.8  # share of an item's runs
_ROWS = 500  # rows that a worker searches at once
_SENT = 200_000  # items indexed by each worker, at 3 KB each: bounds its memory, not the result
BOILERPLATE = 10  # items: a run that more items of a source share is a phrase of the suite
FIELDS = ("question", "query", "prompt", "instruction", "input", "text")

MatchKind = Literal["equal", "contained", "overlap"]
Words = tuple[str, ...]


@dataclass(frozen=True)
class ContaminationHit:
    """A row that contains an item of a source."""

    row: str  # its key
    source: str  # its name
    item: int  # its index in the source
    how: MatchKind
    """Equal (one of the row's turns is the item), contained (the row has at least 80% of the item's runs of words, or
    its input is a part of the item), or overlap (the row has some of the runs)."""
    score: float
    """The share of the runs for equal and contained; for overlap the longest shared run as a share of the item."""


@dataclass(frozen=True)
class _Source:
    """Index of a source's items, without their common first words."""

    name: str
    items: list[Words]
    equal: dict[Words, list[int]]
    runs: dict[int, dict[Words, tuple[int, ...]]]  # length to run to the items that contain it, without boilerplate
    counted: Counter[int]  # number of these runs by item


def find_hits(
    rows: Mapping[str, Example],
    against: Mapping[str, Sequence[str]],
    reporter: Reporter,
    labels: Collection[str] = frozenset(),
    workers: Workers = THIS_PROCESS,
) -> list[ContaminationHit]:
    """Return the best hit of each row and item, sorted by row, source and item.

    ``against`` maps the name of each source, such as "test split" or a file's, to the texts of its items. Outputs that
    are ``labels`` (``find_labels``) are ignored as assistant turns.
    """
    if sum(map(len, against.values())) > _SENT:
        workers = THIS_PROCESS
    hits: dict[tuple[str, str, int], ContaminationHit] = {}
    pieces: dict[str, list[str]] = defaultdict(list)
    with reporter.task("looking for test items", len(rows), "examples") as task:
        sources = [_source(name, texts) for name, texts in against.items()]
        searched = workers.map(_search_row, _Search(sources, frozenset(labels)), rows.items(), task, _ROWS)
        for key, (found, short_turns) in zip(rows, searched, strict=True):
            hits |= {(key, hit.source, hit.item): hit for hit in found}
            for turn in short_turns:
                pieces[" ".join(turn)].append(key)
        for source in sources:
            for item, row in _items_around(source, pieces):
                hits.setdefault((row, source.name, item), ContaminationHit(row, source.name, item, "contained", 1.0))
    return [hits[place] for place in sorted(hits)]


@dataclass(frozen=True)
class _Search:
    """Sources that rows are searched for, and the outputs that are labels."""

    sources: Sequence[_Source]
    labels: frozenset[str]


def _search_row(what: _Search, row: tuple[str, Example], task: Task) -> tuple[list[ContaminationHit], list[Words]]:
    """Return a row's hits, and its short user turns, which may be parts of items."""
    key, example = row
    asked = [normalised_words(m.content) for m in example.messages if m.role == "user"]
    replies = [m.text for m in example.messages if m.role in ("assistant", "tool")]
    said = [normalised_words(reply) for reply in replies if reply.strip() not in what.labels]
    turns = [*asked, *(turn for turn in said if len(turn) >= FEWEST)]
    hits = [
        ContaminationHit(key, source.name, item, how, score)
        for source in what.sources
        for item, how, score in _items_inside(turns, source)
    ]
    task.advance()
    return hits, [turn for turn in asked if FEWEST <= len(turn) < RUN]


TEST = "the test split"


def training_hits(
    members: Sequence[Member],
    benchmarks: Mapping[str, Sequence[str]],
    reporter: Reporter,
    workers: Workers = THIS_PROCESS,
) -> list[ContaminationHit]:
    """Return the hits of training rows on test inputs and benchmark items; an index in ``TEST`` counts test rows."""
    training = {m.key: m.example for m in members if m.split == "train"}
    against = {TEST: [m.example.input_text for m in _tests(members)], **benchmarks}
    return find_hits(training, against, reporter, find_labels(m.example.output for m in members), workers)


def item_names(hits: Sequence[ContaminationHit], members: Sequence[Member]) -> list[str]:
    """Return a name for each hit's item: the test row's key, or the file and the item's number, from 1."""
    tests = _tests(members)
    return [
        f"test row {short(tests[hit.item].key)}" if hit.source == TEST else f"item {hit.item + 1} of {hit.source}"
        for hit in hits
    ]


def _tests(members: Sequence[Member]) -> list[Member]:
    return [m for m in members if m.split == "test"]


def read_items(path: Path, field: str | None = None) -> list[str]:
    """Return the items of a JSONL file, each a string, a conversation or an object with its text in a field.

    Without a field it is the first of ``FIELDS`` in an object, else the last user turn of its ``messages``.
    """
    try:
        # Not splitlines, which also splits at line and page separators inside texts.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"Cannot read the file: {error.strerror}", where=str(path), fix="Name a JSONL file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8: {error.reason}", where=str(path), fix="Name a JSONL file in UTF-8.") from None
    return [_item(line, field, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _item(line: str, field: str | None, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"Not JSON: {error}", where=where, fix="Write one JSON value per line.") from None
    if isinstance(value, dict):
        named = next((value[name] for name in ([field] if field else FIELDS) if name in value), None)
        value = _last_user_turn(value.get("messages")) if named is None and field is None else named
    if not isinstance(value, str):
        looked_for = field or f"{', '.join(FIELDS)}, or a user turn of messages"
        raise UserError(
            f"No text in {looked_for}",
            where=where,
            fix='Write each item as a JSON string, as an object such as {"question": "..."}, or as a chat whose last '
            "user turn is the item.",
        )
    return value


def _last_user_turn(messages: object) -> object:
    """Return the last user turn of a chat export, with text parts joined; None if there is none."""
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    content = next((turn.get("content") for turn in reversed(turns) if turn.get("role") == "user"), None)
    if not isinstance(content, list):
        return content
    parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(parts) if parts else None


def normalised_words(text: str) -> Words:
    """Return a text as words: NFKC, case folded, without punctuation."""
    return tuple(re.findall(r"\w+", normalize(text, "NFKC").casefold()))


def _runs(words: Words, length: int) -> Iterator[Words]:
    return (words[i : i + length] for i in range(len(words) - length + 1))


def _source(name: str, texts: Sequence[str]) -> _Source:
    spelled: dict[str, str] = {}  # one object for each distinct word
    whole = [tuple([spelled.setdefault(word, word) for word in normalised_words(text)]) for text in texts]
    # A copy may lack a common beginning such as "Question:" or an instruction, which the first and last text show.
    low, high = min(whole, default=()), max(whole, default=())
    pairs = enumerate(zip(low, high, strict=False))
    head = 0 if low == high else next((i for i, (a, b) in pairs if a != b), len(low))
    items = [words[head:] for words in whole]
    equal: dict[Words, list[int]] = defaultdict(list)
    runs: dict[int, dict[Words, tuple[int, ...]]] = {}
    for number, words in enumerate(items):
        for spelling in {whole[number], words} - {()}:
            equal[spelling].append(number)
        if len(words) >= FEWEST:
            length = min(RUN, len(words))
            table = runs.setdefault(length, {})
            for run in dict.fromkeys(_runs(words, length)):
                numbers = table.get(run, ())
                if len(numbers) <= BOILERPLATE:  # one more item shows that the run is boilerplate
                    table[run] = (*numbers, number)
    for table in runs.values():
        for run in [run for run, numbers in table.items() if len(numbers) > BOILERPLATE]:
            del table[run]
    counted = Counter(number for table in runs.values() for numbers in table.values() for number in numbers)
    return _Source(name, items, equal, runs, counted)


def _items_inside(turns: Sequence[Words], source: _Source) -> Iterator[tuple[int, MatchKind, float]]:
    """Yield the items that these turns contain, each once."""
    equal = {number for turn in turns for number in source.equal.get(turn, ())}
    yield from ((number, "equal", 1.0) for number in equal)
    shared: Counter[int] = Counter()
    for length, table in source.runs.items():
        for run in {run for turn in turns for run in _runs(turn, length)}:
            if run in table:  # nearly no run is, so most need only this check
                shared.update(table[run])
    for number, count in shared.items():
        if number in equal:
            continue
        words = source.items[number]
        share = count / source.counted[number]
        if share >= CONTAINED:
            yield number, "contained", share
        else:
            matchers = (SequenceMatcher(None, words, turn, autojunk=False) for turn in turns)
            longest = max(matcher.find_longest_match().size for matcher in matchers)
            yield number, "overlap", longest / len(words)


def _items_around(source: _Source, pieces: Mapping[str, Sequence[str]]) -> Iterator[tuple[int, str]]:
    """Yield the items that contain a whole short turn, with the keys of the turn's rows, unless many contain it."""
    lengths = sorted({piece.count(" ") + 1 for piece in pieces})
    holders: dict[str, set[int]] = defaultdict(set)
    for number, words in enumerate(source.items):
        for length in lengths:
            for run in map(" ".join, _runs(words, length)):
                if run in pieces:
                    holders[run].add(number)
    for piece, numbers in holders.items():
        if len(numbers) <= BOILERPLATE:
            yield from ((number, row) for number in numbers for row in pieces[piece])


@dataclass(frozen=True)
class ContaminatedRow:
    """A training row that contains an item; ``item`` is the item's name, ``mixed`` marks the mix-in."""

    row: str
    item: str
    source: str
    how: MatchKind
    score: float
    mixed: bool


@dataclass(frozen=True)
class Contamination:
    """Result of a search: number of items by source, and the hits, most certain first."""

    looked_for: dict[str, int]
    found: tuple[ContaminatedRow, ...]

    def rows(self, source: str) -> Counter[MatchKind]:
        """Count the training rows with an item of a source, by their most certain kind of match."""
        best: dict[str, MatchKind] = {}
        for held in self.found:
            if held.source == source:
                best.setdefault(held.row, held.how)
        return Counter(best.values())

    def pairs(self, source: str) -> Counter[MatchKind]:
        """Count the pairs of a training row and an item of a source, by their kind of match."""
        return Counter(held.how for held in self.found if held.source == source)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints; the totals count the pairs in ``found``, and their rows."""
        totals = {name: {"rows": self.rows(name), "pairs": self.pairs(name)} for name in self.looked_for}
        return {**asdict(self), "totals": totals}


_SUREST: tuple[MatchKind, ...] = ("equal", "contained", "overlap")


def contamination(
    project: ProjectFolder,
    version: DatasetVersion,
    files: Sequence[Path],
    reporter: Reporter,
    workers: Workers = THIS_PROCESS,
) -> Contamination:
    """Search all training rows, including the mix-in, for test inputs and items from the config's and these files."""
    benchmarks = {name: read_items(project.root / name) for name in project.config.data.benchmarks}
    benchmarks |= {str(path): read_items(path) for path in files}
    mixed = {m.key for m in version.members if m.mixed}
    hits = sorted(
        training_hits(version.members, benchmarks, reporter, workers),
        key=lambda hit: (_SUREST.index(hit.how), -hit.score, hit.row),
    )
    found = tuple(
        ContaminatedRow(hit.row, item, hit.source, hit.how, round(hit.score, 4), hit.row in mixed)
        for hit, item in zip(hits, item_names(hits, version.members), strict=True)
    )
    return Contamination({TEST: len(version.examples("test")), **{n: len(i) for n, i in benchmarks.items()}}, found)
