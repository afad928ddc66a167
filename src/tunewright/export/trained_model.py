"""The trained model, which every artifact is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from tunewright.adapters.registry import Adapter, trained_quantization
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_text
from tunewright.core.progress import Reporter
from tunewright.export.artifact import ExportSource
from tunewright.export.weights import Weights, put_into, trained_dtype
from tunewright.gate.answers import Context, TopTokens, answer, distance, distributions
from tunewright.gate.prompts import Probe, contexts, draw_probe
from tunewright.gate.results import Figures
from tunewright.generation.requests import Completion
from tunewright.metrics import Scorer, open_scorers, score_all
from tunewright.models.bases import Base
from tunewright.models.families import read_shape
from tunewright.models.loading import load_model, with_adapters
from tunewright.models.memory_plan import available_memory, gigabytes

_ROOM = 1.3
"""Memory of a model during the comparison, in bytes of its weights: activations, adapter, one more layer.

One model is in memory at a time: the trained one, each merge method and the merged folder follow one another.
"""


@dataclass(frozen=True)
class ArtifactOutputs:
    """An artifact's outputs for the probe's prompts."""

    completions: Sequence[Completion]
    """Its greedy answers."""
    distributions: Tensor | Sequence[TopTokens]
    """Next-token distributions at each place of the *trained model's* answers."""
    rendered: int
    """Prompts that it renders to the ids of training."""
    functions_rendered: int
    """The same of the conversations with functions."""
    arithmetic: str


@dataclass(frozen=True)
class TrainedModel:
    """The base as held in training, with the adapter, and its outputs for the probe's prompts."""

    adapter: Adapter
    base: Base
    chat: ChatFormat
    system_prompt: str | None
    """The one that all its training rows have."""
    probe: Probe
    scorer: Scorer
    arithmetic: str
    """float32, or bfloat16 if the weights would not fit otherwise."""
    completions: Sequence[Completion]
    log_probs: Tensor
    """[places, vocabulary]"""
    base_log_probs: Tensor
    """The base's, with the adapter off."""

    @property
    def contexts(self) -> list[Context]:
        """The prompts with its answers, and the places in them."""
        return contexts(self.probe, self.completions)

    def score(self, completions: Sequence[Completion]) -> float:
        """Score answers to the probe's prompts by the config's metric."""
        examples = [member.example for member in self.probe.members]
        answered = zip(completions, examples, strict=True)
        texts = [answer_text(self.chat, completion, example.prompt) for completion, example in answered]
        return score_all(self.scorer, texts, examples).total()

    def figures(self, seen: ArtifactOutputs) -> Figures:
        """Compare an artifact's outputs with the trained model's."""
        found = distance(self.log_probs, seen.distributions)
        kl, effect = float(found.kl.mean()), float(distance(self.log_probs, self.base_log_probs).kl.mean())
        same = sum(ours.ids == theirs.ids for ours, theirs in zip(self.completions, seen.completions, strict=True))
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
            greedy=same / len(self.completions),
            metric=self.scorer.name,
            score=self.score(seen.completions),
            trained_score=self.score(self.completions),
            rendered=seen.rendered,
            functions=len(self.probe.functions),
            functions_rendered=seen.functions_rendered,
        )


def load_trained_model(base: Base, adapter: Adapter, arithmetic: str) -> Any:
    """Load the base with the weights that training used, computing in ``arithmetic``, and the adapter on it."""
    model = load_model(base, arithmetic, "none")
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, trained_dtype(adapter))).to(weight.dtype)
    if trained_quantization([adapter]) == "nf4":
        held = Weights(base, trained_dtype(adapter), {}, dequantized=True)
        put_into(model, held, held.held)
    return with_adapters(model, {adapter.name: adapter.folder})


def measure_trained(source: ExportSource) -> TrainedModel:
    """Have the trained model answer dev prompts of the version that it was trained on, with the adapter on and off."""
    project, adapter, system = source.project, source.adapter, source.system_prompt.text
    config, base, chat, reporter = project.folder.config, project.base, project.chat, project.reporter
    probe = draw_probe(project, source.version, system)
    scorer = open_scorers(config.evaluate, project.folder.root)[0]
    arithmetic = _arithmetic(base, reporter)
    reporter.say(f"Loading {base.spec} as {adapter.name} was trained on it, in {arithmetic}")
    model = load_trained_model(base, adapter, arithmetic)
    with reporter.task("the trained model's answers", len(probe.prompts), "prompts") as task:
        completions = answer(model, probe, chat, adapter.name, task.advance)
    asked = contexts(probe, completions)
    model.set_adapter(adapter.name)
    with_adapter = distributions(model, asked)
    with model.disable_adapter():
        without = distributions(model, asked)
    return TrainedModel(adapter, base, chat, system, probe, scorer, arithmetic, completions, with_adapter, without)


def _arithmetic(base: Base, reporter: Reporter) -> str:
    """Return float32 if the base fits so: arithmetic in bfloat16 moves logits by more than a merge does."""
    # Otherwise memory that an earlier model left in torch's cache counts as used.
    clear_device_cache(garbage_collection=True)
    needed, memory = 4 * read_shape(base.folder / "config.json").parameters, available_memory(None)
    if needed * _ROOM <= memory.bytes:
        return "float32"
    reporter.warn(
        f"{base.spec} in float32 needs {gigabytes(int(needed * _ROOM))}, and there are {memory.source}. Models are "
        "compared in bfloat16, whose rounding counts as a difference."
    )
    return "bfloat16"
