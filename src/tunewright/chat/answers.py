"""How long answers are: the limit that evaluation and training generate under."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tunewright.chat.format import ChatFormat
from tunewright.data.versions import Member
from tunewright.recipe import Recipe


def answer_limit(recipe: Recipe, chat: ChatFormat, members: Iterable[Member]) -> int:
    """The longest answer in tokens: the recipe's, else a quarter more than the longest of these."""
    if recipe.evaluate.max_new_tokens is not None:
        return recipe.evaluate.max_new_tokens
    last_turns = [chat.layouts(m.example.messages)[-1] for m in members]
    longest = max(answer_length(row.loss_mask) for row in chat.tokens(last_turns))
    return math.ceil(1.25 * longest)


def answer_length(loss_mask: Sequence[bool]) -> int:
    """Tokens of the last trained turn, which ends the row."""
    return next((n for n, trained in enumerate(reversed(loss_mask)) if not trained), len(loss_mask))
