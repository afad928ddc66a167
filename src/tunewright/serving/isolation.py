"""The isolation test: does each request get the answer of its own adapter, whatever else goes on in the engine?

Engines do not ship such a test, and have had the bugs: vLLM's CPU build answers requests for the base with an adapter
when its slots are full; llama.cpp and vLLM have reused the keys and values that another adapter computed. Nothing
reports them, since the answers look like answers.

An oracle (the base with one adapter at a time, nothing kept from one prompt to another) first finds *canaries*: prompts
on which the models differ, so that an answer from a wrong one is seen (:mod:`tunewright.serving.canaries`). Then the
engine is asked in the ways in which such bugs show, and each of its tokens is judged by the oracle: how much less
likely it is, in nats, than the token that the oracle finds the likeliest after the same text. An engine adds numbers up
in another order, so that of two tokens that are about as likely it may take the other one; then it falls short by a
trifle. The text of a wrong adapter falls short by whole nats somewhere.

Requests and the oracle's passes grow with the adapters, and not with their pairs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, Literal

from tunewright.core.progress import Reporter
from tunewright.engines.protocol import Engine
from tunewright.generation.requests import Finish, Request
from tunewright.serving.canaries import TOKENS, Answer, Canaries, Digest, Ids, Oracle, find_canaries

TOLERANCE = {"bfloat16": 0.75, "float32": 0.05, "f16": 0.1, "q8_0": 1.5}
"""Nats that a token of the right model may fall short, by the precision of the arithmetic: in bfloat16, logits are
rounded to 8 bits, which is up to 1/16 for logits of 8 to 16, in each of two models that are compared. The last two are
llama.cpp's, see docs/engines.md: f16 has 11 bits, and q8_0 is another model by a little."""
LONG = 144
"""Tokens of a prompt that fills a block of a prefix cache, which keeps whole blocks: of 128 tokens in vLLM without a
GPU, of 16 with one. What comes after the last whole block is computed by whoever is asked, so there is little of it."""
SHORT = 64
"""For an engine that keeps prefixes by the token, or none: what is longer only takes longer."""
_ROUNDS = 2
VERSION = 2
"""Of the checks: what an earlier version of them passed is tested again."""
_REASONS = 8


@dataclass(frozen=True)
class Failure:
    """An answer that is not its model's."""

    asked: str
    shortfall: float
    """In nats."""
    like: str | None
    """Of which model the answer could be, if of one."""


@dataclass(frozen=True)
class Check:
    """One of the ways in which the engine was asked."""

    name: str
    asked: int
    worst: float
    """The largest shortfall, in nats."""
    failures: tuple[Failure, ...]

    @property
    def wrong(self) -> int:
        """Answers that are not their models'."""
        return len(self.failures)


@dataclass(frozen=True)
class IsolationResult:
    """What the test found."""

    engine: str
    tolerance: float
    models: tuple[str, ...]
    checks: tuple[Check, ...]
    alike: tuple[tuple[str, str], ...]
    """Pairs that no prompt tells apart: if one answered for the other it would not be seen."""

    @property
    def verdict(self) -> Literal["isolated", "not isolated", "can't tell"]:
        """What follows."""
        if any(check.failures for check in self.checks):
            return "not isolated"
        return "can't tell" if self.alike else "isolated"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not isolated, or cannot be told, a line each; of many alike the first few and how many more."""
        lines = [
            f"{check.name}: {failure.asked} was asked, and the answer"
            + (f" is that of {failure.like}" if failure.like else f" falls short by {failure.shortfall:.1f} nats")
            for check in self.checks
            for failure in check.failures
        ]
        if len(lines) > _REASONS:
            lines[_REASONS:] = [f"and {len(lines) - _REASONS} more"]
        return (
            *lines,
            *(f"{one} and {other} answer alike here, and could not be told apart" for one, other in self.alike),
        )

    def as_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        checks = [
            {
                "name": check.name,
                "asked": check.asked,
                "worst_shortfall": round(check.worst, 4),
                "failures": [
                    {"asked": f.asked, "shortfall": round(f.shortfall, 4), "like": f.like} for f in check.failures
                ],
            }
            for check in self.checks
        ]
        return {
            "verdict": self.verdict,
            "engine": self.engine,
            "tolerance_nats": self.tolerance,
            "models": list(self.models),
            "checks": checks,
            "alike": [list(pair) for pair in self.alike],
        }


@dataclass(frozen=True)
class _Asked:
    check: str
    model: Digest
    prompt: Ids
    answer: Answer


@dataclass
class _Asking:
    """Asks the engine, and remembers what it said."""

    engine: Engine
    canaries: Canaries
    long: Canaries
    folders: Mapping[str, Path]
    shuffle: random.Random
    asked: list[_Asked] = field(default_factory=list)

    async def one(self, check: str, model: Digest, prompt: Ids) -> None:
        ids: list[int] = []
        finish: Finish | None = None
        async with aclosing(self.engine.stream(Request(prompt, model, TOKENS))) as deltas:
            async for delta in deltas:
                ids += delta.ids
                finish = delta.finish
        assert finish is not None
        self.asked.append(_Asked(check, model, prompt, Answer(tuple(ids), finish)))

    async def together(self, check: str, wanted: Iterable[tuple[Digest, Ids]]) -> None:
        shuffled = list(wanted)
        self.shuffle.shuffle(shuffled)
        await asyncio.gather(*(self.one(check, model, prompt) for model, prompt in shuffled))

    async def alone(self, check: str) -> None:
        for model, prompt in self.canaries.every:
            await self.one(check, model, prompt)

    async def mixed(self, check: str) -> None:
        for _ in range(_ROUNDS):
            await self.together(check, self.canaries.every)

    async def base_in_the_mix(self, check: str) -> None:
        """As many requests for the base as for all adapters together, in one batch with them."""
        base = self.canaries.prompts[None]
        adapters = [pair for pair in self.canaries.every if pair[0] is not None]
        for _ in range(_ROUNDS):
            await self.together(check, [*adapters, *((None, base[n % len(base)]) for n in range(len(adapters)))])

    async def warm_prefixes(self, check: str) -> None:
        """Each long prompt asked of one model, then of all others, then of all in another order.

        So everybody finds what another one has computed, and after the first round what all have. Whose requests come
        in the same pass is not controlled: a cache that is wrong only for what *one* certain other has just left
        would be seen if those two meet in this order, which each pair is not made to; a cache that does not tell two
        models apart has one entry for both, and is wrong for one of them in the last round, whoever came first.
        """
        prompts, models = self.long.distinct, list(self.long.prompts)
        first = {prompt: models[place % len(models)] for place, prompt in enumerate(prompts)}
        everyone = list(product(models, prompts))
        await self.together(check, [(model, prompt) for prompt, model in first.items()])
        await self.together(check, [(model, prompt) for model, prompt in everyone if model != first[prompt]])
        await self.together(check, everyone)

    async def evict_and_reload(self, check: str) -> None:
        """All adapters let go, then loaded in another order, with the base asked in between."""
        await self.unload(self.folders)
        await self.together(check, [(None, prompt) for prompt in self.canaries.prompts[None]])
        for digest in reversed(list(self.folders)):
            await self.load([digest])
            await self.together(check, [(m, p) for m, p in self.canaries.every if m in (None, digest)])
        await self.mixed(check)

    async def new_version(self, check: str) -> None:
        """What releases do: an adapter takes the place of another one, or is loaded beside it before that is let go.

        One half of the adapters takes the other half's places one by one, then that half comes beside them and stays
        alone; the same prompts are asked before and after. So each comes once after another one that was asked the
        same, and whichever free slot an engine takes first (the lowest, the oldest, the last left), some adapter comes
        into one that another has left.
        """
        digests, prompts = list(self.folders), self.long.distinct
        if len(digests) < 2:
            return
        one, other = digests[: len(digests) // 2], digests[len(digests) // 2 :]
        await self.unload([*other, *one])
        await self.load(one)
        await self.together(check, product(one, prompts))
        for old, new in zip_longest(one, other):
            await self.unload([old] if old else [])
            await self.load([new])
        await self.together(check, product([*other, None], prompts))
        await self.load(one)
        await self.together(check, product(one, prompts))
        await self.unload(other)
        await self.together(check, product([*one, None], prompts))
        await self.load(other)

    async def load(self, digests: Iterable[str]) -> None:
        for digest in digests:
            await self.engine.load(digest, self.folders[digest])

    async def unload(self, digests: Iterable[str]) -> None:
        for digest in digests:
            await self.engine.unload(digest)


def check_isolation(
    start: Callable[[], AbstractContextManager[Engine]],
    oracle: Oracle,
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
    """Ask an engine for the base and all the adapters in every way in which they could be mixed up.

    The oracle and the engine are never in memory together: each holds the base.

    Args:
        start: starts the engine with all of the adapters loaded; they are unloaded and loaded again. Nobody else may
            use it. Its context ends the engine.
        folders: the adapters, by digest.
        prompts: from which canaries are chosen: of the adapters' own tasks, on which they differ.
        context: tokens of the longest conversation that the engine takes.
        tolerance: nats that a right answer's token may fall short: see :data:`TOLERANCE`.
        names: what people call the models.
        long: tokens of the prompts by which caches of prefixes are tested: see :data:`LONG` and :data:`SHORT`.

    Raises:
        RequestFailedError, EngineStoppedError: the engine does not answer.
    """
    models: list[Digest] = [None, *folders]
    longer = list(dict.fromkeys(_lengthened(prompt, min(long, context - TOKENS)) for prompt in prompts))
    with reporter.task("Looking for prompts that tell the models apart", 2 * len(models), "models") as task:
        canaries = find_canaries(oracle, models, prompts, tolerance, task.advance)
        lengthy = find_canaries(oracle, models, longer, tolerance, task.advance)
    oracle.rest()
    asked = _ask(start, canaries, lengthy, folders, reporter, seed)
    judge = _Judge(oracle, {**canaries.said, **lengthy.said})
    judged = _judged(asked, canaries, judge, tolerance, names, reporter)
    oracle.rest()
    alike = sorted({_sorted(names[one], names[other]) for one, other in canaries.alike & lengthy.alike})
    return IsolationResult(
        asked.engine,
        tolerance,
        tuple(names[model] for model in models),
        judged,
        tuple(alike),
    )


@dataclass(frozen=True)
class _Answers:
    """What an engine said."""

    engine: str
    checks: tuple[str, ...]
    asked: Sequence[_Asked]


def _ask(
    start: Callable[[], AbstractContextManager[Engine]],
    canaries: Canaries,
    lengthy: Canaries,
    folders: Mapping[str, Path],
    reporter: Reporter,
    seed: int,
) -> _Answers:
    """Start the engine, ask it everything and end it."""
    with start() as engine:
        asking = _Asking(engine, canaries, lengthy, folders, random.Random(seed))
        checks = {
            "each alone": asking.alone,
            "all mixed": asking.mixed,
            "the base in the mix": asking.base_in_the_mix,
            "prefixes warm": asking.warm_prefixes,
            "evicted and reloaded": asking.evict_and_reload,
            "a new version": asking.new_version,
        }

        async def ask_all() -> None:
            with reporter.task("Asking the engine", len(checks), "checks") as task:
                for name, ask in checks.items():
                    await ask(name)
                    task.advance(note=name)

        asyncio.run(ask_all())
        return _Answers(engine.name, tuple(checks), asking.asked)


def _lengthened(prompt: Ids, tokens: int) -> Ids:
    """Return the last so many tokens of the prompt over and over: it ends as the prompt does, where models differ."""
    return (prompt * -(-tokens // len(prompt)))[-tokens:]


def _sorted(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one <= other else (other, one)


class _Judge:
    """How far answers fall short; each is looked at once, however often it was given."""

    def __init__(self, oracle: Oracle, said: Mapping[tuple[Digest, Ids], Answer]) -> None:
        self._oracle = oracle
        self._said = said
        # The oracle's own answers are right by what they are.
        self._known = {(model, prompt, answer): 0.0 for (model, prompt), answer in said.items()}

    def shortfalls(self, model: Digest, prompt: Ids, answers: Iterable[Answer]) -> list[float]:
        """For each answer, by how many nats it falls short as the model's."""
        answers = list(answers)
        unknown = list(dict.fromkeys(a for a in answers if (model, prompt, a) not in self._known))
        if unknown:
            short = self._oracle.shortfalls(model, prompt, unknown)
            self._known |= {(model, prompt, answer): nats for answer, nats in zip(unknown, short, strict=True)}
        return [self._known[model, prompt, answer] for answer in answers]

    def whose(self, one: _Asked, models: Iterable[Digest], tolerance: float) -> tuple[Digest] | None:
        """Return the other model whose answer it could be."""
        others = [model for model in models if model != one.model]
        for model in others:
            if self._said.get((model, one.prompt)) == one.answer:
                return (model,)
        short = {model: self.shortfalls(model, one.prompt, [one.answer])[0] for model in others}
        best = min(short, key=lambda model: short[model], default=None)
        return (best,) if short and short[best] <= tolerance else None


def _judged(
    said: _Answers,
    canaries: Canaries,
    judge: _Judge,
    tolerance: float,
    names: Mapping[Digest, str],
    reporter: Reporter,
) -> tuple[Check, ...]:
    given: dict[Digest, dict[Ids, list[_Asked]]] = {}
    for one in said.asked:
        given.setdefault(one.model, {}).setdefault(one.prompt, []).append(one)
    short: dict[_Asked, float] = {}
    with reporter.task("Judging its answers", len(given), "models") as task:
        for model, by_prompt in given.items():
            for prompt, asked in by_prompt.items():
                short |= zip(asked, judge.shortfalls(model, prompt, [one.answer for one in asked]), strict=True)
            task.advance()
    judged = []
    for name in said.checks:
        mine = [one for one in said.asked if one.check == name]
        failures = []
        for one in mine:
            if short[one] > tolerance:
                like = judge.whose(one, canaries.prompts, tolerance)
                failures.append(Failure(names[one.model], short[one], None if like is None else names[like[0]]))
        judged.append(Check(name, len(mine), max((short[one] for one in mine), default=0.0), tuple(failures)))
    return tuple(judged)
