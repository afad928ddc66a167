"""Examples as the trainer sees them: token ids and the labels to learn, each row checked before the first step."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tunewright.chat.format import ChatFormat, Layout, Tokens
from tunewright.data.versions import Member
from tunewright.errors import UserError
from tunewright.progress import Reporter
from tunewright.recipe import TrainRecipe

IGNORED = -100
"""The label of a token that is not trained (PyTorch's ignore_index)."""

_MOST_NAMED = 20


@dataclass(frozen=True)
class LongRow:
    """A row of more tokens than the recipe allows."""

    member: Member
    tokens: int


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
    layouts: list[Layout] = []
    owners: list[Member] = []
    faults: list[str] = []
    for member in members:
        try:
            laid_out = chat.layouts(member.example.messages)
        except UserError as error:
            faults.append(f"{name_of(member)}: {error.what}")
            continue
        layouts += laid_out
        owners += [member] * len(laid_out)
    encoded = EncodedRows([], [], [], faults)
    for member, row in zip(owners, chat.tokens(layouts), strict=True):
        fault = row_fault(chat, row, member)
        if fault:
            faults.append(f"{name_of(member)}: {fault}")
        elif len(row.ids) > max_length:
            encoded.too_long.append(LongRow(member, len(row.ids)))
        else:
            encoded.rows.append(row)
            encoded.members.append(member)
    return encoded


def training_rows(
    chat: ChatFormat, members: Sequence[Member], settings: TrainRecipe, reporter: Reporter
) -> EncodedRows:
    """The rows of one split, with rows over ``max_length`` left out and named where the recipe says so.

    Raises:
        UserError: naming each example that is too long (unless they are to be left out) or that no row can be made of.
    """
    encoded = encode_members(chat, members, settings.max_length)
    long = [f"{name_of(row.member)}: {row.tokens:,} tokens" for row in encoded.too_long]
    drop = settings.too_long == "drop"
    faults = encoded.faults if drop else [*encoded.faults, *long]
    if faults:
        raise UserError(
            f"{len(faults)} of {len(members)} examples cannot be trained on whole "
            f"(the limit is {settings.max_length:,} tokens)\n{_listed(faults)}",
            where="train.max_length",
            fix="Shorten or remove them, raise train.max_length, or leave long ones out with train.too_long: drop.",
        )
    if long:
        reporter.warn(
            f"{len(long)} of {len(members)} examples are longer than {settings.max_length:,} tokens and left out "
            f"(train.too_long: drop)\n{_listed(long)}"
        )
    if not encoded.rows:
        raise UserError("no example is left to train on", where="train.max_length", fix="Raise it.")
    return encoded


def as_columns(encoded: Sequence[Tokens]) -> dict[str, list[list[int]]]:
    """The columns that trl takes as they are: ``input_ids`` and ``labels``, one list of ids a row."""
    return {
        "input_ids": [list(t.ids) for t in encoded],
        "labels": [
            [token if trained else IGNORED for token, trained in zip(t.ids, t.loss_mask, strict=True)] for t in encoded
        ],
    }


def render_digest(rows: Sequence[Tokens]) -> str:
    """SHA-256 over all ids and masks, in order: equal digests mean that training saw the same."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(array("q", [len(row.ids), *row.ids]).tobytes())
        whole.update(bytes(row.loss_mask))
    return whole.hexdigest()


def name_of(member: Member) -> str:
    """How people are told of an example: the beginning of its key and of its text."""
    text = member.example.input_text
    return f"example {member.key[:12]} ({text[:40]!r}{'…' if len(text) > 40 else ''})"


def row_fault(chat: ChatFormat, row: Tokens, member: Member) -> str | None:
    """What is wrong with a row, if anything: the proof that nothing is trained on but what was meant."""
    begins = row.ids.count(chat.bos_id)
    if chat.writes_bos and (row.ids[0] != chat.bos_id or (begins != 1 and not chat.bos_opens_turns)):
        return f"{begins} beginning-of-text tokens; there must be one, at the start"
    ends = [i for i, trained in enumerate(row.loss_mask) if trained and row.loss_mask[i + 1 : i + 2] != (True,)]
    if not ends:
        return "no token of it would be trained"
    if any(row.ids[end] not in chat.stop_ids for end in ends):
        return "an answer without a trained end token"
    if chat.tokenizer.unk_token_id in row.ids and chat.tokenizer.unk_token_id not in chat.used_control_ids:
        return "the tokenizer has no token for a character in it"
    return _other_answer(chat, row, member)


def _other_answer(chat: ChatFormat, row: Tokens, member: Member) -> str | None:
    """Whether the last trained turn is an answer of the example, whole; white space apart, which templates trim."""
    last = len(row.ids) - 1
    start = last
    while start > 0 and row.loss_mask[start - 1]:
        start -= 1
    spelled = _bare(chat.tokenizer.decode(row.ids[start:last], skip_special_tokens=False))
    if any(spelled == _bare(m.content) for m in member.example.messages if m.role == "assistant"):
        return None
    return f"the answer's tokens read {spelled[:60]!r}"


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _listed(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - _MOST_NAMED} more: `tunewright data check --json` lists all"]
    return "\n".join([*(f"  {line}" for line in lines[:_MOST_NAMED]), *more * (len(lines) > _MOST_NAMED)])
