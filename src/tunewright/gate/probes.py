"""Probes: prompts on which models differ, so that an answer of a wrong model is detected.

Each pair of models must be distinguished, but most pairs cost no pass over a model. Two greedy answers agree up to the
token at which they diverge. There the model's own answer has already shown by how much the other's token is less
likely. So the number of passes grows with the models, and not with their pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tunewright.gate.answers import Answer, Digest, GreedyAnswer, Ids

PROBE_MARGIN = 2.0
"""Minimum shortfall of a wrong answer to a probe, in tolerances. More than one tolerance is a failure."""
TOKENS = 8
"""Tokens of an answer: enough for models to differ, few enough for many requests."""
PER_MODEL = 2
"""Minimum number of probes of a model."""
_GROUP = 2
"""Prompts that are tried at once."""


class Reference(Protocol):
    """The source of correct answers."""

    def greedy(self, model: Digest, prompts: Sequence[Ids], tokens: int = TOKENS) -> list[GreedyAnswer]:
        """Return a model's greedy answers, each of at most this many tokens."""

    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[Answer]) -> list[float]:
        """Return for each answer by how many nats its worst token is less likely than the model's best one there."""

    def unload(self) -> None:
        """Free the model's memory until the next call."""


@dataclass(frozen=True)
class Probes:
    """Probes by model, the pairs of models that no probe distinguishes, and the reference's answers."""

    prompts: dict[Digest, tuple[Ids, ...]]
    alike: frozenset[tuple[Digest, Digest]]
    answers: Mapping[tuple[Digest, Ids], Answer]

    @property
    def every(self) -> list[tuple[Digest, Ids]]:
        """Pairs of a model and each of its probes."""
        return [(model, prompt) for model, prompts in self.prompts.items() for prompt in prompts]

    @property
    def distinct(self) -> list[Ids]:
        """All prompts; models share most of them, since all models try the same ones first."""
        return list(dict.fromkeys(prompt for _, prompt in self.every))


def find_probes(
    reference: Reference,
    models: Sequence[Digest],
    prompts: Sequence[Ids],
    tolerance: float,
    advance: Callable[[], None] = lambda: None,
) -> Probes:
    """Choose a few prompts for each model, each of which distinguishes it from a model that the ones before do not.

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
