"""Examples as the trainer sees them: token ids and the labels to learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.chat.templates import Tokens, encode
from tunewright.data.versions import Member
from tunewright.errors import UserError

IGNORED = -100
"""The label of a token that is not trained (PyTorch's ignore_index)."""


def encode_members(
    tokenizer: Any, members: Sequence[Member], max_length: int, stop_ids: frozenset[int]
) -> list[Tokens]:
    """Encode examples, refusing all that would have to be cut.

    Raises:
        UserError: naming each example that is longer than ``max_length`` tokens, or that the template cannot render.
    """
    encoded, faults = [], []
    for member in members:
        try:
            tokens = encode(tokenizer, member.example.messages, stop_ids)
        except UserError as error:
            faults.append(f"{_name(member)}: {error.what}")
            continue
        if len(tokens.ids) > max_length:
            faults.append(f"{_name(member)}: {len(tokens.ids):,} tokens")
        encoded.append(tokens)
    if faults:
        raise UserError(
            f"{len(faults)} of {len(members)} examples cannot be trained on whole "
            f"(the limit is {max_length:,} tokens)\n  " + "\n  ".join(faults[:20] + ["…"] * (len(faults) > 20)),
            where="train.max_length",
            fix="Shorten or remove them, or raise train.max_length.",
        )
    return encoded


def as_columns(encoded: Sequence[Tokens]) -> dict[str, list[list[int]]]:
    """The columns that trl takes as they are: ``input_ids`` and ``labels``, one list of ids a row."""
    return {
        "input_ids": [list(t.ids) for t in encoded],
        "labels": [
            [token if trained else IGNORED for token, trained in zip(t.ids, t.loss_mask, strict=True)] for t in encoded
        ],
    }


def _name(member: Member) -> str:
    text = member.example.input_text
    return f"example {member.key[:12]} ({text[:40]!r}{'…' if len(text) > 40 else ''})"
