"""A base and an adapter as one model, in the layout that transformers and vLLM load."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tunewright.adapters.fit import trained_quantize
from tunewright.chat import ChatFormat
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.export.observing import answer, distance, distributions
from tunewright.export.record import WayMeasured
from tunewright.export.templates import exported_template, rendered_alike
from tunewright.export.trained import Seen, Trained
from tunewright.export.weights import Way, Weights, put_into, read_changes, trained_dtype
from tunewright.generation.decoding import Completion
from tunewright.models.bases import INDEX, Base
from tunewright.models.loading import device, load_model
from tunewright.models.quiet import quiet_transformers

_GENERATION = "generation_config.json"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
"""Of a base that reads images: without them neither transformers nor vLLM loads the whole model."""


def choose_way(trained: Trained, reporter: Reporter) -> tuple[Weights, Way, tuple[WayMeasured, ...]]:
    """Return the merged weights, by the way that comes closest to the trained model where there are two.

    Returns:
        The weights, the way, and the ways that were measured.
    """
    changes = read_changes(trained.adapter.folder)
    dtype = trained_dtype(trained.adapter)
    if trained_quantize([trained.adapter]) == "none":
        return Weights(trained.base, dtype, changes), "original", ()
    ways: dict[Way, Weights] = {
        "original": Weights(trained.base, dtype, changes),
        "dequantized": Weights(trained.base, dtype, changes, dequantized=True),
    }
    measured = []
    with reporter.task("ways to merge", len(ways), "ways") as task:
        for way, weights in ways.items():
            seen = _distributions(trained, weights)
            measured.append(WayMeasured(way=way, kl=float(distance(trained.log_probs, seen).kl.mean())))
            task.advance(note=way)
    best = min(measured, key=lambda found: found.kl)
    other = next(found for found in measured if found is not best)
    reporter.say(
        f"Merged on the {best.way} base, which is closer to the trained model: KL {best.kl:.2g} nats, and "
        f"{other.kl:.2g} on the {other.way} one."
    )
    return ways[best.way], best.way, tuple(measured)


def _distributions(trained: Trained, weights: Weights) -> Tensor:
    """Return what a model with these weights predicts; it is freed when this returns, before another is loaded."""
    model = load_model(trained.base, trained.arithmetic, "none")
    put_into(model, weights, weights.stored)
    return distributions(model, trained.contexts)


def write_merged(
    folder: Path, weights: Weights, base: Base, chat: ChatFormat, system_prompt: str | None, reporter: Reporter
) -> None:
    """Write a model into ``folder``: weights in the base's own files and types, configuration, tokenizer, template.

    The template puts ``system_prompt`` before conversations without a system message.
    """
    from safetensors.torch import save_file

    with reporter.task("merging", len(weights.base), "tensors") as task:
        for file, names in weights.base.files.items():
            tensors = {}
            for name in names:
                tensors[name] = weights.stored(name).contiguous()
                task.advance()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors writes for the owner alone
    for name in ("config.json", INDEX, *_PROCESSOR):
        if (base.folder / name).exists():
            shutil.copyfile(base.folder / name, folder / name)
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


def see_merged(folder: Path, trained: Trained, reporter: Reporter) -> Seen:
    """Return what the model in ``folder`` gives, loaded from there by transformers with nothing of ours."""
    import transformers
    from transformers import AutoTokenizer

    with quiet_transformers():
        # By its own class, vision tower included: the folder must load as the original base does.
        model = (
            getattr(transformers, trained.base.architecture)
            .from_pretrained(
                folder, dtype=trained.arithmetic, device_map=device(), local_files_only=True, use_safetensors=True
            )
            .eval()
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    probe, chat = trained.probe, trained.chat
    with reporter.task("the merged model's answers", len(probe.prompts), "prompts") as task:
        completions = answer(model, probe, chat, None, task.advance)
    return Seen(
        answers=[completion.ids for completion in completions],
        texts=_texts(chat, completions),
        distributions=distributions(model, trained.contexts),
        rendered=rendered_alike(
            tokenizer, [m.example.prompt for m in probe.members], probe.prompts, trained.system_prompt
        ),
        arithmetic=trained.arithmetic,
    )


def _texts(chat: ChatFormat, completions: Sequence[Completion]) -> list[str]:
    from tunewright.chat.answers import answer_text

    return [answer_text(chat, completion) for completion in completions]
