"""Signal (b): the number of calls from which a fine-tune pays, with prefix caching and this machine's own speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from tunewright.advisor.signals import BreakEven, Call, OneOffCost, Speed
from tunewright.chat import ChatFormat
from tunewright.config import AdviseConfig, PriceConfig
from tunewright.evidence.statistics import Floats, bootstrap_sums, cluster_sums, percentiles

_MOST_PREFILLED = 8192
"""Number of prompt tokens to time: a few seconds on a CPU."""
_WRITTEN = 16

_MILLION, _HOUR = 1e6, 3600.0


def measured_speed(
    model: Any, chat: ChatFormat, prompts: Sequence[tuple[int, ...]], adapter: str | None, batch_size: int
) -> Speed:
    """Return tokens per second of one batch, decoded as in evaluation and serving, after a short warm-up.

    ``model`` is the base, or a PeftModel with the ``adapter`` that answers. The first prompts that fill a batch count.
    """
    from tunewright.generation.plain_decoding import new_batch
    from tunewright.generation.requests import Request

    lengths = accumulate(map(len, prompts[:batch_size]))
    rows = max(sum(length <= _MOST_PREFILLED for length in lengths), 1)

    # Without stop ids, each row writes for as long as it is timed.
    batch = partial(new_batch, model, stop_ids=(), pad_id=chat.tokenizer.pad_token_id, mixed=False)

    batch().admit([Request(prompts[0], adapter, 2)])
    timed = batch()
    began = time.perf_counter()
    timed.admit([Request(prompt, adapter, _WRITTEN + 2) for prompt in prompts[:rows]])
    read = time.perf_counter()
    for _ in range(_WRITTEN):
        for _, error in timed.step():
            raise error
    written = time.perf_counter()
    return Speed(
        prefill=sum(map(len, prompts[:rows])) / (read - began),
        decode=rows * _WRITTEN / (written - read),
        rows=rows,
    )


@dataclass(frozen=True)
class Lengths:
    """Token counts of an arm's calls, one per item, with the items of all arms in the same order."""

    arm: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    cached: int
    """Tokens shared by the beginning of all prompts."""


@dataclass(frozen=True)
class TokenPrices:
    """The cost of a token."""

    input: float
    output: float
    cached_discount: float


def token_prices(prices: PriceConfig | None, speed: Speed | None) -> TokenPrices:
    """Return token prices from the config, or from the cost of this machine's time (in hours without a price)."""
    prices = prices or PriceConfig()
    if prices.input is not None and prices.output is not None:
        return TokenPrices(prices.input / _MILLION, prices.output / _MILLION, prices.cached_discount)
    assert speed is not None
    second = (prices.hour or 1.0) / _HOUR
    return TokenPrices(second / speed.prefill, second / speed.decode, prices.cached_discount)


def training_cost(prices: PriceConfig | None, seconds: float) -> float:
    """Return the cost of training on all rows: its price, or the cost of these seconds on this machine."""
    prices = prices or PriceConfig()
    return seconds / _HOUR * (prices.hour or 1.0) if prices.training is None else prices.training


def break_even(
    settings: AdviseConfig,
    prompting: tuple[Lengths, TokenPrices],
    tuned: tuple[Lengths, TokenPrices],
    clusters: Sequence[str],
    *,
    training: float,
    evaluation_calls: int,
    speed: dict[str, Speed],
    seed: int,
) -> BreakEven:
    """Return the number of calls from which a fine-tune saves more than it costs.

    V* = (training + evaluation + labelling + hosting of all months) / (cost of a prompting call - of a tuned one). A
    call costs its input tokens, with a discount for tokens in the prefix cache, and its output tokens. The interval
    comes from a bootstrap of both arms' token counts over clusters. Prices and the cost of training are fixed.

    ``evaluation_calls`` are the test items that each of the two arms answers to evaluate the adapter. ``speed`` is by
    arm, if prices are derived from it; ``training`` is in the unit of the prices.
    """
    prices = settings.prices or PriceConfig()
    costs = np.column_stack([_costs(*prompting), _costs(*tuned), np.ones(len(clusters))])
    calls = [
        Call(
            arm=lengths.arm,
            input_tokens=float(np.mean(lengths.inputs)),
            cached_tokens=lengths.cached,
            output_tokens=float(np.mean(lengths.outputs)),
            cost=float(cost),
        )
        for (lengths, _), cost in zip((prompting, tuned), costs.mean(axis=0), strict=False)
    ]
    drawn = bootstrap_sums(cluster_sums(costs, clusters), seed)
    interval = percentiles((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2])
    saving = calls[0].cost - calls[1].cost
    once = OneOffCost(
        training=training,
        evaluation=evaluation_calls * (calls[0].cost + calls[1].cost),
        labelling=prices.labelling,
        hosting=prices.hosting * settings.months,
    )
    return BreakEven(
        unit="money" if prices.in_currency else "machine hours",
        prompting=calls[0],
        tuned=calls[1],
        speed=speed,
        saving=saving,
        saving_interval=interval,
        once=once,
        calls=_calls(once.total, saving),
        # V* falls as the saving grows, so the interval's ends are swapped.
        calls_low=_calls(once.total, interval.high),
        calls_high=_calls(once.total, interval.low),
        calls_per_month=settings.calls_per_month,
        months=settings.months,
    )


def _calls(once: float, saving: float) -> float | None:
    return once / saving if saving > 0 else None


def _costs(lengths: Lengths, prices: TokenPrices) -> Floats:
    """Return the cost of each item's call; [items]."""
    # A cached token costs (1 - d) of its price: c (1 - d) = c - d c.
    inputs = np.asarray(lengths.inputs, dtype=np.float64) - prices.cached_discount * lengths.cached
    return inputs * prices.input + np.asarray(lengths.outputs, dtype=np.float64) * prices.output
