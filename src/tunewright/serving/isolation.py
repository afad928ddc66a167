"""The isolation test: does each request get the answer of its own adapter, whatever else goes on in the engine?

Engines do not ship such a test, and have had the bugs: vLLM's CPU build answers requests for the base with an adapter
when its slots are full; llama.cpp and vLLM have reused the keys and values that another adapter computed. Nothing
reports them, since the answers look like answers.

An oracle (the base with one adapter at a time, whole sequences, nothing cached) first finds *canaries*: prompts on
which the models differ, so that an answer from a wrong one is seen. Then the engine is asked in the ways in which such
bugs show, and each of its tokens is judged by the oracle: how much less likely it is, in nats, than the token that the
oracle finds the likeliest after the same text. An engine adds numbers up in another order, so that of two tokens that
are about as likely it may take the other one; then it falls short by a trifle. The text of a wrong adapter falls short
by whole nats somewhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tunewright.models.requests import Finish, Request
from tunewright.progress import Reporter
from tunewright.serving.engines.protocol import Engine

Digest = str | None
"""A model: an adapter's digest, or None for the base."""
Ids = tuple[int, ...]

TOLERANCE = {"bfloat16": 0.75, "float32": 0.05, "f16": 0.1, "q8_0": 1.5}
"""Nats that a token of the right model may fall short, by the precision of the arithmetic: in bfloat16, logits are
rounded to 8 bits, which is up to 1/16 for logits of 8 to 16, in each of two models that are compared. The last two are
llama.cpp's, see docs/engines.md: f16 has 11 bits, and q8_0 is another model by a little."""
CANARY = 2.0
"""A canary's wrong answer falls short by so many tolerances at least: what is over one is a failure."""
TOKENS = 8
"""Of an answer: enough to differ, few enough to be asked often."""
PER_MODEL = 2
LONG = 300
"""Tokens of a prompt that fills two blocks of a prefix cache, which keeps whole blocks: of 128 tokens in vLLM without
a GPU, of 16 with one."""
SHORT = 64
"""For an engine that keeps prefixes by the token, or none: what is longer only takes longer."""
_ROUNDS = 2
_AT_ONCE = 4
VERSION = 1
"""Of the checks: what an earlier version of them passed is tested again."""
_REASONS = 8


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    ids: Ids
    finish: Finish


class Oracle(Protocol):
    """The right answers."""

    def answers(self, model: Digest, prompts: Sequence[Ids]) -> list[Answer]:
        """Its greedy answers, of :data:`TOKENS` tokens at most."""

    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[Answer]) -> list[float]:
        """For each answer, by how many nats its worst token falls short of the model's likeliest one there."""


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
class Canaries:
    """Prompts by model that tell it from the others, and the pairs that none does."""

    prompts: dict[Digest, tuple[Ids, ...]]
    alike: frozenset[tuple[Digest, Digest]]


def find_canaries(
    oracle: Oracle,
    models: Sequence[Digest],
    prompts: Sequence[Ids],
    tolerance: float,
    advance: Callable[[], None] = lambda: None,
) -> Canaries:
    """For each model a few prompts, each of which tells it from some other that those before do not.

    Prompts are tried in their order, and no more of them than it takes; ``advance`` is called after each model.
    """
    answers: dict[Ids, dict[Digest, Answer]] = {}
    found: dict[Digest, tuple[Ids, ...]] = {}
    alike = set()
    for model in models:
        others = [other for other in models if other != model]
        untold = set(others)
        chosen: list[Ids] = []
        for place, prompt in enumerate(prompts):
            if prompt not in answers:
                group = prompts[place : place + _AT_ONCE]
                by_model = {each: oracle.answers(each, group) for each in models}
                answers |= {p: {each: by_model[each][n] for each in models} for n, p in enumerate(group)}
            said = oracle.shortfalls(model, prompt, [answers[prompt][other] for other in others])
            told = {other for other, short in zip(others, said, strict=True) if short >= CANARY * tolerance}
            if told & untold or (told and len(chosen) < PER_MODEL):
                chosen.append(prompt)
                untold -= told
            if len(chosen) >= PER_MODEL and not untold:
                break
        found[model] = tuple(chosen or prompts[:1])
        alike |= {(model, other) for other in untold}
        advance()
    return Canaries(found, frozenset(alike))


@dataclass
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

    @property
    def models(self) -> list[Digest]:
        return list(self.canaries.prompts)

    @property
    def every(self) -> list[tuple[Digest, Ids]]:
        """Each model with each of its canaries."""
        return [(model, prompt) for model, prompts in self.canaries.prompts.items() for prompt in prompts]

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
        for model, prompt in self.every:
            await self.one(check, model, prompt)

    async def mixed(self, check: str) -> None:
        for _ in range(_ROUNDS):
            await self.together(check, self.every)

    async def base_in_the_mix(self, check: str) -> None:
        """As many requests for the base as for all adapters together, in one batch with them."""
        base = self.canaries.prompts[None]
        adapters = [pair for pair in self.every if pair[0] is not None]
        for _ in range(_ROUNDS):
            await self.together(check, [*adapters, *((None, base[n % len(base)]) for n in range(len(adapters)))])

    async def warm_prefixes(self, check: str) -> None:
        """The same prompts asked of one model after the other, so that each finds what another one has computed."""

        async def ask(prompt: Ids) -> None:
            for model in [*self.models, *reversed(self.models)]:
                await self.one(check, model, prompt)

        prompts = dict.fromkeys(prompt for prompts in self.long.prompts.values() for prompt in prompts)
        await asyncio.gather(*map(ask, prompts))

    async def evict_and_reload(self, check: str) -> None:
        """All adapters let go, then loaded in another order, with the base asked in between."""
        for digest in self.folders:
            await self.engine.unload(digest)
        await self.together(check, [(None, prompt) for prompt in self.canaries.prompts[None]])
        for digest in reversed(list(self.folders)):
            await self.engine.load(digest, self.folders[digest])
            await self.together(check, [(m, p) for m, p in self.every if m in (None, digest)])
        await self.mixed(check)

    async def new_version(self, check: str) -> None:
        """What a release does to an alias: one adapter takes another one's place, and the same prompts come again."""
        digests = list(self.folders)
        for old, new in zip(digests, [*digests[1:], digests[0]], strict=True):
            if old == new:
                continue
            prompts = list(dict.fromkeys((*self.long.prompts[old], *self.long.prompts[new])))
            for digest in (new, old):
                await self.engine.unload(digest)
            await self.engine.load(old, self.folders[old])
            await self.together(check, [(old, prompt) for prompt in prompts])
            await self.engine.load(new, self.folders[new])
            await self.together(check, [(new, prompt) for prompt in prompts])
            await self.engine.unload(old)
            await self.together(check, [(model, prompt) for prompt in prompts for model in (new, None)])
            await self.engine.load(old, self.folders[old])


async def check_isolation(
    engine: Engine,
    oracle: Oracle,
    folders: Mapping[str, Path],
    prompts: Sequence[Ids],
    *,
    tolerance: float,
    names: Mapping[Digest, str],
    reporter: Reporter,
    long: int = LONG,
    seed: int = 0,
) -> IsolationResult:
    """Ask the engine for the base and all the adapters in every way in which they could be mixed up.

    Args:
        engine: with all of the adapters loaded; they are unloaded and loaded again. Nobody else may use it.
        folders: the adapters, by digest.
        prompts: from which canaries are chosen: of the adapters' own tasks, on which they differ.
        tolerance: nats that a right answer's token may fall short: see :data:`TOLERANCE`.
        names: what people call the models.
        long: tokens of the prompts by which caches of prefixes are tested: see :data:`LONG` and :data:`SHORT`.

    Raises:
        RequestFailedError, EngineStoppedError: the engine does not answer.
    """
    models: list[Digest] = [None, *folders]
    room = min(long, engine.context_length - TOKENS)
    longer = list(dict.fromkeys(_lengthened(prompt, room) for prompt in prompts))
    with reporter.task("Looking for prompts that tell the models apart", 2 * len(models), "models") as task:
        canaries = find_canaries(oracle, models, prompts, tolerance, task.advance)
        lengthy = find_canaries(oracle, models, longer, tolerance, task.advance)
    asking = _Asking(engine, canaries, lengthy, folders, random.Random(seed))
    checks = {
        "each alone": asking.alone,
        "all mixed": asking.mixed,
        "the base in the mix": asking.base_in_the_mix,
        "prefixes warm": asking.warm_prefixes,
        "evicted and reloaded": asking.evict_and_reload,
        "a new version": asking.new_version,
    }
    with reporter.task("Asking the engine", len(checks), "checks") as task:
        for name, ask in checks.items():
            await ask(name)
            task.advance(note=name)
    judged = []
    with reporter.task("Judging its answers", len(checks), "checks") as task:
        for name in checks:
            judged.append(_judged(name, asking.asked, oracle, canaries, tolerance, names))
            task.advance()
    alike = sorted({_sorted(names[one], names[other]) for one, other in canaries.alike & lengthy.alike})
    return IsolationResult(
        engine.name,
        tolerance,
        tuple(names[model] for model in models),
        tuple(judged),
        tuple(alike),
    )


def _lengthened(prompt: Ids, tokens: int) -> Ids:
    """The last so many tokens of the prompt over and over: it ends as the prompt does, where models differ."""
    return (prompt * -(-tokens // len(prompt)))[-tokens:]


def _sorted(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one <= other else (other, one)


def _judged(
    name: str,
    asked: Sequence[_Asked],
    oracle: Oracle,
    canaries: Canaries,
    tolerance: float,
    names: Mapping[Digest, str],
) -> Check:
    mine = [one for one in asked if one.check == name]
    known: dict[tuple[Digest, Ids, Answer], float] = {}
    failures = []
    for one in mine:
        key = (one.model, one.prompt, one.answer)
        if key not in known:
            (known[key],) = oracle.shortfalls(one.model, one.prompt, [one.answer])
        if known[key] > tolerance:
            like = _whose(one, oracle, canaries, tolerance)
            failures.append(Failure(names[one.model], known[key], None if like is None else names[like[0]]))
    return Check(name, len(mine), max(known.values(), default=0.0), tuple(failures))


def _whose(one: _Asked, oracle: Oracle, canaries: Canaries, tolerance: float) -> tuple[Digest] | None:
    """The model whose answer it could be."""
    others = [model for model in canaries.prompts if model != one.model]
    short = {model: oracle.shortfalls(model, one.prompt, [one.answer])[0] for model in others}
    best = min(short, key=lambda model: short[model], default=None)
    return (best,) if short and short[best] <= tolerance else None
