"""Canaries: prompts on which models differ, so that an answer from a wrong one is seen.

Whether the answer of one model could pass for another one's is asked of each pair, and costs no pass over the model for
most: two greedy answers are the same up to where they depart, and there the model's own answer has shown by how much
the other one's token is less likely. So the passes grow with the models, and not with their pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tunewright.generation.requests import Finish

Digest = str | None
"""A model: an adapter's digest, or None for the base."""
Ids = tuple[int, ...]

CANARY = 2.0
"""A canary's wrong answer falls short by so many tolerances at least: what is over one is a failure."""
TOKENS = 8
"""Of an answer: enough to differ, few enough to be asked often."""
PER_MODEL = 2
END = -1
"""Stands for the tokens that end an answer."""
_AT_ONCE = 2


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    ids: Ids
    finish: Finish

    @property
    def chosen(self) -> Ids:
        """Its choices: tokens, and the end if it came to one."""
        return (*self.ids, END) if self.finish == "stop" else self.ids


@dataclass(frozen=True)
class Own:
    """A model's own greedy answer, and what else it could have said."""

    answer: Answer
    behind: tuple[Mapping[int, float], ...]
    """At each of its choices, by how many nats other tokens are less likely: the likeliest ones, and :data:`END`."""

    def shortfall(self, other: Answer) -> float:
        """By how many nats another answer falls short where it departs from this one; it may do so by more later."""
        for mine, theirs, behind in zip(self.answer.chosen, other.chosen, self.behind, strict=False):
            if mine != theirs:
                # What is not among the likeliest is less likely than all of them.
                return behind.get(theirs, max(behind[token] for token in behind if token != END))
        return 0.0


class Oracle(Protocol):
    """The right answers."""

    def own(self, model: Digest, prompts: Sequence[Ids], tokens: int = TOKENS) -> list[Own]:
        """Its greedy answers, of so many tokens at most."""

    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[Answer]) -> list[float]:
        """For each answer, by how many nats its worst token falls short of the model's likeliest one there."""

    def rest(self) -> None:
        """Free the memory that it holds until it is next asked."""


@dataclass(frozen=True)
class Canaries:
    """Prompts by model that tell it from the others, the pairs that none does, and what the oracle answered."""

    prompts: dict[Digest, tuple[Ids, ...]]
    alike: frozenset[tuple[Digest, Digest]]
    said: Mapping[tuple[Digest, Ids], Answer]

    @property
    def every(self) -> list[tuple[Digest, Ids]]:
        """Each model with each of its own."""
        return [(model, prompt) for model, prompts in self.prompts.items() for prompt in prompts]

    @property
    def distinct(self) -> list[Ids]:
        """All of them; models mostly share theirs, as all choose from the first that there are."""
        return list(dict.fromkeys(prompt for _, prompt in self.every))


def find_canaries(
    oracle: Oracle,
    models: Sequence[Digest],
    prompts: Sequence[Ids],
    tolerance: float,
    advance: Callable[[], None] = lambda: None,
) -> Canaries:
    """For each model a few prompts, each of which tells it from some other that those before do not.

    Prompts are tried in their order, a few at a time, and no more of them than it takes; ``advance`` is called after
    each model's first answers.
    """
    said: dict[tuple[Digest, Ids], Own] = {}
    chosen: dict[Digest, list[Ids]] = {model: [] for model in models}
    untold = {model: set(models) - {model} for model in models}
    for place in range(0, len(prompts), _AT_ONCE):
        group = prompts[place : place + _AT_ONCE]
        against = {
            model: [other for other in models if other in (untold[model] or set(models) - {model})]
            for model in models
            if untold[model] or len(chosen[model]) < PER_MODEL
        }
        for model in models:
            if model in against or any(model in others for others in against.values()):
                said |= {(model, p): own for p, own in zip(group, oracle.own(model, group), strict=True)}
            if place == 0:
                advance()
        for model, others in against.items():
            told = _told(oracle, model, group, others, said, CANARY * tolerance)
            for prompt in sorted(group, key=lambda prompt: -len(told[prompt] & untold[model])):
                if told[prompt] & untold[model] or (told[prompt] and len(chosen[model]) < PER_MODEL):
                    chosen[model].append(prompt)
                    untold[model] -= told[prompt]
    return Canaries(
        {model: tuple(found or prompts[:1]) for model, found in chosen.items()},
        frozenset((model, other) for model, others in untold.items() for other in others),
        {asked: own.answer for asked, own in said.items()},
    )


def _told(
    oracle: Oracle,
    model: Digest,
    group: Sequence[Ids],
    others: Collection[Digest],
    said: Mapping[tuple[Digest, Ids], Own],
    enough: float,
) -> dict[Ids, set[Digest]]:
    """By prompt, the models whose answers fall short by enough where this one is asked.

    First by where they depart; of those that no prompt tells so, whole answers.
    """
    told = {
        prompt: {other for other in others if said[model, prompt].shortfall(said[other, prompt].answer) >= enough}
        for prompt in group
    }
    rest = set(others).difference(*told.values())
    for prompt in group:
        answers = {other: said[other, prompt].answer for other in others if other in rest}
        differing = list(dict.fromkeys(a for a in answers.values() if a != said[model, prompt].answer))
        if differing:
            short = dict(zip(differing, oracle.shortfalls(model, prompt, differing), strict=True))
            told[prompt] |= {other for other, answer in answers.items() if short.get(answer, 0.0) >= enough}
    return told
