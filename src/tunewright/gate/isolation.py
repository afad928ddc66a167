"""The isolation test: every request must get the answer of its own adapter, regardless of what else
the engine computes.

Engines ship no such test, and have had such bugs. vLLM's CPU build answers requests for the base with an adapter when
its slots are full; llama.cpp and vLLM have reused keys and values that another adapter had computed. Nothing reports
these bugs, since the answers look like answers.

A reference (the base with one adapter at a time, which keeps nothing between prompts) first finds *probes*: prompts on
which the models differ, so that an answer of a wrong model is detected (:func:`find_probes`). Then the engine gets
requests in the patterns in which such bugs show. The reference scores each token of the answers: by how many nats the
token is less likely than the best one after the same text. An engine adds numbers in another order, so of two tokens of
about the same likelihood it may choose the other. That costs a small fraction of a nat. The text of a wrong adapter
falls short by whole nats at some token.

The numbers of requests and of reference passes grow with the adapters, and not with their pairs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import product, zip_longest
from pathlib import Path
from typing import Protocol

from tunewright.core.progress import Reporter
from tunewright.engines.protocol import Engine
from tunewright.gate.answers import TOKENS, Digest, GreedyAnswer, Ids, ModelAnswer, ask
from tunewright.gate.results import Failure, IsolationCheck, IsolationResult
from tunewright.generation.requests import Request

TOLERANCE = {"bfloat16": 0.75, "float32": 0.05, "f16": 0.1, "q8_0": 1.5}
"""Maximum nats by which a correct token may fall short, by the precision of the arithmetic.

bfloat16 rounds logits to 8 bits, which is up to 1/16 for logits of 8 to 16, in each of the two models compared. The
last two are llama.cpp's (see docs/benchmarks/serving.md): f16 has 11 bits, and q8_0 is a slightly different model.
"""
LONG = 144
"""Tokens of a prompt that fills a block of vLLM's prefix cache, which keeps whole blocks only: of 128 tokens without a
GPU, of 16 with one. The rest after the last block is computed by each model itself, so it should be short."""
SHORT = 64
"""The same for an engine that caches prefixes by the token, or not at all: longer prompts would only take longer."""
VERSION = 2
"""The version of the checks; a result of an earlier version does not count."""
_ROUNDS = 2
"""Times that a mixed batch is sent, since chance decides which rows share a pass."""


@dataclass(frozen=True)
class _Observation:
    """A request to the engine, and its answer."""

    check: str
    model: Digest
    prompt: Ids
    answer: ModelAnswer


@dataclass
class _Session:
    """Sends requests to the engine, and collects its answers."""

    engine: Engine
    probes: Probes
    long: Probes
    folders: Mapping[str, Path]
    shuffle: random.Random
    observations: list[_Observation] = field(default_factory=list)

    async def send(self, check: str, model: Digest, prompt: Ids) -> None:
        answer, _ = await ask(self.engine, Request(prompt, model, TOKENS))
        self.observations.append(_Observation(check, model, prompt, answer))

    async def send_together(self, check: str, requests: Iterable[tuple[Digest, Ids]]) -> None:
        """Send requests together, in random order: their rows share batches."""
        shuffled = list(requests)
        self.shuffle.shuffle(shuffled)
        await asyncio.gather(*(self.send(check, model, prompt) for model, prompt in shuffled))

    async def alone(self, check: str) -> None:
        """Send one request at a time: the engine loads and applies each adapter correctly."""
        for model, prompt in self.probes.every:
            await self.send(check, model, prompt)

    async def mixed(self, check: str) -> None:
        """All models in one batch: each row gets its own adapter."""
        for _ in range(_ROUNDS):
            await self.send_together(check, self.probes.every)

    async def base_in_the_mix(self, check: str) -> None:
        """Send as many requests for the base as for all adapters together, in one batch with them.

        Engines mark a row without an adapter by a special index, which vLLM's CPU build takes for the last slot.
        """
        base = self.probes.prompts[None]
        adapters = [pair for pair in self.probes.every if pair[0] is not None]
        for _ in range(_ROUNDS):
            await self.send_together(check, [*adapters, *((None, base[n % len(base)]) for n in range(len(adapters)))])

    async def warm_prefixes(self, check: str) -> None:
        """Send each long prompt to one model, then to all others, then to all models in another order.

        So every model finds prefixes of another model, and after the first round prefixes of all. The order within
        a round is random. So a cache that confuses two models only directly after each other may escape. But a
        cache that does not distinguish two models at all has one entry for both, and the last round detects it.
        """
        prompts, models = self.long.distinct, list(self.long.prompts)
        first = {prompt: models[place % len(models)] for place, prompt in enumerate(prompts)}
        everyone = list(product(models, prompts))
        await self.send_together(check, [(model, prompt) for prompt, model in first.items()])
        await self.send_together(check, [(model, prompt) for model, prompt in everyone if model != first[prompt]])
        await self.send_together(check, everyone)

    async def evict_and_reload(self, check: str) -> None:
        """All adapters unloaded, then loaded in another order, with requests for the base in between.

        An engine may leave an adapter's weights in its slot after unloading it.
        """
        await self.unload(self.folders)
        await self.send_together(check, [(None, prompt) for prompt in self.probes.prompts[None]])
        for digest in reversed(list(self.folders)):
            await self.load([digest])
            await self.send_together(check, [(m, p) for m, p in self.probes.every if m in (None, digest)])
        await self.mixed(check)

    async def new_version(self, check: str) -> None:
        """Simulate releases: an adapter replaces another one, or is loaded before the other is unloaded.

        One half of the adapters replaces the other half one by one. Then the replaced half is
        loaded again and stays alone. The same prompts are sent before and after. So each adapter
        follows another one with the same prompts. Whichever free slot an engine takes first
        (lowest, oldest, last freed), some adapter gets a slot that another one has left.
        """
        digests, prompts = list(self.folders), self.long.distinct
        if len(digests) < 2:
            return
        one, other = digests[: len(digests) // 2], digests[len(digests) // 2 :]
        await self.unload([*other, *one])
        await self.load(one)
        await self.send_together(check, product(one, prompts))
        for old, new in zip_longest(one, other):
            await self.unload([old] if old else [])
            await self.load([new])
        await self.send_together(check, product([*other, None], prompts))
        await self.load(one)
        await self.send_together(check, product(one, prompts))
        await self.unload(other)
        await self.send_together(check, product([*one, None], prompts))
        await self.load(other)

    async def run(self, reporter: Reporter) -> None:
        """Run all checks, one after the other."""
        with reporter.task("Testing the engine", len(CHECKS), "checks") as task:
            for name, check in CHECKS.items():
                await check(self, name)
                task.advance(note=name)

    async def load(self, digests: Iterable[str]) -> None:
        for digest in digests:
            await self.engine.load(digest, self.folders[digest])

    async def unload(self, digests: Iterable[str]) -> None:
        for digest in digests:
            await self.engine.unload(digest)


CHECKS: Mapping[str, Callable[[_Session, str], Awaitable[None]]] = {
    "each alone": _Session.alone,
    "all mixed": _Session.mixed,
    "the base in the mix": _Session.base_in_the_mix,
    "prefixes warm": _Session.warm_prefixes,
    "evicted and reloaded": _Session.evict_and_reload,
    "a new version": _Session.new_version,
}
"""The checks by name, in their order."""


def check_isolation(
    start: Callable[[], AbstractContextManager[Engine]],
    reference: Reference,
    folders: Mapping[str, Path],
    prompts: Sequence[Ids],
    *,
    context: int,
    tolerance: float,
    names: Mapping[Digest, str],
    reporter: Reporter,
    long: int = LONG,
    seed: int = 0,
) -> IsolationResult:
    """Send an engine requests for the base and all adapters, in every pattern in which it could mix them up.

    The reference and the engine are never in memory together, since each holds the base.

    Args:
        start: starts the engine with all adapters loaded, and stops it at the end of the context. The test unloads and
            loads adapters, so nothing else may use the engine.
        folders: the adapters by digest.
        prompts: the candidates for probes, from the adapters' own tasks, on which they differ.
        context: the engine's context length in tokens.
        tolerance: maximum nats by which a correct token may fall short: see :data:`TOLERANCE`.
        names: display names of the models.
        long: tokens of the prompts that test prefix caches: see :data:`LONG` and :data:`SHORT`.
    """
    models: list[Digest] = [None, *folders]
    # Repeated, and cut from the left to this length: a prompt keeps its end, where models differ.
    size = min(long, context - TOKENS)
    longer = list(dict.fromkeys((prompt * -(-size // len(prompt)))[-size:] for prompt in prompts))
    with reporter.task("Looking for prompts that tell the models apart", 2 * len(models), "models") as task:
        probes = find_probes(reference, models, prompts, tolerance, task.advance)
        long_probes = find_probes(reference, models, longer, tolerance, task.advance)
    reference.unload()
    name, observations = _collect(start, probes, long_probes, folders, reporter, seed)
    scorer = _Scorer(reference, {**probes.answers, **long_probes.answers})
    checks, failures = _scored(observations, probes, scorer, tolerance, names, reporter)
    reference.unload()
    both = probes.alike & long_probes.alike
    alike = sorted({(min(pair), max(pair)) for pair in ((names[one], names[other]) for one, other in both)})
    return IsolationResult(name, tolerance, tuple(names[model] for model in models), checks, failures, tuple(alike))


def _collect(
    start: Callable[[], AbstractContextManager[Engine]],
    probes: Probes,
    long_probes: Probes,
    folders: Mapping[str, Path],
    reporter: Reporter,
    seed: int,
) -> tuple[str, list[_Observation]]:
    """Start the engine, send it all requests, and stop it; return its name and answers."""
    # A separate function, so that the engine's base leaves memory before the reference's base is loaded.
    with start() as engine:
        session = _Session(engine, probes, long_probes, folders, random.Random(seed))
        asyncio.run(session.run(reporter))
        return engine.name, session.observations


class _Scorer:
    """Scores answers by the reference; an answer that occurs many times is scored once."""

    def __init__(self, reference: Reference, correct: Mapping[tuple[Digest, Ids], ModelAnswer]) -> None:
        self._reference = reference
        self._correct = correct
        # The reference's own answers need no scoring.
        self._known = {(model, prompt, answer): 0.0 for (model, prompt), answer in correct.items()}

    def shortfalls(self, model: Digest, prompt: Ids, answers: Iterable[ModelAnswer]) -> list[float]:
        """Return the shortfall of each answer in nats, as an answer of this model."""
        answers = list(answers)
        unknown = list(dict.fromkeys(a for a in answers if (model, prompt, a) not in self._known))
        if unknown:
            short = self._reference.shortfalls(model, prompt, unknown)
            self._known |= {(model, prompt, answer): nats for answer, nats in zip(unknown, short, strict=True)}
        return [self._known[model, prompt, answer] for answer in answers]

    def source(self, wrong: _Observation, models: Iterable[Digest], tolerance: float) -> tuple[Digest] | None:
        """Return the other model that could have given a wrong answer."""
        others = [model for model in models if model != wrong.model]
        for model in others:
            if self._correct.get((model, wrong.prompt)) == wrong.answer:
                return (model,)
        short = {model: self.shortfalls(model, wrong.prompt, [wrong.answer])[0] for model in others}
        best = min(short, key=lambda model: short[model], default=None)
        return (best,) if short and short[best] <= tolerance else None


def _scored(
    observations: Sequence[_Observation],
    probes: Probes,
    scorer: _Scorer,
    tolerance: float,
    names: Mapping[Digest, str],
    reporter: Reporter,
) -> tuple[tuple[IsolationCheck, ...], tuple[Failure, ...]]:
    # By model first: the reference holds one adapter at a time.
    by_model: dict[Digest, dict[Ids, list[_Observation]]] = {}
    for observation in observations:
        by_model.setdefault(observation.model, {}).setdefault(observation.prompt, []).append(observation)
    short: dict[_Observation, float] = {}
    with reporter.task("Scoring its answers", len(by_model), "models") as task:
        for model, by_prompt in by_model.items():
            for prompt, observed in by_prompt.items():
                nats = scorer.shortfalls(model, prompt, [observation.answer for observation in observed])
                short |= zip(observed, nats, strict=True)
            task.advance()
    checks: list[IsolationCheck] = []
    failures: list[Failure] = []
    for name in CHECKS:
        own = [observation for observation in observations if observation.check == name]
        wrong = [observation for observation in own if short[observation] > tolerance]
        for observation in wrong:
            source = scorer.source(observation, probes.prompts, tolerance)
            like = None if source is None else names[source[0]]
            failures.append(Failure(name, names[observation.model], short[observation], like))
        worst = max((short[observation] for observation in own), default=0.0)
        checks.append(IsolationCheck(name, len(own), len(wrong), round(worst, 4)))
    return tuple(checks), tuple(failures)


PROBE_MARGIN = 2.0
"""Minimum shortfall of a wrong answer to a probe, in tolerances. More than one tolerance is a failure."""
PER_MODEL = 2
"""Minimum number of probes of a model."""
_GROUP = 2
"""Number of prompts that are tried together."""


class Reference(Protocol):
    """The source of correct answers."""

    def greedy(self, model: Digest, prompts: Sequence[Ids], tokens: int = TOKENS) -> list[GreedyAnswer]:
        """Return a model's greedy answers, each of at most this many tokens."""

    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[ModelAnswer]) -> list[float]:
        """Return for each answer how many nats less likely its worst token is than the model's best one there."""

    def unload(self) -> None:
        """Free the model's memory until the next call."""


@dataclass(frozen=True)
class Probes:
    """Probes by model, the pairs of models that no probe distinguishes, and the reference's answers."""

    prompts: dict[Digest, tuple[Ids, ...]]
    alike: frozenset[tuple[Digest, Digest]]
    answers: Mapping[tuple[Digest, Ids], ModelAnswer]

    @property
    def every(self) -> list[tuple[Digest, Ids]]:
        """Pairs of a model and each of its probes."""
        return [(model, prompt) for model, prompts in self.prompts.items() for prompt in prompts]

    @property
    def distinct(self) -> list[Ids]:
        """All prompts; models share most of them, since all models try the same prompts first."""
        return list(dict.fromkeys(prompt for _, prompt in self.every))


def find_probes(
    reference: Reference,
    models: Sequence[Digest],
    prompts: Sequence[Ids],
    tolerance: float,
    advance: Callable[[], None] = lambda: None,
) -> Probes:
    """Choose a few prompts for each model, each of which distinguishes it from a model that earlier prompts do not.

    Most pairs of models cost no pass over a model. Two greedy answers agree up to the token at which they diverge.
    There the model's own answer has already shown by how much the other's token is less likely. So the number of
    passes grows with the models, and not with their pairs.

    Prompts are tried in their order, a few at a time, until all pairs are distinguished. ``advance`` is called
    after the first answers of each model.
    """
    greedy: dict[tuple[Digest, Ids], GreedyAnswer] = {}
    chosen: dict[Digest, list[Ids]] = {model: [] for model in models}
    unresolved = {model: set(models) - {model} for model in models}
    for place in range(0, len(prompts), _GROUP):
        group = prompts[place : place + _GROUP]
        against = {
            model: [other for other in models if other in (unresolved[model] or set(models) - {model})]
            for model in models
            if unresolved[model] or len(chosen[model]) < PER_MODEL
        }
        for model in models:
            if model in against or any(model in others for others in against.values()):
                greedy |= {(model, p): own for p, own in zip(group, reference.greedy(model, group), strict=True)}
            if place == 0:
                advance()
        for model, others in against.items():
            resolved = _distinguished(reference, model, group, others, greedy, PROBE_MARGIN * tolerance)
            for prompt in sorted(group, key=lambda prompt: -len(resolved[prompt] & unresolved[model])):
                if resolved[prompt] & unresolved[model] or (resolved[prompt] and len(chosen[model]) < PER_MODEL):
                    chosen[model].append(prompt)
                    unresolved[model] -= resolved[prompt]
    return Probes(
        {model: tuple(found or prompts[:1]) for model, found in chosen.items()},
        frozenset((model, other) for model, others in unresolved.items() for other in others),
        {request: own.answer for request, own in greedy.items()},
    )


def _distinguished(
    reference: Reference,
    model: Digest,
    group: Sequence[Ids],
    others: Collection[Digest],
    greedy: Mapping[tuple[Digest, Ids], GreedyAnswer],
    margin: float,
) -> dict[Ids, set[Digest]]:
    """Return by prompt the models whose answers fall short by the margin where this model is addressed.

    Answers are first compared at the token where they diverge, which is free. Whole answers are scored only for models
    that no prompt distinguishes in this way.
    """
    resolved = {
        prompt: {other for other in others if greedy[model, prompt].shortfall(greedy[other, prompt].answer) >= margin}
        for prompt in group
    }
    rest = set(others).difference(*resolved.values())
    for prompt in group:
        answers = {other: greedy[other, prompt].answer for other in others if other in rest}
        differing = list(dict.fromkeys(a for a in answers.values() if a != greedy[model, prompt].answer))
        if differing:
            short = dict(zip(differing, reference.shortfalls(model, prompt, differing), strict=True))
            resolved[prompt] |= {other for other, answer in answers.items() if short.get(answer, 0.0) >= margin}
    return resolved
