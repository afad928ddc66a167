"""Examples as training rows: token ids and labels, each verified before the first step, and the rows' token lengths."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from tunewright.chat.format import ChatFormat
from tunewright.chat.rendering import RenderedRow, Tokens
from tunewright.chat.tool_calls import declared_functions
from tunewright.config import ReasoningMode, TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, Task
from tunewright.core.workers import THIS_PROCESS, Workers, slices
from tunewright.data.examples import Message
from tunewright.data.splits import FEWEST_TRAINING_PAIRS, SPLITS, Split
from tunewright.data.versions import DatasetVersion, Member

IGNORED = -100
"""The label of an untrained token (PyTorch's ignore_index)."""

_MOST_NAMED = 20


@dataclass(frozen=True)
class LongRow:
    """A row with more tokens than the config allows."""

    member: Member
    row: Tokens

    def __str__(self) -> str:
        return f"{name_of(self.member)}: {len(self.row.ids):,} tokens"


@dataclass(frozen=True)
class EncodedRows:
    """The rows of some examples; an example of several turns has several rows if its template requires it."""

    rows: list[Tokens]
    members: list[Member]
    """The example of each row."""
    too_long: list[LongRow]
    faults: list[str]
    """Reasons why examples cannot be trained on, each with the example's name."""


def total_steps(settings: TrainConfig, rows: int) -> int:
    """Return the optimizer steps of a run on ``rows`` training rows."""
    return math.ceil(rows / settings.batch_size) * settings.epochs


def encode_members(chat: ChatFormat, members: Sequence[Member], max_length: int) -> EncodedRows:
    """Encode examples and verify every row; rows over ``max_length`` tokens are set apart in full, never cut."""
    layouts: list[RenderedRow] = []
    owners: list[Member] = []
    expected: list[list[Message]] = []
    faults: list[str] = []
    for member in members:
        try:
            laid_out = chat.rendered_rows(member.example.messages)
        except UserError as error:
            faults.append(f"{name_of(member)}: {error.what}")
            continue
        layouts += laid_out
        owners += [member] * len(laid_out)
        expected += expected_messages(member, len(laid_out))
    encoded = EncodedRows([], [], [], faults)
    rows = chat.tokens(layouts)
    for member, row, fault in zip(owners, rows, row_faults(chat, rows, expected), strict=True):
        if fault:
            faults.append(f"{name_of(member)}: {fault}")
        elif len(row.ids) > max_length:
            encoded.too_long.append(LongRow(member, row))
        else:
            encoded.rows.append(row)
            encoded.members.append(member)
    return encoded


def training_rows(
    chat: ChatFormat, members: Sequence[Member], max_length: int, too_long: str, reporter: Reporter
) -> EncodedRows:
    """Return the rows of one split; rows over ``max_length`` are dropped and named if ``too_long`` is "drop"."""
    encoded = encode_members(chat, members, max_length)
    if encoded.faults:
        raise UserError(
            f"{len(encoded.faults)} of {len(members)} examples cannot be trained on\n{_listed(encoded.faults)}",
            where=chat.template.name,
            fix="Correct or remove them. If the template is at fault, set chat.template to plain.",
        )
    if encoded.too_long and too_long == "error":
        raise UserError(
            f"{len(encoded.too_long)} of {len(members)} examples are longer than {max_length:,} tokens\n"
            + _listed(list(map(str, encoded.too_long))),
            where="train.max_length",
            fix="Shorten or remove them, raise train.max_length, or drop long ones with train.on_overlength: drop.",
        )
    if encoded.too_long:
        reporter.warn(
            f"{len(encoded.too_long)} of {len(members)} examples are longer than {max_length:,} tokens and are dropped "
            f"(train.on_overlength: drop)\n{_listed(list(map(str, encoded.too_long)))}"
        )
    if not encoded.rows:
        raise UserError("No example is short enough to train on", where="train.max_length", fix="Raise it.")
    return encoded


def require_min_examples(pairs: int, *, force: bool, reporter: Reporter, place: str = "") -> str | None:
    """Refuse to train on fewer than `FEWEST_TRAINING_PAIRS` pairs; with ``force``, warn instead.

    ``place``, which starts with a space, is the subset with so few pairs if it is not the training
    split. Return the note for the adapter's lineage; None if there are enough pairs.
    """
    if pairs >= FEWEST_TRAINING_PAIRS:
        return None
    few = f"{pairs} training pair{'' if pairs == 1 else 's'}{place}, fewer than {FEWEST_TRAINING_PAIRS}"
    why = "an adapter memorizes such a small set, and a test of that size detects only very large gains"
    if not force:
        raise UserError(
            f"{few}: {why}",
            where="train",
            fix="Add pairs, or put them into the prompt: `tunewright advise` measures that. To train anyway, use "
            "--force.",
        )
    reporter.warn(f"{few}: {why}. Training anyway because of --force; the adapter's lineage records it.")
    return few


def as_columns(encoded: Sequence[Tokens], replay: Sequence[Tokens] = ()) -> dict[str, list[Any]]:
    """Return the columns that trl takes: ``input_ids`` and ``labels``, one list of ids a row.

    Rows of ``replay`` come last, and a third column, ``replayed``, marks them.
    """
    rows = [*encoded, *replay]
    columns: dict[str, list[Any]] = {
        "input_ids": [list(t.ids) for t in rows],
        "labels": [
            [token if trained else IGNORED for token, trained in zip(t.ids, t.loss_mask, strict=True)] for t in rows
        ],
    }
    return {**columns, "replayed": [place >= len(encoded) for place in range(len(rows))]} if replay else columns


def render_digest(rows: Sequence[Tokens]) -> str:
    """Return the SHA-256 of all ids and masks, in order: equal digests mean equal training input."""
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(array("q", [len(row.ids), *row.ids]).tobytes())
        sha256.update(bytes(row.loss_mask))
    return sha256.hexdigest()


def name_of(member: Member) -> str:
    """Return an example's display name: the start of its key and of its text."""
    text = member.example.input_text
    return f"example {member.key[:12]} ({text[:40]!r}{'…' if len(text) > 40 else ''})"


def expected_messages(member: Member, rows: int) -> list[list[Message]]:
    """Return the messages that each row must spell: all turns, or, with one row for each answer, the turns up to it.

    In such rows templates may shorten earlier answers and drop earlier results (Mistral v2), so these are not checked.
    """
    messages = member.example.messages
    trained = [place for place, m in enumerate(messages) if m.role == "assistant" and m.weight]
    if rows == 1:
        return [list(messages)]
    assert rows == len(trained), "one row, or one for each trained answer"
    found = []
    for answer in trained:
        question = max(place for place, m in enumerate(messages[:answer]) if m.role == "user")
        certain = [
            m
            for place, m in enumerate(messages[:answer])
            if m.role != "assistant" and (m.role != "tool" or place > question)
        ]
        found.append([*certain, messages[answer]])
    return found


def row_faults(chat: ChatFormat, rows: Sequence[Tokens], expected: Sequence[Sequence[Message]]) -> list[str | None]:
    """Return each row's fault or None, which proves that rows show and train exactly the intended text."""
    texts = chat.texts([row.ids for row in rows])
    spans = [trained_spans(row) for row in rows]
    answer_texts = iter(
        chat.texts([row.ids[start : end - 1] for row, each in zip(rows, spans, strict=True) for start, end in each])
    )
    faults = []
    for row, messages, text, each in zip(rows, expected, texts, spans, strict=True):
        trained = [Message("assistant", next(answer_texts)) for _ in each]
        answers = [m for m in messages if m.role == "assistant" and m.weight]
        if messages[0].role == "tools" or chat.thinking is not None:
            # The trained ids of an answer begin after its thinking if that is masked.
            after = {place for place, m in enumerate(answers) if chat.reasoning == "mask" and m.reasoning}
            trained = [
                chat.answer(row.ids[start : end - 1], messages[:1], opened=False if place in after else None)
                for place, (start, end) in enumerate(each)
            ]
        faults.append(
            _form_fault(chat, row, each)
            or _thinking_fault(answers, text, trained, chat.reasoning)
            or _text_fault(messages, text, trained)
        )
    return faults


def trained_spans(row: Tokens) -> list[tuple[int, int]]:
    """Return the start and end of each run of trained tokens."""
    places = [i for i, (before, now) in enumerate(pairwise((False, *row.loss_mask, False))) if before != now]
    return list(zip(places[::2], places[1::2], strict=True))


def _form_fault(chat: ChatFormat, row: Tokens, spans: Sequence[tuple[int, int]]) -> str | None:
    begins = row.ids.count(chat.bos_id)
    if chat.writes_bos and (row.ids[0] != chat.bos_id or (begins != 1 and not chat.bos_opens_turns)):
        return f"{begins} beginning-of-text tokens; expected one, at the start"
    if not spans:
        return "no token would be trained"
    if any(row.ids[end - 1] not in chat.stop_ids for _, end in spans):
        return "an answer has no trained end token"
    return None


def _thinking_fault(
    answers: Sequence[Message], text: str, trained: Sequence[Message], mode: ReasoningMode
) -> str | None:
    """Check that the tokens train each answer's thinking, or show it without training it."""
    for answer, spelled in zip(answers, trained, strict=False):
        wanted = answer.reasoning if mode == "train" else ""
        if _plain(spelled.reasoning) != _plain(wanted):
            return f"the thinking's tokens read {spelled.reasoning[:60]!r}, not {wanted[:60]!r}"
        if mode == "mask" and _plain(answer.reasoning) not in _plain(text):
            return f"the tokens don't spell the thinking {answer.reasoning[:60]!r}: the template drops it"
    return None


def _text_fault(messages: Sequence[Message], text: str, trained: Sequence[Message]) -> str | None:
    """Check that the tokens spell every turn and train every answer; templates may strip white space at the ends."""
    answers = [m for m in messages if m.role == "assistant" and m.weight]
    if len(trained) != len(answers):
        return f"{len(trained)} answers would be trained, of {len(answers)}"
    for answer, spelled in zip(answers, trained, strict=True):
        if _turn(spelled) != _turn(answer):
            return f"the answer's tokens read {spelled.text[:60]!r}, not {answer.text[:60]!r}"
    spelled_text = _plain(text)
    for message in messages:
        parts = [message.content]
        if message.role == "tools":
            parts = [text for f in declared_functions([message]) for text in (f["name"], f.get("description", ""))]
        for part in parts:
            # A template may write functions and results as JSON, with their texts escaped.
            escaped = json.dumps(part, ensure_ascii=False)[1:-1] if message.role in ("tools", "tool") else part
            if _plain(part) not in spelled_text and _plain(escaped) not in spelled_text:
                return (
                    f"the tokens don't spell the {message.role} turn {part[:60]!r}: the template or the tokenizer "
                    "drops a part"
                )
    return None


def _turn(message: Message) -> tuple[str, list[tuple[str, str]]]:
    return _plain(message.content), [(call.name, call.arguments) for call in message.calls]


def _plain(text: str) -> str:
    """Strip white space; sentencepiece writes a space as U+2581."""
    return text.replace("\u2581", " ").strip()


def _listed(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - _MOST_NAMED:,} more: `tunewright data check --json` lists all of them"]
    return "\n".join([*(f"  {line}" for line in lines[:_MOST_NAMED]), *more * (len(lines) > _MOST_NAMED)])


PERCENTILES = (0, 25, 50, 75, 90, 99, 100)
_BINS = 12
_ROWS = 1000  # rows encoded at once
_WIDTHS = [step * 10**power for power in range(8) for step in (1, 2, 5)]


@dataclass(frozen=True)
class SplitLengths:
    """The row lengths of one split in tokens."""

    split: Split
    rows: int
    percentiles: dict[int, int]
    """Length at each of PERCENTILES: 0 is the shortest row, 100 the longest."""
    tokens: int
    trained: int


@dataclass(frozen=True)
class HistogramBar:
    """One histogram bar: rows of ``first`` to ``last`` tokens."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class LengthReport:
    """All splits of a version, rendered with the config's base and chat template."""

    version: str
    base: str
    template_digest: str
    max_length: int
    splits: tuple[SplitLengths, ...]
    histogram: tuple[HistogramBar, ...]
    too_long: tuple[dict[str, Any], ...]
    """Rows over max_length: key, name, split, tokens."""
    faults: tuple[str, ...]
    look_alikes: int
    """Rows whose text looks like a control token of this base; it stays text."""

    def refused(self, *, dropping: bool) -> bool:
        """Return whether training, or the evaluation after it, would refuse this version."""
        left = {s.split: s.rows - sum(row["split"] == s.split for row in self.too_long) for s in self.splits}
        too_long = any(row["split"] != "test" for row in self.too_long)
        return bool(self.faults) or (too_long and not dropping) or not all(left.get(s) for s in ("train", "dev"))


def measure_lengths(
    chat: ChatFormat,
    base: str,
    version: DatasetVersion,
    max_length: int,
    reporter: Reporter,
    workers: Workers = THIS_PROCESS,
) -> LengthReport:
    """Encode every row of every split as training would."""
    chosen, all_lengths = [], []
    too_long: list[dict[str, Any]] = []
    faults: list[str] = []
    look_alikes = 0
    with reporter.task("encoding", len(version.members), "examples") as task:
        for split in SPLITS:
            lengths: list[int] = []
            trained = 0
            parts = slices(version.examples(split), _ROWS)
            for part in workers.map(_measured, (chat, max_length), parts, task, batch=2):
                lengths += part.lengths
                trained += part.trained
                too_long += [{"key": key, "name": name, "split": split, "tokens": n} for key, name, n in part.too_long]
                faults += part.faults
                look_alikes += part.look_alikes
            if lengths:
                values = np.percentile(lengths, PERCENTILES, method="nearest")
                percentiles = {p: int(value) for p, value in zip(PERCENTILES, values, strict=True)}
                chosen.append(SplitLengths(split, len(lengths), percentiles, sum(lengths), trained))
            all_lengths += lengths
    return LengthReport(
        version=version.digest,
        base=base,
        template_digest=chat.digest,
        max_length=max_length,
        splits=tuple(chosen),
        histogram=_histogram(all_lengths),
        too_long=tuple(too_long),
        faults=tuple(faults),
        look_alikes=look_alikes,
    )


class _Measured(NamedTuple):
    """Token lengths of some rows, their trained tokens, rows that are too long (key, name, tokens), and faults."""

    lengths: list[int]
    trained: int
    too_long: list[tuple[str, str, int]]
    faults: list[str]
    look_alikes: int


def _measured(encoding: tuple[ChatFormat, int], members: Sequence[Member], task: Task) -> _Measured:
    """Encode some rows in a format, with the most tokens of one."""
    chat, max_length = encoding
    encoded = encode_members(chat, members, max_length)
    rows = [*encoded.rows, *(long.row for long in encoded.too_long)]
    task.advance(len(members))
    return _Measured(
        [len(row.ids) for row in rows],
        sum(sum(row.loss_mask) for row in rows),
        [(long.member.key, name_of(long.member), len(long.row.ids)) for long in encoded.too_long],
        encoded.faults,
        sum(bool(chat.encoder.hide(m.example.messages)[1]) for m in members),
    )


def _histogram(lengths: Sequence[int]) -> tuple[HistogramBar, ...]:
    if not lengths:
        return ()
    width = next(w for w in _WIDTHS if w * _BINS >= max(lengths))
    counts = np.bincount((np.asarray(lengths) - 1) // width)
    bins = [HistogramBar(place * width + 1, (place + 1) * width, int(count)) for place, count in enumerate(counts)]
    first = next(place for place, one in enumerate(bins) if one.rows)
    return tuple(bins[first:])
