"""The serving check: an engine answers the prompts that the trained model has answered, and both are compared."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_text
from tunewright.core.interrupts import run_async
from tunewright.core.progress import Reporter, Task
from tunewright.core.strict_json import standard_json
from tunewright.data.examples import Example
from tunewright.data.versions import Member
from tunewright.engines.protocol import Engine
from tunewright.evidence.common import Interval
from tunewright.evidence.statistics import (
    Floats,
    bootstrap_sums,
    cluster_sums,
    difference_interval,
    effective_items,
    percentiles,
    wilson,
)
from tunewright.gate.answers import Digest, Ids, ReferenceAnswer, TopTokens, ask, comparable, cut, distance
from tunewright.gate.prompts import Probe
from tunewright.gate.results import LIMITS, IntervalEstimate, Precision, ServedAs, ServingFigures
from tunewright.generation.requests import Completion, Request, TokenLogprob
from tunewright.metrics.calls import call_schema_valid
from tunewright.metrics.scorer import AnsweredItem, ItemScore, Scorer
from tunewright.metrics.texts import json_valid

NOISE = {"float32": 0.0005, "bfloat16": 0.01, "f16": 0.01, "q8_0": 0.05}
"""KL divergence in nats that rounding alone may cause, by the lower precision of the two models: see
docs/decisions/0018-nothing-untested-is-served.md for the measurements."""
_PRECISIONS: dict[str, Precision] = {"float32": "16-bit", "bfloat16": "16-bit", "f16": "16-bit", "q8_0": "8-bit"}
LOST = {name: LIMITS[precision].lost for name, precision in _PRECISIONS.items()}
"""The share of the adapter's effect that may be lost: the limits of exported models."""
WRONG = 0.05
"""The share of answers that may leave the reference's answer at a token that is not nearly as likely: one in twenty."""
LOGPROBS = 20
"""The number of likeliest tokens to request from an engine at each place: vLLM lists no more by default."""


@dataclass(frozen=True)
class EngineAnswer:
    """An engine's answer to one prompt."""

    completion: Completion
    """Its greedy answer."""
    listed: Mapping[int, TopTokens]
    """The reported distributions, by the number of the reference's answer tokens before them."""


@dataclass(frozen=True)
class ServingComparison:
    """A comparison of an engine's answers with the reference's."""

    probe: Probe
    chat: ChatFormat
    precision: str
    tolerance: float
    seed: int
    reporter: Reporter

    def ask(self, engine: Engine, references: Mapping[Digest, Sequence[ReferenceAnswer]]) -> list[list[EngineAnswer]]:
        """Send all prompts for all models together: their rows share batches, as tenants' do."""
        asked = [
            [(model, prompt, reference) for prompt, reference in zip(self.probe.prompts, answers, strict=True)]
            for model, answers in references.items()
        ]

        async def run() -> list[list[EngineAnswer]]:
            with self.reporter.task(f"The answers of {engine.name}", sum(map(len, asked)), "answers") as task:
                rows = (asyncio.gather(*(self._answer(engine, *each, task) for each in row)) for row in asked)
                return await asyncio.gather(*rows)

        return run_async(run())

    async def _answer(
        self, engine: Engine, model: Digest, prompt: Ids, reference: ReferenceAnswer, task: Task
    ) -> EngineAnswer:
        """Ask for a greedy answer, and for the distributions after the reference's tokens.

        While the engine's answer follows the reference's, it contains these distributions. From the
        place where they diverge, the rest is requested after the reference's own tokens.
        """
        wanted = reference.completion.ids
        answer, logprobs = await ask(engine, Request(prompt, model, self.probe.limit, logprobs=LOGPROBS))
        completion = cut(answer, self.probe.stop, self.chat)
        listed = _listed(logprobs, _common(completion.ids, wanted), 0, reference.places)
        rest = [place for place in reference.places if place not in listed]
        while rest:
            start, count = rest[0], rest[-1] - rest[0] + 1
            again, logprobs = await ask(engine, Request((*prompt, *wanted[:start]), model, count, logprobs=LOGPROBS))
            listed |= _listed(logprobs, _common(again.ids, wanted[start:]), start, rest)
            rest = [place for place in rest[1:] if place not in listed]
        task.advance()
        return EngineAnswer(completion, listed)

    def figures(
        self, served: ServedAs, references: Sequence[ReferenceAnswer], answers: Sequence[EngineAnswer]
    ) -> ServingFigures:
        """Return one model's figures."""
        members: Sequence[Member | None] = self.probe.members or [None] * len(answers)
        compared = [
            self._compared(str(number), member, reference, answer)
            for number, (member, reference, answer) in enumerate(zip(members, references, answers, strict=True))
        ]
        return serving_figures(served, compared, self.precision, self.tolerance, self.seed)

    def _compared(
        self, name: str, member: Member | None, reference: ReferenceAnswer, answer: EngineAnswer
    ) -> ComparedAnswer:
        rows = [row for row, place in enumerate(reference.places) if place in answer.listed]
        listed = [answer.listed[reference.places[row]] for row in rows]
        divergences = distance(reference.log_probs[rows], listed).kl.tolist() if rows else []
        own, theirs = comparable(reference.completion), comparable(answer.completion)
        trained_form, form = (
            None
            if member is None
            else well_formed(member.example, answer_text(self.chat, completion, member.example.prompt))
            for completion in (reference.completion, answer.completion)
        )
        return ComparedAnswer(
            name if member is None else member.cluster,
            divergences,
            reference.effect[rows].tolist(),
            own == theirs,
            reference.greedy.shortfall(theirs),
            trained_form,
            form,
        )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of leading tokens that are equal."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _listed(logprobs: Sequence[TokenLogprob], common: int, start: int, places: Sequence[int]) -> dict[int, TopTokens]:
    """Return the distributions at those places whose tokens before them are the reference's."""
    found = {}
    for place in places:
        if start <= place <= start + common and place - start < len(logprobs):
            ids, values = zip(*logprobs[place - start].top, strict=True)
            found[place] = TopTokens(torch.tensor(ids), torch.tensor(values, dtype=torch.float64))
    return found


@dataclass(frozen=True)
class ComparedAnswer:
    """An engine's answer compared with the reference's."""

    cluster: str
    divergences: Sequence[float]
    """KL divergences from the reference to the engine at the places that the engine has reported, in nats."""
    effects: Sequence[float]
    """KL divergences from the reference to the base, at the same places."""
    same: bool
    """True if both answers are the same, token by token."""
    shortfall: float
    """By how many nats the reference finds the engine's first other token less likely than its own."""
    trained_well_formed: bool | None
    """True if the reference's answer is well-formed JSON or calls; None if the row asks for neither."""
    well_formed: bool | None


def well_formed(example: Example, text: str) -> bool | None:
    """Return whether an answer is well-formed: calls where the ideal answer has calls, JSON where it is JSON.

    Calls are well-formed if they name declared functions and satisfy their schemas. None: the ideal answer is text.
    """
    if example.messages[-1].calls:
        scorer: Scorer = call_schema_valid("call_schema_valid")
    elif _is_json(example.output):
        scorer = json_valid("json_valid")
    else:
        return None
    score = scorer.item(AnsweredItem(text, example, (example.output,)))
    return isinstance(score, ItemScore) and score.value == 1.0


def _is_json(text: str) -> bool:
    """Return whether a text is a JSON object or array: a number or a word in quotes may be plain text."""
    try:
        return isinstance(standard_json(text), dict | list)
    except ValueError:
        return False


def serving_figures(
    served: ServedAs, answers: Sequence[ComparedAnswer], precision: str, tolerance: float, seed: int
) -> ServingFigures:
    """Return one model's figures."""
    clusters = [each.cluster for each in answers]
    sums = np.array([(sum(each.divergences), sum(each.effects), len(each.divergences)) for each in answers])
    drawn = bootstrap_sums(cluster_sums(sums, clusters), seed)
    drawn = drawn[drawn[:, 2] > 0]  # a resample may consist of answers without any place
    kl, effect = None, 0.0
    if sums[:, 2].sum():
        kl = _estimate(sums[:, 0].sum() / sums[:, 2].sum(), percentiles(drawn[:, 0] / drawn[:, 2]))
        effect = float(sums[:, 1].sum() / sums[:, 2].sum())
    formed = [each for each in answers if each.well_formed is not None]
    change = None
    if formed:
        own, trained = (
            np.array([float(bool(value)) for value in values])
            for values in ((each.well_formed for each in formed), (each.trained_well_formed for each in formed))
        )
        ways = [each.cluster for each in formed]
        change = _estimate(float((own - trained).mean()), difference_interval(own - trained, ways, seed))
    return ServingFigures(
        served=served,
        prompts=len(answers),
        places=int(sums[:, 2].sum()),
        kl=kl,
        kl_limit=max(NOISE[precision], LOST[precision] * effect),
        effect=effect,
        same=_share([each.same for each in answers], clusters),
        wrong=_share([each.shortfall > tolerance for each in answers], clusters),
        formed=len(formed),
        well_formed=_formed_share(formed, trained=False),
        trained_well_formed=_formed_share(formed, trained=True),
        change=change,
    )


def _formed_share(formed: Sequence[ComparedAnswer], *, trained: bool) -> IntervalEstimate | None:
    if not formed:
        return None
    values = [bool(each.trained_well_formed if trained else each.well_formed) for each in formed]
    return _share(values, [each.cluster for each in formed])


def _share(values: Sequence[bool], clusters: Sequence[str]) -> IntervalEstimate:
    numbers: Floats = np.array(values, dtype=np.float64)
    share = float(numbers.mean())
    return _estimate(share, wilson(share, effective_items(numbers, clusters)))


def _estimate(value: float, interval: Interval) -> IntervalEstimate:
    return IntervalEstimate(round(float(value), 6), round(interval.low, 6), round(interval.high, 6))


def shortcomings(figures: Sequence[ServingFigures]) -> tuple[str, ...]:
    """Return why the check fails, one sentence each; empty if it passes.

    A figure fails if its whole 95% interval is beyond its limit. A release does not serve the
    merged model, so its figures decide nothing.
    """
    found = []
    for each in figures:
        if each.served == "merged":
            continue
        name = "the adapter" if each.served == "adapter" else "the identity adapter"
        if each.kl is None:
            found.append(f"{name}: the engine reported no probability of any answer's token")
        elif each.kl.low > each.kl_limit:
            found.append(
                f"{name}: KL from the trained model {each.kl.value:.2g} nats "
                f"({each.kl.low:.2g} to {each.kl.high:.2g}; {each.kl_limit:.2g} allowed)"
            )
        if each.wrong.low > WRONG:
            found.append(
                f"{name}: {100 * each.wrong.value:.0f}% of the answers go another way where no tie explains it "
                f"({100 * each.wrong.low:.0f}% to {100 * each.wrong.high:.0f}%; {100 * WRONG:g}% allowed)"
            )
        if each.change is not None and each.change.high < 0:
            found.append(
                f"{name}: {-100 * each.change.value:.1f}% more answers are no well-formed JSON or calls "
                f"({-100 * each.change.high:.1f}% to {-100 * each.change.low:.1f}%)"
            )
    return tuple(found)
