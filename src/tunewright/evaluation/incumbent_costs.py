"""Cost and latency of calls, of an incumbent and of the tuned arm; a figure that cannot be had is named as missing."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.config import Config, IncumbentConfig, PriceConfig
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import TUNED
from tunewright.evaluation.frozen_answers import FrozenSet
from tunewright.evaluation.generations import Generator, Prompt
from tunewright.evidence.incumbents import Incumbents, Latency, Serving, TunedServing
from tunewright.evidence.schema import Arm, Evidence
from tunewright.model_io.replies import cost

_BATCH_ROWS = 64
_BATCH_TOKENS = 8192
"""Prompt tokens of the timed batch: a few seconds on a CPU."""
TIMED_ALONE = 40
"""Items whose tuned answer is timed alone: two of them lie above the 95th percentile."""


def incumbent_serving(config: IncumbentConfig, frozen: FrozenSet) -> Serving:
    """Return the cost and latency of an incumbent's answers."""
    timed = [answer for answer in frozen.requests if answer.seconds is not None]
    latency = None
    if timed:
        most = max(answer.at_once for answer in timed)
        latency = latency_of([answer.seconds or 0.0 for answer in timed], f"up to {most:,} at once, network included")
    tokens = [(answer.prompt_tokens, answer.completion_tokens) for answer in frozen.given]
    prompt, completion = (fmean(counts) for counts in zip(*tokens, strict=True)) if tokens else (0.0, 0.0)
    return priced(config, prompt, completion, latency)


def priced(config: IncumbentConfig, prompt: float, completion: float, latency: Latency | None) -> Serving:
    """Return the incumbent's side from its mean tokens of a call, at the config's prices."""
    missing = {}
    each = cost(config, 1_000_000, 0), cost(config, 0, 1_000_000)
    per_1000 = None
    if each[0] is None or each[1] is None:
        missing["cost"] = "price_input and price_output are not set"
    else:
        per_1000 = (prompt * each[0] + completion * each[1]) / 1000
    if latency is None:
        missing["latency"] = "no answer has a time"
    prices = f" at {config.price_input:g} and {config.price_output:g} a million" if per_1000 is not None else ""
    return Serving(
        latency=latency,
        cost_per_1000=per_1000,
        basis=f"{prompt:.0f} prompt and {completion:.0f} reply tokens a call{prices}",
        missing=missing,
    )


def latency_of(seconds: Sequence[float], how: str) -> Latency:
    """Return the percentiles of these times."""
    p50, p95 = np.quantile(seconds, [0.5, 0.95]).tolist()
    return Latency(p50=p50, p95=p95, answers=len(seconds), how=how)


def measured_tuned(arm_runner: ArmRunner, adapter: Adapter, members: Sequence[Member], arm: Arm) -> TunedServing:
    """Measure the tuned arm's speed: a full batch for its cost, single requests for its latency.

    Args:
        arm_runner: answers the items.
        adapter: the adapter.
        members: the items.
        arm: the tuned arm on them, for its tokens.
    """
    generator, limit = arm_runner.generator, arm_runner.limit
    distinct = list(dict.fromkeys(prompt.ids for prompt in arm_runner.prompts(TUNED, members)))
    batch = distinct[: min(generator.rows, _BATCH_ROWS)]
    while len(batch) > 1 and sum(map(len, batch)) > _BATCH_TOKENS:
        batch.pop()
    draw = random.Random(f"{arm_runner.project.config.seed}:latency")
    alone = draw.sample(distinct, min(TIMED_ALONE, len(distinct)))
    generator.generate(generator.requests(batch[:1], 2, adapter), adapter=adapter)  # starts the engine
    seconds = _seconds(generator, sorted(batch), limit, adapter)
    with generator.reporter.task("measuring the latency of tuned", len(alone), "answers") as task:
        times = []
        for prompt in alone:
            times.append(_seconds(generator, [prompt], limit, adapter, at_once=1))
            task.advance()
    used = generator.used
    latency = latency_of(times, f"one at a time on this machine, {used.name} on {used.device}")
    training = adapter.lineage.get("training", {}).get("seconds")
    return tuned_side(arm_runner.project.config, arm, seconds / len(batch), len(batch), latency, training)


def _seconds(
    generator: Generator, prompts: Sequence[Prompt], limit: int, adapter: Adapter, at_once: int | None = None
) -> float:
    """Return the seconds of these answers; the journal is neither read nor written."""
    requests = generator.requests(prompts, limit, adapter)
    began = time.perf_counter()
    generator.generate(requests, adapter=adapter, at_once=at_once)
    return time.perf_counter() - began


def tuned_side(
    config: Config, arm: Arm, seconds: float, rows: int, latency: Latency | None, training: float | None
) -> TunedServing:
    """Return the tuned side at the prices of advise.prices.

    Args:
        config: holds the prices.
        arm: the tuned arm, for its tokens.
        seconds: machine seconds of a call in a full batch.
        rows: answers in that batch.
        latency: of single requests.
        training: seconds of the training; None: unknown.
    """
    prices = config.advise.prices or PriceConfig()
    missing, per_1000 = {}, None
    if prices.input is not None and prices.output is not None:
        paid = arm.prompt_tokens - prices.cached_discount * arm.shared_tokens
        per_1000 = (paid * prices.input + (arm.answer_tokens or 0.0) * prices.output) / 1000
        basis = f"token prices of advise.prices, {prices.cached_discount:.0%} off {arm.shared_tokens:,} shared tokens"
    elif prices.hour is not None:
        per_1000 = 1000 * seconds / 3600 * prices.hour
        basis = f"{seconds:.3f} s of the machine a call in batches of {rows}, at {prices.hour:g} an hour"
    else:
        basis = f"{seconds:.3f} s of the machine a call in batches of {rows}"
        missing["cost"] = f"advise.prices has no hour; {basis}"
    once = prices.training
    if once is None and prices.hour is not None and training is not None:
        once = training / 3600 * prices.hour
    if once is not None:
        once += prices.labelling + prices.hosting * config.advise.months
    return TunedServing(
        latency=latency,
        cost_per_1000=per_1000,
        basis=basis,
        missing=missing,
        seconds_per_call=seconds,
        rows=rows,
        training=once,
        hour=prices.hour,
    )


def repriced(config: Config, evidence: Evidence) -> Incumbents | None:
    """Return the section at the config's present prices, or None if nothing in it changes."""
    section = evidence.incumbents
    if section is None:
        return None
    known: Mapping[str, IncumbentConfig] = {each.name: each for each in config.evaluate.incumbents}
    compared = []
    for found in section.compared:
        side, priced_by, calls = found.serving, known.get(found.name), max(found.answered, 1)
        if priced_by is not None:
            prompt, completion = found.prompt_tokens / calls, found.completion_tokens / calls
            side = priced(priced_by, prompt, completion, side.latency)
        total = None if side.cost_per_1000 is None else side.cost_per_1000 * found.answered / 1000
        compared.append(found.model_copy(update={"serving": side, "cost": total}))
    tuned = section.tuned
    training: Any = evidence.lineage.get("adapter", {}).get("lineage", {}).get("training", {}).get("seconds")
    arm = evidence.arm(evidence.contrasts[0].treatment)
    new = Incumbents(
        tuned=tuned_side(config, arm, tuned.seconds_per_call, tuned.rows, tuned.latency, training),
        compared=tuple(compared),
    )
    return None if new == section else new
