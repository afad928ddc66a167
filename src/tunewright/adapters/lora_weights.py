"""LoRA weights and their configuration: what vLLM loads or refuses, finite numbers, and loading without peft's layers.

The rules follow vLLM 0.32: ``PEFTHelper`` in vllm/lora/peft_helper.py (features), ``MaxLoRARanks`` in
vllm/config/lora.py (ranks) and ``parse_fine_tuned_lora_name`` in vllm/lora/utils.py (names of tensors). Earlier
releases check fewer features: they load an unconverted PiSSA adapter silently and answer wrongly with it.

Loading follows peft's rules without changing the base. peft's own ``load_adapter`` builds layers into the model: with
32 adapters on a small base that takes seconds, in which the model cannot answer. tests/adapters/test_lora_weights.py
checks the result against what peft builds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.config import TrainConfig
from tunewright.config.train import EXPERTS
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from tunewright.generation.batched_lora import Lora

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

PREFIX = "base_model.model."
"""The prefix of layer names in peft's tensor names."""

EXPERT_PARAMETERS = ("experts.down_proj", "experts.gate_up_proj")
"""peft's ``target_parameters`` of an adapter on experts."""

MAX_RANK = 512
"""The largest ``--max-lora-rank``; its default is 16, so a higher rank requires the option."""

# peft's initializations that leave the base unchanged. All others change it, which vLLM does not reproduce.
_PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

_REFUSED = {
    "use_dora": "DoRA",
    "target_parameters": "LoRA on the experts of most architectures",
    "lora_bias": "biases in addition to the LoRA weights (lora_bias)",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}


def require_servable(settings: TrainConfig) -> None:
    """Refuse, before anything is loaded, a config whose adapter vLLM would not load.

    Nothing is refused if ``train.require_vllm_compatible`` is false.
    """
    if not settings.require_vllm_compatible:
        return
    fixes = {
        "use_dora": ("use_dora", "Set it to false"),
        "r": ("lora_r", f"Set it to {MAX_RANK} or less"),
        "target_parameters": ("target_modules", f"Remove {EXPERTS}"),
    }
    for name, why in vllm_refusals(planned_config(settings)).items():
        key, instead = fixes[name]
        raise UserError(
            f"vLLM does not load {why}",
            where=f"train.{key}",
            fix=f"{instead}. Or set train.require_vllm_compatible to false for an adapter that only tunewright and "
            "peft load.",
        )


def planned_config(settings: TrainConfig) -> dict[str, Any]:
    """Return the entries of the ``adapter_config.json`` to come that vLLM may refuse."""
    return {
        "use_dora": settings.use_dora,
        "r": settings.lora_r,
        "target_parameters": EXPERTS in settings.target_modules,
    }


def vllm_refusals(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of an ``adapter_config.json`` that vLLM refuses, with reasons by key; empty if it loads."""
    refused = {key: what for key, what in _REFUSED.items() if config.get(key)}
    ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
    if max(ranks) > MAX_RANK:
        refused["r"] = f"a rank over {MAX_RANK} (it is {max(ranks)})"
    if config.get("bias", "none") != "none":
        refused["bias"] = f"trained biases (bias: {config['bias']})"
    if config.get("modules_to_save"):
        refused["modules_to_save"] = (
            f"complete layers besides the LoRA weights ({', '.join(config['modules_to_save'])})"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_INITIALIZATIONS:
        refused["init_lora_weights"] = f"an unconverted adapter whose initialization changes the base ({start})"
    return refused


def weight_faults(path: Path) -> list[str]:
    """Return a sentence for each tensor with weights that are not finite; empty if all are."""
    import ml_dtypes  # noqa: F401 - numpy knows bfloat16 from here on
    import numpy as np
    from safetensors import SafetensorError, safe_open

    faults = []
    try:
        with safe_open(path, framework="numpy") as weights:
            for name in sorted(weights.keys()):
                tensor = weights.get_tensor(name)
                bad = tensor.size - int(np.isfinite(tensor).sum())
                if bad:
                    faults.append(f"{bad:,} of {tensor.size:,} weights of {name} are not finite")
    except SafetensorError as error:
        faults.append(f"{path.name} cannot be read: {error}")
    return faults


def check_adapter(folder: Path, *, servable: bool) -> None:
    """Check before a trained adapter is stored that its weights are finite, and (``servable``) that vLLM loads it."""
    from safetensors import safe_open

    path = folder / WEIGHTS
    for fault in weight_faults(path):
        raise UserError(
            f"{fault}: the adapter is not kept",
            where=str(path),
            fix="Lower train.learning_rate, or train in float32 (train.dtype).",
        )
    if not servable:
        return
    refused = vllm_refusals(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    with safe_open(path, framework="numpy") as weights:
        names = sorted(weights.keys())
    others = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others and not refused:
        refused[others[0]] = f"{others[0]}, which is not a LoRA weight"
    for key, why in refused.items():
        raise UserError(
            f"vLLM does not load {why}: the adapter is not kept",
            where=f"{folder / CONFIG}, {key}",
            fix="To keep such adapters, set train.require_vllm_compatible: false.",
        )


def require_batchable(folder: Path) -> None:
    """Refuse an adapter that cannot share a batch with others, as served adapters must."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = {"use_dora": "DoRA", "alora_invocation_tokens": "Activated LoRA", "target_parameters": "LoRA on experts"}
    kinds = [kind for key, kind in known.items() if config.get(key)]
    if kinds:
        raise UserError(
            f"{kinds[0]} cannot share a batch with other adapters, so it cannot be served",
            where=folder.name,
            fix="Measure it with `tunewright evaluate`. To serve it, merge it with `tunewright export merge`.",
        )


_APPLIED = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
_NO_EFFECT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
_NO_EFFECT |= {"task_type"}
"""Keys without effect on a trained adapter's answers."""


def load_lora_weights(folder: Path, base: nn.Module) -> dict[str, Lora]:
    """Return an adapter's weights by layer name, in float32, as peft holds them, on the base's device.

    ``base`` is a causal language model of transformers, with 16-bit or 4-bit linear layers.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from tunewright.generation.batched_lora import Lora

    config = _plain_config(folder / CONFIG)
    layers = _targets(config, base, folder / CONFIG)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as weights:
            there, wanted = set(weights.keys()), {tensor_name(name, half) for name in layers for half in "AB"}
            # peft would make up missing weights and drop unexpected ones.
            for names, problem in (
                (wanted - there, "is missing"),
                (there - wanted, "is not part of the configuration"),
            ):
                if names:
                    raise UserError(f"{min(names)} {problem}", where=str(path))
            loras, settings = {}, config.to_dict()
            for name, layer in layers.items():
                rank, scale = rank_and_scale(settings, name)
                halves = {}
                for half, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                    key = tensor_name(name, half)
                    tensor = weights.get_tensor(key)
                    if tuple(tensor.shape) != shape:
                        problem = f"{key} is {list(tensor.shape)}; with this base it must be {list(shape)}"
                        raise UserError(problem, where=str(path))
                    # A copy, because the tensor maps the file, which other processes can change.
                    halves[half] = tensor.to(layer.weight.device, torch.float32, copy=True)
                loras[name] = Lora(halves["A"].t(), halves["B"].t(), scale)
    except SafetensorError as error:
        raise UserError(f"The weights cannot be read: {error}", where=str(path)) from None
    return loras


def _plain_config(path: Path) -> LoraConfig:
    """Return the configuration if every key with an effect is supported here."""
    from peft import LoraConfig

    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    plain = LoraConfig().to_dict()
    for key, value in said.items():
        if key == "init_lora_weights":
            supported = value in (None, True, False, "gaussian")  # other initializations change the base
        else:
            supported = key in _APPLIED | _NO_EFFECT or (value or None) == (plain.get(key) or None)
        if not supported:
            raise UserError(
                f"Not plain LoRA ({key}: {json.dumps(value)}), so the adapter cannot share a batch with others",
                where=str(path),
                fix="Measure it with `tunewright evaluate`. To serve it, train plain LoRA.",
            )
    try:
        return LoraConfig(**{key: value for key, value in said.items() if key in _APPLIED})
    except ValueError as error:
        raise UserError(f"peft rejects this configuration: {error}", where=str(path)) from None


def _targets(config: LoraConfig, base: nn.Module, path: Path) -> dict[str, Any]:
    """Return the adapted linear layers, by name."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn

    layers = {name: layer for name, layer in base.named_modules() if check_target_module_exists(config, name)}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise UserError(f"{name} is not a linear layer", where=f"{path}, target_modules")
    return layers


def rank_and_scale(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """Return a layer's rank, and the factor of BA, as peft/tuners/lora/model.py and layer.py define them."""
    from peft.utils.other import get_pattern_key

    def own(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        patterns = patterns or {}
        return patterns.get(get_pattern_key(list(patterns), layer), default)

    rank = own(config.get("rank_pattern"), config["r"])
    alpha = own(config.get("alpha_pattern"), config["lora_alpha"])
    # rsLoRA (Kalajdzievski 2023): with the square root, higher ranks keep their share in the sum.
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def tensor_name(layer: str, half: str) -> str:
    """Return the name of a layer's matrix A or B in the file."""
    return f"{PREFIX}{layer}.lora_{half}.weight"
