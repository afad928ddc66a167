"""Signal (c): from how many calls on a fine-tune pays, prefix caching counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunewright.advisor.signals import BreakEven, Call, OneOffCost, Speed
from tunewright.config import AdviseConfig, PriceConfig
from tunewright.evidence.statistics import Floats, bootstrap_sums, cluster_sums, percentiles

_MILLION, _HOUR = 1e6, 3600.0


@dataclass(frozen=True)
class Lengths:
    """Token counts of an arm's calls, one for each item, the items of all arms in one order."""

    arm: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    cached: int
    """Tokens that all prompts begin with."""


@dataclass(frozen=True)
class TokenPrices:
    """What a token costs."""

    input: float
    output: float
    cached_discount: float


def token_prices(prices: PriceConfig | None, speed: Speed | None) -> TokenPrices:
    """Prices by the config, or by what this machine's time costs; in hours of it where no price is given.

    Args:
        prices: the config's.
        speed: as measured; needed where the config has no token prices.
    """
    prices = prices or PriceConfig()
    if prices.input is not None and prices.output is not None:
        return TokenPrices(prices.input / _MILLION, prices.output / _MILLION, prices.cached_discount)
    assert speed is not None
    second = (prices.hour or 1.0) / _HOUR
    return TokenPrices(second / speed.prefill, second / speed.decode, prices.cached_discount)


def training_cost(prices: PriceConfig | None, seconds: float) -> float:
    """Return what training on all rows costs, which takes so many seconds: its price, or this machine's time."""
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
    """From how many calls on what a fine-tune saves is more than it costs.

    V* = (training + evaluation + labelling + hosting of all months) / (cost of a prompting call - of a tuned one), with
    the cost of a call its input tokens, those in the prefix cache at a discount, and its output tokens. The interval
    is by a bootstrap over clusters of both arms' token counts; prices and the cost of training are taken as they are.

    Args:
        settings: prices, volume and time.
        prompting, tuned: the arms' token counts, and what a token costs each.
        clusters: the items'.
        training: its cost, in the unit of the prices.
        evaluation_calls: test items that each of the two arms answers to evaluate the adapter.
        speed: arm to speed, where prices were made of it.
        seed: decides the resamples.
    """
    prices = settings.prices or PriceConfig()
    costs = np.column_stack([_costs(*prompting), _costs(*tuned), np.ones(len(clusters))])
    calls = [_call(lengths, cost) for (lengths, _), cost in zip((prompting, tuned), costs.mean(axis=0), strict=False)]
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
        unit="money" if prices.in_money else "machine hours",
        prompting=calls[0],
        tuned=calls[1],
        speed=speed,
        saving=saving,
        saving_interval=interval,
        once=once,
        calls=_calls(once.total, saving),
        # V* falls as the saving grows, so the ends change places.
        calls_low=_calls(once.total, interval.high),
        calls_high=_calls(once.total, interval.low),
        calls_per_month=settings.calls_per_month,
        months=settings.months,
    )


def _calls(once: float, saving: float) -> float | None:
    return once / saving if saving > 0 else None


def _costs(lengths: Lengths, prices: TokenPrices) -> Floats:
    """Return what each item's call costs; [items]."""
    inputs = np.asarray(lengths.inputs, dtype=np.float64) - prices.cached_discount * lengths.cached
    return inputs * prices.input + np.asarray(lengths.outputs, dtype=np.float64) * prices.output


def _call(lengths: Lengths, cost: float) -> Call:
    return Call(
        arm=lengths.arm,
        input_tokens=float(np.mean(lengths.inputs)),
        cached_tokens=lengths.cached,
        output_tokens=float(np.mean(lengths.outputs)),
        cost=float(cost),
    )
