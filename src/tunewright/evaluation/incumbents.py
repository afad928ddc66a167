"""Incumbents as arms: their frozen answers scored like any arm's, and their cost and latency against the adapter's."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.config import Config, IncumbentConfig, PriceConfig
from tunewright.core.io import file_digest
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import TUNED
from tunewright.evaluation.frozen_answers import FrozenSet, IncumbentModel, Split, incumbent_models, trained_on
from tunewright.evaluation.generations import ArmAnswer, Generator, Prompt
from tunewright.evidence.common import ArmScore, StoredPrompt
from tunewright.evidence.files import PromptMessages
from tunewright.evidence.incumbents import Incumbent, Incumbents, Latency, Serving, TunedServing, measured_drop
from tunewright.evidence.schema import Arm, Evidence
from tunewright.evidence.scoring import ScoredArms, leave_out, score_arm, score_of
from tunewright.metrics import score_all, score_text
from tunewright.model_io.replies import cost


class IncumbentArms:
    """The incumbents of one evaluation."""

    def __init__(self, arm_runner: ArmRunner, split: Split) -> None:
        self.arm_runner = arm_runner
        self.split = split
        self.members = arm_runner.version.examples(split)
        self.models = incumbent_models(arm_runner.project, arm_runner.reporter)
        self._dev: dict[str, ArmScore] = {}
        self._frozen: dict[str, FrozenSet] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """Their part of everything that decides an evaluation; nothing without incumbents."""
        if not self.models:
            return {}
        unfrozen = {model.config.name: left for model in self.models if (left := model.unfrozen(self.members))}
        return {
            "incumbents": [model.identity for model in self.models],
            "non_inferiority_margin": self.arm_runner.settings.non_inferiority_margin,
            **({"unfrozen": unfrozen} if unfrozen else {}),
        }

    def try_dev(self) -> None:
        """Have each incumbent answer dev and report its score, so that a wrong setting shows before test is opened."""
        rows = self.arm_runner.version.examples("dev")
        for model in self.models:
            frozen = model.answers(rows, "dev")
            if not frozen.given:
                continue
            scorer = self.arm_runner.scorers[0]
            kept = [place for place in range(len(rows)) if place not in frozen.gaps]
            texts = [answer.answer for answer in frozen.given]
            scores = score_all(scorer, texts, [rows[p].example for p in kept], [m.example for m in rows])
            score = score_of(scores, [rows[p].cluster for p in kept], self.arm_runner.project.config.seed)
            self._dev[model.arm] = score
            self.arm_runner.reporter.say(f"{model.arm} on dev: {score_text(scorer.name, score.value)}")

    def ask(self) -> dict[str, list[ArmAnswer]]:
        """Return the answers to the split by arm; without an answer the text is empty, and `scored` leaves it out."""
        self._frozen = {model.arm: model.answers(self.members, self.split) for model in self.models}
        return {
            arm: [
                ArmAnswer("", False, (), 0)
                if answer is None or answer.gap is not None
                else ArmAnswer(answer.answer, answer.finish == "length", (), answer.completion_tokens)
                for answer in frozen.answers
            ]
            for arm, frozen in self._frozen.items()
        }

    def prompts(self, messages: PromptMessages) -> dict[str, list[StoredPrompt | None]]:
        """Return each item's request by arm, None without an answer; ``messages`` gets the messages."""
        return {
            model.arm: [
                None
                if place in self._frozen[model.arm].gaps
                else StoredPrompt(messages=messages.add(model.messages(m.example)))
                for place, m in enumerate(self.members)
            ]
            for model in self.models
        }

    def scored(self, scored: ScoredArms) -> ScoredArms:
        """Return the scores without the items that an incumbent did not answer."""
        for arm, frozen in self._frozen.items():
            scored = scored.leaving_out(arm, frozen.gaps)
        return scored

    def arms(self, scored: ScoredArms) -> list[Arm]:
        """Return the incumbents' arms."""
        return [
            score_arm(
                name=name,
                kind="incumbent",
                shots=0,
                scores=scored.of_arm(name),
                clusters=scored.clusters,
                truncated=sum(answer.finish == "length" for answer in frozen.given),
                prompt_tokens=sum(answer.prompt_tokens for answer in frozen.given) / max(len(frozen.given), 1),
                seed=self.arm_runner.project.config.seed,
            ).model_copy(
                update={"answer_tokens": sum(a.completion_tokens for a in frozen.given) / max(len(frozen.given), 1)}
            )
            for name, frozen in self._frozen.items()
        ]

    def section(self, scored: ScoredArms, adapter: Adapter, tuned: Arm) -> Incumbents | None:
        """Return the evidence's section; None without incumbents."""
        if not self.models:
            return None
        arms = next(iter(scored.by_metric.values()))
        compared = [self._compared(model, arms, scored.clusters) for model in self.models]
        return Incumbents(tuned=measured_tuned(self.arm_runner, adapter, self.members, tuned), compared=tuple(compared))

    def _compared(self, model: IncumbentModel, arms: Mapping[str, Any], clusters: Sequence[str]) -> Incumbent:
        frozen, config = self._frozen[model.arm], model.config
        given = frozen.given
        times = sorted(answer.time for answer in given if answer.time is not None)
        serving = incumbent_serving(config, frozen)
        gaps = list(frozen.gaps.values())
        ours, theirs = arms[TUNED.name], arms[model.arm]
        margin, seed = self.arm_runner.settings.non_inferiority_margin, self.arm_runner.project.config.seed
        known = trained_on(model, self.arm_runner.project, self.arm_runner.version)
        seen = {place: "trained on" for place, m in enumerate(self.members) if m.key in known}
        unseen = None
        if 0 < len(seen) < len(self.members):
            unseen = measured_drop(ours, leave_out(theirs, seen), clusters, margin, seed)
        return Incumbent(
            name=config.name,
            arm=model.arm,
            model=str(config.model),
            url=str(config.base_url),
            file=os.path.relpath(frozen.path, model.folder.parent),
            file_digest=file_digest(frozen.path),
            versions=frozen.versions,
            first=times[0] if times else "",
            last=times[-1] if times else "",
            gaps={reason: gaps.count(reason) for reason in dict.fromkeys(gaps)},
            truncated=sum(answer.finish == "length" for answer in given),
            prompt_tokens=sum(answer.prompt_tokens for answer in given),
            completion_tokens=sum(answer.completion_tokens for answer in given),
            estimated=sum(answer.estimated for answer in given),
            cost=None if serving.cost_per_1000 is None else serving.cost_per_1000 * len(given) / 1000,
            serving=serving,
            dev=self._dev.get(model.arm),
            drop=measured_drop(ours, theirs, clusters, margin, seed),
            seen=len(seen),
            unseen=unseen,
        )


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
    """Measure the tuned arm's speed: a full batch for its cost, single requests for its latency."""
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

    ``seconds`` is the time of a call in a full batch of ``rows``; ``training`` the training's, if known.
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
