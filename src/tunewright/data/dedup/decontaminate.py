"""Rows that hold an item of a test or of a general-capability suite, word for word or nearly so.

After GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C): texts are compared as words in lower case without
punctuation, a shared run of 13 words is a hit, and runs that many items have are boilerplate and count for nothing.
Most rows of a domain are shorter than 13 words, so a text with fewer is looked for as a whole; and one with fewer than
5 words, which may stand anywhere by chance, counts only where it is the whole row.

An assistant turn counts only where it holds an item, since a text that quotes a benchmark teaches it. It does not count

- with fewer than 5 words, or as a label: ``cancel`` as an output says nothing of the test input ``cancel``;
- as a piece of an item: an answer that quotes its own input (a name, a clause) may well stand in another input too.

Outputs are compared with outputs in ``output_leak``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.data.outputs import labels_among
from tunewright.data.versions import Member, short

RUN = 13  # words
FEWEST = 5  # words
CONTAINED = 0.8  # of an item's runs
BOILERPLATE = 10  # items: a run that more of one source have is a phrase of the suite
FIELDS = ("question", "query", "prompt", "instruction", "input", "text")

How = Literal["equal", "contained", "overlap"]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """A row that holds an item of a source.

    Attributes:
        row: the row's key.
        source: the name of the source.
        item: the item's number in it, from 0.
        how: equal (one of the row's turns is the item), contained (the row holds at least 80% of the item's runs of
            words, or its input is itself a piece of the item), overlap (it holds some of them).
        score: for equal and contained the share of the runs that is shared; for overlap the longest shared run of
            words, as a share of the item's words.
    """

    row: str
    source: str
    item: int
    how: How
    score: float

    def as_dict(self) -> dict[str, Any]:
        """Return the hit as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class _Source:
    """A source's items, without the words that all of them begin with, ready to be looked for."""

    name: str
    items: list[Words]
    equal: dict[Words, list[int]]
    runs: dict[int, dict[Words, list[int]]]  # length of a run to runs to the items that have them, no boilerplate
    counted: Counter[int]  # how many of these runs an item has


def contaminated(
    rows: Mapping[str, Example],
    against: Mapping[str, Sequence[str]],
    reporter: Reporter,
    labels: Collection[str] = frozenset(),
) -> list[Hit]:
    """The rows that hold an item of any source, each with its best hit per item, in order of row, source and item.

    Args:
        rows: training rows (or a generic mix-in) by key; user turns count, and assistant turns that are not short.
        against: the name of each source, such as "test split" or a file's, to the texts of its items.
        reporter: shows the progress.
        labels: outputs that are labels (``labels_among``): as assistant turns they do not count.
    """
    sources = [_source(name, texts) for name, texts in against.items()]
    hits: dict[tuple[str, str, int], Hit] = {}
    pieces: dict[Words, list[str]] = defaultdict(list)
    with reporter.task("looking for test items", len(rows), "examples") as task:
        for key, example in rows.items():
            asked = [words_of(m.content) for m in example.messages if m.role == "user"]
            replies = [m.content for m in example.messages if m.role == "assistant"]
            said = [words_of(reply) for reply in replies if reply.strip() not in labels]
            turns = [*asked, *(turn for turn in said if len(turn) >= FEWEST)]
            for turn in asked:
                if FEWEST <= len(turn) < RUN:
                    pieces[turn].append(key)
            for source in sources:
                for item, how, score in _found(turns, source):
                    hits[key, source.name, item] = Hit(key, source.name, item, how, score)
            task.advance()
    for source in sources:
        for item, row in _holding(source, pieces):
            hits.setdefault((row, source.name, item), Hit(row, source.name, item, "contained", 1.0))
    return [hits[place] for place in sorted(hits)]


TEST = "the test split"


def training_hits(members: Sequence[Member], benchmarks: Mapping[str, Sequence[str]], reporter: Reporter) -> list[Hit]:
    """Return the training rows that hold a test input or a benchmark item.

    Args:
        members: all rows of a version, or of one to be; an item's number in ``TEST`` counts its test rows, in order.
        benchmarks: the name of each file to the texts of its items.
        reporter: shows the progress.
    """
    training = {m.key: m.example for m in members if m.split == "train"}
    against = {TEST: [m.example.input_text for m in _tests(members)], **benchmarks}
    return contaminated(training, against, reporter, labels_among([m.example.output for m in members]))


def item_names(hits: Sequence[Hit], members: Sequence[Member]) -> list[str]:
    """Return what people are told of each hit's item: the test row's key, or the file and the item's number, from 1."""
    tests = _tests(members)
    return [
        f"test row {short(tests[hit.item].key)}" if hit.source == TEST else f"item {hit.item + 1} of {hit.source}"
        for hit in hits
    ]


def _tests(members: Sequence[Member]) -> list[Member]:
    return [m for m in members if m.split == "test"]


def read_items(path: Path, field: str | None = None) -> list[str]:
    """Return the items of a JSONL file, each a string, a conversation or an object with its text in a field.

    Args:
        path: the file.
        field: the field; None: the first of question, query, prompt, instruction, input and text that an object has,
            else the last user turn of its ``messages``.

    Raises:
        UserError: cannot be read, or a line without such a text (naming file and line).
    """
    try:
        # Not splitlines: it also cuts at the line and page separators that texts may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="Name a JSONL file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason}", where=str(path), fix="Name a JSONL file in UTF-8.") from None
    return [_item(line, field, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _item(line: str, field: str | None, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, fix="Put one JSON value on each line.") from None
    if isinstance(value, dict):
        named = next((value[name] for name in ([field] if field else FIELDS) if name in value), None)
        value = _last_user_turn(value.get("messages")) if named is None and field is None else named
    if not isinstance(value, str):
        looked_for = field or f"{', '.join(FIELDS)}, or a user turn of messages"
        raise UserError(
            f"no text in {looked_for}",
            where=where,
            fix='Write each item as a JSON string, as an object such as {"question": "..."}, or as a chat with '
            "messages, whose last user turn is the item.",
        )
    return value


def _last_user_turn(messages: object) -> object:
    """Return what the user said last in a chat export: a text, or its text parts joined; None where nothing is."""
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    content = next((turn.get("content") for turn in reversed(turns) if turn.get("role") == "user"), None)
    if not isinstance(content, list):
        return content
    parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(parts) if parts else None


def words_of(text: str) -> Words:
    """Return a text as words: NFKC, case folded, without punctuation."""
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _runs(words: Words, length: int) -> Iterator[Words]:
    return (words[i : i + length] for i in range(len(words) - length + 1))


def _source(name: str, texts: Sequence[str]) -> _Source:
    whole = [words_of(text) for text in texts]
    # "Question:" before every item, or an instruction: a copy may well come without it.
    head = _common_head(set(whole))
    items = [words[head:] for words in whole]
    equal: dict[Words, list[int]] = defaultdict(list)
    runs: dict[int, dict[Words, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, words in enumerate(items):
        for spelling in {whole[number], words} - {()}:
            equal[spelling].append(number)
        if len(words) >= FEWEST:
            length = min(RUN, len(words))
            for run in dict.fromkeys(_runs(words, length)):
                runs[length][run].append(number)
    for length, table in runs.items():
        runs[length] = {run: numbers for run, numbers in table.items() if len(numbers) <= BOILERPLATE}
    counted = Counter(number for table in runs.values() for numbers in table.values() for number in numbers)
    return _Source(name, items, equal, runs, counted)


def _common_head(texts: Collection[Words]) -> int:
    """How many words all texts begin with: as many as the first and the last in sorted order; 0 for a single text."""
    if len(texts) < 2:
        return 0
    low, high = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))


def _found(turns: Sequence[Words], source: _Source) -> Iterator[tuple[int, How, float]]:
    """The items that these turns hold, each once."""
    equal = {number for turn in turns for number in source.equal.get(turn, ())}
    yield from ((number, "equal", 1.0) for number in equal)
    shared: Counter[int] = Counter()
    for length, table in source.runs.items():
        for run in {run for turn in turns for run in _runs(turn, length)}:
            shared.update(table.get(run, ()))
    for number, count in shared.items():
        if number in equal:
            continue
        words = source.items[number]
        share = count / source.counted[number]
        if share >= CONTAINED:
            yield number, "contained", share
        else:
            yield number, "overlap", max(_longest(words, turn) for turn in turns) / len(words)


def _longest(a: Words, b: Words) -> int:
    return SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size


def _holding(source: _Source, pieces: Mapping[Words, Sequence[str]]) -> Iterator[tuple[int, str]]:
    """The items that hold a short turn as a whole, with the keys of its rows, unless many items do."""
    lengths = sorted({len(piece) for piece in pieces})
    holders: dict[Words, set[int]] = defaultdict(set)
    for number, words in enumerate(source.items):
        for length in lengths:
            for run in _runs(words, length):
                if run in pieces:
                    holders[run].add(number)
    for piece, numbers in holders.items():
        if len(numbers) <= BOILERPLATE:
            yield from ((number, row) for number in numbers for row in pieces[piece])
