"""The trained model, which every artifact is compared with; and base and adapter merged into one
model, in the layout that transformers and vLLM load.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from tunewright.adapters.registry import Adapter, trained_quantization
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_text
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.export.artifact import BuiltArtifact, ExportSource, MergeMeasurement
from tunewright.export.templates import count_equal_renderings, exported_template
from tunewright.export.weights import MergeMethod, Weights, put_into, read_deltas, trained_dtype
from tunewright.gate.answers import Context, TopTokens, answer, distance, distributions
from tunewright.gate.prompts import Probe, contexts, draw_probe
from tunewright.gate.results import Figures
from tunewright.generation.requests import Completion
from tunewright.metrics import Scorer, open_scorers, score_all
from tunewright.models import quiet_transformers
from tunewright.models.bases import INDEX, Base
from tunewright.models.families import read_shape
from tunewright.models.loading import dequantization, device, load_model, with_adapters
from tunewright.models.memory_plan import available_memory, gigabytes

_GENERATION = "generation_config.json"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
"""Files of a base that reads images: without them neither transformers nor vLLM loads the full model."""

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
    """Conversations with functions that it renders to the ids of training."""
    arithmetic: str


@dataclass(frozen=True)
class TrainedModel:
    """The base as held in training, with the adapter, and its outputs for the probe's prompts."""

    adapter: Adapter
    base: Base
    chat: ChatFormat
    system_prompt: str | None
    """The system prompt that all its training rows have."""
    probe: Probe
    scorer: Scorer
    arithmetic: str
    """float32, or bfloat16 if the weights would not fit otherwise."""
    completions: Sequence[Completion]
    log_probs: Tensor
    """[places, vocabulary]"""
    base_log_probs: Tensor
    """The base's log-probabilities, with the adapter off."""

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
    """Load the base with the weights that training used, in ``arithmetic``, and the adapter on it."""
    model = load_model(base, arithmetic, "none")
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, trained_dtype(adapter))).to(weight.dtype)
    if trained_quantization([adapter]) == "nf4":
        held = Weights(base, trained_dtype(adapter), {}, dequantized=True)
        put_into(model, held, held.held)
    return with_adapters(model, {adapter.name: adapter.folder})


def measure_trained(source: ExportSource) -> TrainedModel:
    """Have the trained model answer dev prompts of its dataset, with the adapter on and off."""
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
    """Return float32 if the base fits so: bfloat16 moves logits by more than a merge does."""
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


def build_merged(folder: Path, source: ExportSource) -> BuiltArtifact:
    """Write base and adapter as one model, and compare it with the trained model."""
    project, trained = source.project, measure_trained(source)
    weights, way, ways = choose_merge_method(trained, project.reporter)
    write_merged(folder, weights, project.base, project.chat, trained.system_prompt, project.reporter)
    figures = trained.figures(
        observe_folder(load_folder(folder, trained), folder, trained, project.reporter, "the merged model's answers")
    )
    return BuiltArtifact(figures, "16-bit", way, ways, source.notes())


def choose_merge_method(
    trained: TrainedModel, reporter: Reporter
) -> tuple[Weights, MergeMethod, tuple[MergeMeasurement, ...]]:
    """Return the merged weights by the method closest to the trained model, if there are two."""
    changes = read_deltas(trained.adapter.folder)
    dtype = trained_dtype(trained.adapter)
    if trained_quantization([trained.adapter]) == "none":
        return Weights(trained.base, dtype, changes), "original", ()
    ways: dict[MergeMethod, Weights] = {
        "original": Weights(trained.base, dtype, changes),
        "dequantized": Weights(trained.base, dtype, changes, dequantized=True),
    }
    measured = []
    with reporter.task("ways to merge", len(ways), "ways") as task:
        for way, weights in ways.items():
            model = load_model(trained.base, trained.arithmetic, "none")
            put_into(model, weights, weights.stored)
            seen = distributions(model, trained.contexts)
            del model  # before another is loaded
            measured.append(MergeMeasurement(way=way, kl=float(distance(trained.log_probs, seen).kl.mean())))
            task.advance(note=way)
    best = min(measured, key=lambda found: found.kl)
    other = next(found for found in measured if found is not best)
    reporter.say(
        f"Merged into the {best.way} base, which is closer to the trained model: KL {best.kl:.2g} nats, against "
        f"{other.kl:.2g} for the {other.way} one."
    )
    return ways[best.way], best.way, tuple(measured)


def write_merged(
    folder: Path, weights: Weights, base: Base, chat: ChatFormat, system_prompt: str | None, reporter: Reporter
) -> None:
    """Write a model into ``folder``: weights in the base's own files and dtypes, configuration, tokenizer, template.

    The template adds ``system_prompt`` to conversations without a system message.
    """
    from safetensors.torch import save_file

    with reporter.task("merging", len(weights.base), "tensors") as task:
        for file, names in weights.base.files.items():
            tensors = {}
            for name in names:
                tensors[name] = weights.stored(name).contiguous()
                task.advance()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors makes files readable only by the owner
    for name in ("config.json", INDEX, *_PROCESSOR):
        if (base.folder / name).exists():
            shutil.copyfile(base.folder / name, folder / name)
    save_settings(folder, base, chat, system_prompt)


def save_settings(folder: Path, base: Base, chat: ChatFormat, system_prompt: str | None) -> None:
    """Write the generation settings, and the tokenizer with the exported template."""
    write_json(folder / _GENERATION, generation_settings(base, chat))
    save_tokenizer(folder, chat, system_prompt)


def generation_settings(base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Return the base's generation settings, with all tokens that end an answer."""
    path = base.folder / _GENERATION
    own: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stops = sorted(chat.stop_ids)
    ids = {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": chat.tokenizer.pad_token_id}
    return {**own, **ids} | ({"bos_token_id": chat.bos_id} if chat.bos_id >= 0 else {})


def save_tokenizer(folder: Path, chat: ChatFormat, system_prompt: str | None) -> None:
    """Write the tokenizer with the exported template."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = exported_template(chat, system_prompt)
    with quiet_transformers():
        tokenizer.save_pretrained(folder)


def load_folder(folder: Path, trained: TrainedModel) -> Any:
    """Load the model in ``folder`` with the base's own class, including the vision tower, as the original base."""
    import transformers

    with quiet_transformers():
        return (
            getattr(transformers, trained.base.architecture)
            .from_pretrained(
                folder,
                dtype=trained.arithmetic,
                quantization_config=dequantization(folder),
                device_map=device(),
                local_files_only=True,
                use_safetensors=True,
            )
            .eval()
        )


def observe_folder(model: Any, folder: Path, trained: TrainedModel, reporter: Reporter, what: str) -> ArtifactOutputs:
    """Return the outputs of a loaded model with the tokenizer and template in its folder."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    probe, chat = trained.probe, trained.chat
    with reporter.task(what, len(probe.prompts), "prompts") as task:
        completions = answer(model, probe, chat, None, task.advance)
    return ArtifactOutputs(
        completions=completions,
        distributions=distributions(model, trained.contexts),
        rendered=count_equal_renderings(
            tokenizer, chat.template, [m.example.prompt for m in probe.members], probe.prompts, trained.system_prompt
        ),
        functions_rendered=count_equal_renderings(
            tokenizer,
            chat.template,
            probe.functions,
            [chat.prompt(asked) for asked in probe.functions],
            trained.system_prompt,
        ),
        arithmetic=trained.arithmetic,
    )
