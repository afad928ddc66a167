"""The trained model: what every artefact is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from tunewright.adapters.fit import trained_quantize
from tunewright.adapters.registry import Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_text
from tunewright.core.progress import Reporter
from tunewright.export.observing import Context, Listed, answer, distance, distributions
from tunewright.export.parity import Figures
from tunewright.export.probe import Probe, contexts
from tunewright.export.weights import Weights, put_into, trained_dtype
from tunewright.generation.decoding import Completion
from tunewright.metrics import Scorer, score_all
from tunewright.models.bases import Base
from tunewright.models.loading import load_model, with_adapters
from tunewright.models.memory.plan import memory_at_hand
from tunewright.models.memory.shape import read_shape
from tunewright.models.memory.sizes import gigabytes

_ROOM = 1.3
"""Memory that a model needs while it is compared, in bytes of its weights: activations, adapter, one more layer.

One model at a time is in memory: the trained one, each way to merge and the merged folder follow one another."""


@dataclass(frozen=True)
class Seen:
    """What an artefact gave for the probe's prompts."""

    answers: Sequence[tuple[int, ...]]
    """Its greedy answers, without the end token."""
    texts: Sequence[str]
    distributions: Tensor | Sequence[Listed]
    """Of the next token at each place of the *trained model's* answers."""
    rendered: int
    """Prompts that it renders to the ids of training."""
    arithmetic: str


@dataclass(frozen=True)
class Trained:
    """The base as it was held in training, with the adapter, and what it gives for the probe's prompts."""

    adapter: Adapter
    base: Base
    chat: ChatFormat
    system_prompt: str | None
    """The one that all its training rows have."""
    probe: Probe
    scorer: Scorer
    arithmetic: str
    """float32, or bfloat16 where the weights would not fit otherwise."""
    completions: Sequence[Completion]
    log_probs: Tensor
    """[places, vocabulary]"""
    base_log_probs: Tensor
    """The base's, with the adapter off."""

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """Its greedy answers."""
        return [completion.ids for completion in self.completions]

    @property
    def contexts(self) -> list[Context]:
        """The prompts with its answers, and the places in them."""
        ended = [completion.finish == "stop" and completion.before_stop is None for completion in self.completions]
        return contexts(self.probe, self.answers, ended)

    @cached_property
    def texts(self) -> list[str]:
        """What its answers say."""
        return [answer_text(self.chat, completion) for completion in self.completions]

    def score(self, texts: Sequence[str]) -> float:
        """Return what these answers are worth by the config's metric."""
        return score_all(self.scorer, texts, [member.example for member in self.probe.members]).total()

    def figures(self, seen: Seen) -> Figures:
        """Return the artefact beside the trained model."""
        found = distance(self.log_probs, seen.distributions)
        kl, effect = float(found.kl.mean()), float(distance(self.log_probs, self.base_log_probs).kl.mean())
        same = sum(ours == theirs for ours, theirs in zip(self.answers, seen.answers, strict=True))
        return Figures(
            prompts=len(self.probe.prompts),
            places=len(self.log_probs),
            arithmetic=seen.arithmetic,
            max_logit=float(found.max_logit.max()),
            kl=kl,
            effect=effect,
            lost=kl / effect if effect else 1.0,
            from_base=float(distance(self.base_log_probs, seen.distributions).kl.mean()),
            top1=float(found.same_top.double().mean()),
            greedy=same / len(self.answers),
            metric=self.scorer.name,
            score=self.score(seen.texts),
            trained_score=self.score(self.texts),
            rendered=seen.rendered,
        )


def trained_model(base: Base, adapter: Adapter, arithmetic: str) -> Any:
    """Return the base with the very weights that training held, computing in ``arithmetic``, and the adapter on it."""
    model = load_model(base, arithmetic, "none")
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, trained_dtype(adapter))).to(weight.dtype)
    if trained_quantize([adapter]) == "nf4":
        held = Weights(base, trained_dtype(adapter), {}, dequantized=True)
        put_into(model, held, held.held)
    return with_adapters(model, {adapter.name: adapter.folder})


def measure_trained(
    base: Base,
    adapter: Adapter,
    chat: ChatFormat,
    system_prompt: str | None,
    probe: Probe,
    scorer: Scorer,
    reporter: Reporter,
) -> Trained:
    """Have the trained model answer the probe, with the adapter on and off."""
    arithmetic = _arithmetic(base, reporter)
    reporter.say(f"Loading {base.spec} as {adapter.name} was trained on it, in {arithmetic}")
    model = trained_model(base, adapter, arithmetic)
    with reporter.task("the trained model's answers", len(probe.prompts), "prompts") as task:
        completions = answer(model, probe, chat, adapter.name, task.advance)
    ended = [completion.finish == "stop" and completion.before_stop is None for completion in completions]
    asked = contexts(probe, [completion.ids for completion in completions], ended)
    model.set_adapter(adapter.name)
    with_adapter = distributions(model, asked)
    with model.disable_adapter():
        without = distributions(model, asked)
    return Trained(adapter, base, chat, system_prompt, probe, scorer, arithmetic, completions, with_adapter, without)


def _arithmetic(base: Base, reporter: Reporter) -> str:
    """float32 where the base fits so: arithmetic in bfloat16 moves logits by more than a merge does."""
    # What a model before this one has left in torch's cache counts as used otherwise.
    clear_device_cache(garbage_collection=True)
    needed, memory = 4 * read_shape(base.folder / "config.json").parameters, memory_at_hand(None)
    if needed * _ROOM <= memory.bytes:
        return "float32"
    reporter.warn(
        f"{base.spec} in float32 needs {gigabytes(int(needed * _ROOM))}, and there are {memory.source}: models are "
        "compared in bfloat16, whose own rounding counts as difference."
    )
    return "bfloat16"
