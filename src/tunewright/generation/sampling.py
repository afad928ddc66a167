"""Sampling: the next token of every row of a batch, on the model's device, greedy or with temperature and top-p.

A sampled token is the inverse of the row's cumulative distribution at a uniform number, in vocabulary order.
Only that number comes from the host: each row's own seeded generator draws it (:class:`requests.Row`). So
the same seed gives the same answer on every device and in any batch, as long as the logits are the same.

Before that a request's biases and penalties are added. The log probabilities that a request asks for are the
model's own, before biases, penalties, constraints and temperature, as vLLM and llama.cpp report them by default.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunewright.generation.requests import Row, TokenLogprob

PREFILTER = 1024
"""Likeliest tokens in which a nucleus is searched first. Sorting a whole vocabulary takes many times longer."""


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Choose each row's next token; the host waits for the device once.

    It waits a second time only if the ``PREFILTER`` likeliest tokens of some row hold less than
    its top-p. ``logits`` are [rows, vocabulary]. A row whose likeliest logit is not finite gets a
    token beyond the vocabulary.
    """
    tokens = logits.argmax(-1)
    # NaN is the largest to argmax, so a row's likeliest logit is NaN if any is; it is -inf if no token is allowed.
    likeliest = logits.gather(-1, tokens[:, None]).squeeze(-1)
    # A difference is 0 only for finite numbers; isfinite() would launch four kernels.
    tokens.masked_fill_(likeliest - likeliest != 0, logits.shape[-1])
    wanted = [(place, row) for place, row in enumerate(rows) if row.request.temperature > 0]
    if not wanted:
        greedy: list[int] = tokens.tolist()
        return greedy
    # One copy to the device for all settings: [4, sampled rows]; then each setting is [sampled rows, 1].
    settings = torch.tensor(
        [(place, row.request.temperature, row.request.top_p, row.uniform()) for place, row in wanted],
        dtype=torch.float64,
    ).T.to(logits.device, non_blocking=True)
    places, temperatures, top_ps, uniforms = settings[0].long(), *settings[1:, :, None]
    own = logits if len(wanted) == len(rows) else logits.index_select(0, places)
    cut = any(row.request.top_p < 1 for _, row in wanted)
    drawn, exact = draw(own, temperatures, top_ps if cut else None, uniforms, PREFILTER)
    tokens.index_copy_(0, places, drawn)
    # Tokens and flags in one copy to the host: the only wait.
    result: list[int] = torch.cat([tokens, exact.long()]).tolist()
    chosen, flags = result[: len(rows)], result[len(rows) :]
    missed = [index for index, is_exact in enumerate(flags) if not is_exact]
    if missed:
        again = torch.tensor(missed, device=logits.device)
        hot, top, uniform = (setting.index_select(0, again) for setting in (temperatures, top_ps, uniforms))
        drawn, _ = draw(own.index_select(0, again), hot, top, uniform, logits.shape[-1])
        for index, token in zip(missed, drawn.tolist(), strict=True):
            chosen[wanted[index][0]] = token
    return chosen


def draw(
    logits: Tensor, temperatures: Tensor, top_ps: Tensor | None, uniforms: Tensor, prefilter: int
) -> tuple[Tensor, Tensor]:
    """Sample one token for each row, in float64.

    ``logits`` are [rows, vocabulary]; ``temperatures`` (above 0), ``top_ps`` (None: all are 1) and
    ``uniforms`` (in [0, 1)) are [rows, 1]. Return the tokens [rows], and whether the ``prefilter``
    likeliest tokens held each row's whole nucleus [rows]: only then its token is right. A row
    whose logits are not finite gets a token beyond the vocabulary.
    """
    scaled = logits.double()
    # Relative to their maximum, logits stay finite or become -inf (probability 0) at any temperature.
    probabilities = ((scaled - scaled.amax(-1, keepdim=True)) / temperatures).softmax(-1)
    exact = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if top_ps is not None:
        kept, exact = nucleus(probabilities, top_ps, prefilter)
        probabilities = probabilities.where(kept, 0)
    cumulative = probabilities.cumsum(-1)  # [rows, vocabulary]
    # The first token whose cumulative sum exceeds the number; a token of probability 0 is never the first.
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).squeeze(-1), exact


def nucleus(probabilities: Tensor, top_ps: Tensor, prefilter: int) -> tuple[Tensor, Tensor]:
    """Find the smallest set of likeliest tokens that together hold top-p (Holtzman et al. 2020).

    Among equally likely tokens at the border, the tokens with the lowest ids are kept. So the
    result depends neither on how a device sorts nor on the prefilter. ``probabilities`` are [rows,
    vocabulary], ``top_ps`` [rows, 1] (1 keeps every token). Return which tokens are kept [rows,
    vocabulary], and whether the ``prefilter`` likeliest tokens hold top-p [rows].
    """
    vocabulary = probabilities.shape[-1]
    if prefilter < vocabulary:
        likeliest = probabilities.topk(prefilter, dim=-1).values
    else:
        likeliest = probabilities.sort(dim=-1, descending=True).values
    cumulative = likeliest.cumsum(-1)
    # A token is kept if the tokens before it hold less than top-p. The likeliest is always kept, hence the 1.
    count = 1 + (cumulative[:, :-1] < top_ps).sum(-1, keepdim=True)
    least = likeliest.gather(-1, count - 1)  # [rows, 1]: the smallest kept probability
    ties_kept = count - (likeliest > least).sum(-1, keepdim=True)
    tied = probabilities == least
    everything = top_ps == 1
    kept = (probabilities > least) | (tied & (tied.cumsum(-1) <= ties_kept)) | everything
    exact = (cumulative[:, -1:] >= top_ps) | everything | (prefilter >= vocabulary)
    return kept, exact.squeeze(-1)


def adjust_logits(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return the logits [rows, vocabulary] with each row's biases added and its penalties subtracted.

    A token that the answer has c times loses c times the frequency penalty, and once the presence penalty
    (https://platform.openai.com/docs/guides/text-generation#frequency-and-presence-penalties).
    """
    changes = [(place, token, change) for place, row in enumerate(rows) for token, change in row.logit_changes()]
    if not changes:
        return logits
    # One copy to the device for all rows: [3, changes].
    places, tokens, amounts = torch.tensor(changes, dtype=torch.float64).T.to(logits.device, non_blocking=True)
    return logits.index_put((places.long(), tokens.long()), amounts.to(logits.dtype), accumulate=True)


def token_logprobs(logits: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> list[TokenLogprob | None]:
    """Return each row's log probabilities at its next token; None for rows that do not ask for them.

    ``logits`` are the model's own [rows, vocabulary].
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


def mask_logits(logits: Tensor, masks: Sequence[bytes | None]) -> Tensor:
    """Return the logits [rows, vocabulary] with minus infinity where a row's mask forbids a token.

    A mask is a bitmask of `Guide.allowed`; None allows every token.
    """
    if all(mask is None for mask in masks):
        return logits
    # One bit for each token goes to the device, in one copy for all rows. Rows without a mask may take any
    # token. A model may have more logits than its tokenizer has tokens; no mask allows the extra logits.
    vocabulary = logits.shape[1]
    bits = np.full((len(masks), -(-vocabulary // 8)), 255, dtype=np.uint8)  # [rows, vocabulary / 8]
    for row, mask in enumerate(masks):
        if mask is not None:
            own = np.frombuffer(mask, dtype=np.uint8)[: bits.shape[1]]
            bits[row] = 0
            bits[row, : len(own)] = own
    packed = torch.from_numpy(bits).to(logits.device, non_blocking=True)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (packed[:, :, None] >> shifts & 1).flatten(1)[:, :vocabulary]  # [rows, vocabulary]
    return logits.masked_fill(allowed == 0, -torch.inf)
