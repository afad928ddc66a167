"""The next token of every row of a batch, on the model's device: greedy, or drawn with temperature and top-p.

A drawn token is the inverse of the row's cumulative distribution at a uniform number, in the order of the vocabulary.
That number is all that comes from the host: each row's own seeded generator draws it (:class:`requests.Row`), so the
same seed gives the same answer on every device and in any company, as far as the logits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunewright.generation.requests import Row

PREFILTER = 1024
"""Tokens among which a nucleus is looked for first. Sorting a whole vocabulary takes many times longer."""


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Choose each row's next token; the host waits for the device once.

    Only rows whose ``PREFILTER`` likeliest tokens hold less than their top-p make it wait a second time.

    Args:
        logits: [rows, vocabulary].
        rows: what each wants; those that sample take one number from their generator.

    Raises:
        ValueError: the logits of a row that samples are not numbers.
    """
    tokens = logits.argmax(-1)
    wanted = [(place, row) for place, row in enumerate(rows) if row.request.temperature > 0]
    if not wanted:
        greedy: list[int] = tokens.tolist()
        return greedy
    # One copy to the device for all that the rows want: [4, sampled rows].
    settings = torch.tensor(
        [(place, row.request.temperature, row.request.top_p, row.uniform()) for place, row in wanted],
        dtype=torch.float64,
    ).T.to(logits.device, non_blocking=True)
    places, temperatures, top_ps, uniforms = settings[0].long(), *settings[1:, :, None]
    own = logits if len(wanted) == len(rows) else logits.index_select(0, places)
    cut = any(row.request.top_p < 1 for _, row in wanted)
    drawn, whole = draw(own, temperatures, top_ps if cut else None, uniforms, PREFILTER)
    tokens.index_copy_(0, places, drawn)
    told: list[int] = torch.cat([tokens, whole.long()]).tolist()
    chosen, found = told[: len(rows)], told[len(rows) :]
    missed = [index for index, there in enumerate(found) if not there]
    if missed:
        again = torch.tensor(missed, device=logits.device)
        scaled_by, held, numbers = (part.index_select(0, again) for part in (temperatures, top_ps, uniforms))
        drawn, _ = draw(own.index_select(0, again), scaled_by, held, numbers, logits.shape[-1])
        for index, token in zip(missed, drawn.tolist(), strict=True):
            chosen[wanted[index][0]] = token
    if any(token >= logits.shape[-1] for token in chosen):
        raise ValueError("The model's logits are not numbers, so no token can be drawn from them.")
    return chosen


def draw(
    logits: Tensor, temperatures: Tensor, top_ps: Tensor | None, uniforms: Tensor, prefilter: int
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row, in float64.

    Args:
        logits: [rows, vocabulary].
        temperatures: [rows, 1], above 0.
        top_ps: [rows, 1]; None where no row cuts anything off.
        uniforms: [rows, 1], from 0 up to 1, 1 not included.
        prefilter: likeliest tokens among which a nucleus is looked for.

    Returns:
        The tokens [rows], and whether the prefilter held each row's whole nucleus [rows]: a token is right only there.
        A row whose logits are not numbers gets a token beyond the vocabulary.
    """
    scaled = logits.double()
    # Below their maximum, logits stay finite or become -inf (a probability of 0) at any temperature.
    probabilities = ((scaled - scaled.amax(-1, keepdim=True)) / temperatures).softmax(-1)
    whole = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if top_ps is not None:
        kept, whole = nucleus(probabilities, top_ps, prefilter)
        probabilities = probabilities.where(kept, 0)
    cumulative = probabilities.cumsum(-1)
    # The first token that the cumulative sum passes the number with: one of probability 0 never is.
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).squeeze(-1), whole


def nucleus(probabilities: Tensor, top_ps: Tensor, prefilter: int) -> tuple[Tensor, Tensor]:
    """Find the fewest likeliest tokens that together hold top-p (Holtzman et al. 2020).

    Of tokens that are equally likely at the border, those with the lowest ids are in. So the result does not depend on
    how a device sorts, and is the same with and without a prefilter.

    Args:
        probabilities: [rows, vocabulary].
        top_ps: [rows, 1]; at 1 every token is in.
        prefilter: likeliest tokens that are looked at.

    Returns:
        Which tokens are in [rows, vocabulary], and whether those looked at hold enough [rows].
    """
    vocabulary = probabilities.shape[-1]
    if prefilter < vocabulary:
        likeliest = probabilities.topk(prefilter, dim=-1).values
    else:
        likeliest = probabilities.sort(dim=-1, descending=True).values
    cumulative = likeliest.cumsum(-1)
    # A token is in where those before it hold less than top-p; nothing comes before the likeliest.
    count = 1 + (cumulative[:, :-1] < top_ps).sum(-1, keepdim=True)
    least = likeliest.gather(-1, count - 1)
    room = count - (likeliest > least).sum(-1, keepdim=True)
    tied = probabilities == least
    everything = top_ps == 1
    kept = (probabilities > least) | (tied & (tied.cumsum(-1) <= room)) | everything
    whole = (cumulative[:, -1:] >= top_ps) | everything | (prefilter >= vocabulary)
    return kept, whole.squeeze(-1)
