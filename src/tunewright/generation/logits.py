"""Logits before sampling: biases and penalties that a request asks for, and the log probabilities that it wants to see.

Log probabilities are those of the model itself, before biases, penalties, constraints and temperature, as vLLM and
llama.cpp report them by default.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunewright.generation.requests import Row, TokenLogprob


def adjust_logits(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return the logits [rows, vocabulary] with each row's biases added and its penalties subtracted.

    A token that the answer has c times loses c times the frequency penalty, and once the presence penalty
    (https://platform.openai.com/docs/guides/text-generation#frequency-and-presence-penalties).

    Args:
        logits: [rows, vocabulary].
    """
    changes = [(place, token, change) for place, row in enumerate(rows) for token, change in row.logit_changes()]
    if not changes:
        return logits
    # One copy to the device for all rows: [3, changes].
    places, tokens, amounts = torch.tensor(changes, dtype=torch.float64).T.to(logits.device, non_blocking=True)
    return logits.index_put((places.long(), tokens.long()), amounts.to(logits.dtype), accumulate=True)


def token_logprobs(logits: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> list[TokenLogprob | None]:
    """Return each row's log probabilities at its next token; None for rows that do not ask for them.

    Args:
        logits: the model's own [rows, vocabulary].
        tokens: the chosen tokens.
    """
    found: list[TokenLogprob | None] = [None] * len(rows)
    # A token beyond the vocabulary says that there is no next token: see next_tokens().
    asked = [
        place
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True))
        if row.request.logprobs is not None and token < logits.shape[-1]
    ]
    if not asked:
        return found
    own = logits[torch.tensor(asked, device=logits.device)].float().log_softmax(-1)  # [asked, vocabulary]
    most = min(max(rows[place].request.logprobs or 0 for place in asked), logits.shape[-1])
    chosen = torch.tensor([[tokens[place]] for place in asked], device=logits.device)
    values, ids = own.topk(most, dim=-1)
    for place, (value,), tops, top_ids in zip(
        asked, own.gather(-1, chosen).tolist(), values.tolist(), ids.tolist(), strict=True
    ):
        wanted = rows[place].request.logprobs
        found[place] = TokenLogprob(value, tuple(zip(top_ids, tops, strict=True))[:wanted])
    return found
