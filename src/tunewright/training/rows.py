"""Examples as the trainer sees them: token ids and the labels to learn, each row checked before the first step."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tunewright.chat.format import ChatFormat, RenderedRow, Tokens
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.examples import Message
from tunewright.data.versions import Member

IGNORED = -100
"""The label of a token that is not trained (PyTorch's ignore_index)."""

_MOST_NAMED = 20


@dataclass(frozen=True)
class LongRow:
    """A row of more tokens than the config allows."""

    member: Member
    row: Tokens

    def __str__(self) -> str:
        return f"{name_of(self.member)}: {len(self.row.ids):,} tokens"


@dataclass(frozen=True)
class EncodedRows:
    """The rows of some examples; an example of several turns has several where its template demands it."""

    rows: list[Tokens]
    members: list[Member]
    """The example that each row is of."""
    too_long: list[LongRow]
    faults: list[str]
    """Why examples cannot be trained on, each named."""


def encode_members(chat: ChatFormat, members: Sequence[Member], max_length: int) -> EncodedRows:
    """Encode examples and check every row; those over ``max_length`` tokens are set apart whole, never cut."""
    layouts: list[RenderedRow] = []
    owners: list[Member] = []
    told: list[list[Message]] = []
    faults: list[str] = []
    for member in members:
        try:
            laid_out = chat.rendered_rows(member.example.messages)
        except UserError as error:
            faults.append(f"{name_of(member)}: {error.what}")
            continue
        layouts += laid_out
        owners += [member] * len(laid_out)
        told += told_by(member, len(laid_out))
    encoded = EncodedRows([], [], [], faults)
    rows = chat.tokens(layouts)
    for member, row, fault in zip(owners, rows, row_faults(chat, rows, told), strict=True):
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
    """Return the rows of one split, with rows over ``max_length`` left out and named where ``too_long`` is "drop".

    Raises:
        UserError: naming each example that is too long (unless they are to be left out) or that no row can be made of.
    """
    encoded = encode_members(chat, members, max_length)
    if encoded.faults:
        raise UserError(
            f"{len(encoded.faults)} of {len(members)} examples cannot be trained on\n{_listed(encoded.faults)}",
            where=chat.template.name,
            fix="Mend or remove them; or, where the template is at fault, set chat.template to plain.",
        )
    if encoded.too_long and too_long == "error":
        raise UserError(
            f"{len(encoded.too_long)} of {len(members)} examples are longer than {max_length:,} tokens\n"
            + _listed(list(map(str, encoded.too_long))),
            where="train.max_length",
            fix="Shorten or remove them, raise train.max_length, or leave them out with train.on_overlength: drop.",
        )
    if encoded.too_long:
        reporter.warn(
            f"{len(encoded.too_long)} of {len(members)} examples are longer than {max_length:,} tokens and left out "
            f"(train.on_overlength: drop)\n{_listed(list(map(str, encoded.too_long)))}"
        )
    if not encoded.rows:
        raise UserError("no example is left to train on", where="train.max_length", fix="Raise it.")
    return encoded


def as_columns(encoded: Sequence[Tokens], replay: Sequence[Tokens] = ()) -> dict[str, list[Any]]:
    """Return the columns that trl takes as they are: ``input_ids`` and ``labels``, one list of ids a row.

    Rows of ``replay`` come after the others, and a third column, ``replayed``, then tells which they are.
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
    """SHA-256 over all ids and masks, in order: equal digests mean that training saw the same."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(array("q", [len(row.ids), *row.ids]).tobytes())
        whole.update(bytes(row.loss_mask))
    return whole.hexdigest()


def name_of(member: Member) -> str:
    """Return how people are told of an example: the beginning of its key and of its text."""
    text = member.example.input_text
    return f"example {member.key[:12]} ({text[:40]!r}{'…' if len(text) > 40 else ''})"


def told_by(member: Member, rows: int) -> list[list[Message]]:
    """What each of an example's rows has to say: all of its turns, or, where each answer is a row, those up to it.

    Of earlier answers in such a row templates may show less, so they are left out.
    """
    messages = member.example.messages
    trained = [place for place, m in enumerate(messages) if m.role == "assistant" and m.weight]
    if rows == 1:
        return [list(messages)]
    assert rows == len(trained), "one row, or one for each trained answer"
    return [[*(m for m in messages[:place] if m.role != "assistant"), messages[place]] for place in trained]


def row_faults(chat: ChatFormat, rows: Sequence[Tokens], told: Sequence[Sequence[Message]]) -> list[str | None]:
    """What is wrong with each row, if anything: the proof that nothing else is seen or trained than what was meant.

    Args:
        chat: what made the rows.
        rows: ids and masks.
        told: the messages that each row has to spell.
    """
    wholes = chat.texts([row.ids for row in rows])
    spans = [trained_spans(row) for row in rows]
    answers = iter(
        chat.texts([row.ids[start : end - 1] for row, each in zip(rows, spans, strict=True) for start, end in each])
    )
    faults = []
    for row, messages, whole, each in zip(rows, told, wholes, spans, strict=True):
        said = [next(answers) for _ in each]
        faults.append(_form_fault(chat, row, each) or _text_fault(messages, whole, said))
    return faults


def trained_spans(row: Tokens) -> list[tuple[int, int]]:
    """Where each run of trained tokens begins and ends."""
    places = [i for i, (before, now) in enumerate(pairwise((False, *row.loss_mask, False))) if before != now]
    return list(zip(places[::2], places[1::2], strict=True))


def _form_fault(chat: ChatFormat, row: Tokens, spans: Sequence[tuple[int, int]]) -> str | None:
    begins = row.ids.count(chat.bos_id)
    if chat.writes_bos and (row.ids[0] != chat.bos_id or (begins != 1 and not chat.bos_opens_turns)):
        return f"{begins} beginning-of-text tokens; there must be one, at the start"
    if not spans:
        return "no token of it would be trained"
    if any(row.ids[end - 1] not in chat.stop_ids for _, end in spans):
        return "an answer without a trained end token"
    return None


def _text_fault(messages: Sequence[Message], whole: str, said: Sequence[str]) -> str | None:
    """Whether the tokens spell every turn and, trained, every answer; white space at their ends templates may trim."""
    answers = [m.content for m in messages if m.role == "assistant" and m.weight]
    if len(said) != len(answers):
        return f"{len(said)} answers would be trained, of {len(answers)}"
    for answer, spelled in zip(answers, said, strict=True):
        if _plain(spelled) != _plain(answer):
            return f"the answer's tokens read {spelled[:60]!r}, not {answer[:60]!r}"
    for message in messages:
        if _plain(message.content) not in _plain(whole):
            return (
                f"the tokens don't spell the {message.role} turn {message.content[:60]!r}: the template or the "
                "tokenizer leaves something out"
            )
    return None


def _plain(text: str) -> str:
    """Without white space at the ends; sentencepiece writes a space as U+2581, and reads that as a space."""
    return text.replace("\u2581", " ").strip()


def _listed(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - _MOST_NAMED} more: `tunewright data check --json` lists all"]
    return "\n".join([*(f"  {line}" for line in lines[:_MOST_NAMED]), *more * (len(lines) > _MOST_NAMED)])
