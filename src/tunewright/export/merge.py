"""A base and an adapter merged into one model, in the layout that transformers and vLLM load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import trained_quantization
from tunewright.chat import ChatFormat
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.export.artifact import BuiltArtifact, ExportSource, MergeMeasurement
from tunewright.export.templates import count_equal_renderings, exported_template
from tunewright.export.trained_model import ArtifactOutputs, TrainedModel, measure_trained
from tunewright.export.weights import MergeMethod, Weights, put_into, read_deltas, trained_dtype
from tunewright.gate.answers import answer, distance, distributions
from tunewright.models import quiet_transformers
from tunewright.models.bases import INDEX, Base
from tunewright.models.loading import device, load_model

_GENERATION = "generation_config.json"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
"""Files of a base that reads images: without them neither transformers nor vLLM loads the full model."""


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
            (folder / file).chmod(0o644)  # safetensors makes files readable by the owner alone
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
                folder, dtype=trained.arithmetic, device_map=device(), local_files_only=True, use_safetensors=True
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
