"""LoRA weights for each of the base's layers, read from an adapter's files by peft's rules, without changing the base.

peft's own ``load_adapter`` builds layers into the model. With 32 adapters on a small base that takes seconds, in which
the model cannot answer. tests/adapters/test_lora_weights.py checks the result against what peft builds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.vllm_compat import CONFIG, WEIGHTS
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from tunewright.generation.batched_lora import Lora

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
_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian")
"""Values of init_lora_weights that leave the base unchanged."""
_PREFIX = "base_model.model."


def load_lora_weights(folder: Path, base: nn.Module) -> dict[str, Lora]:
    """Return an adapter's weights by layer name, in float32, as peft holds them, on the base's device.

    Args:
        folder: the adapter's.
        base: a causal language model of transformers, with 16-bit or 4-bit linear layers.

    Raises:
        UserError: the adapter is more than LoRA on linear layers, or its weights do not match its configuration and the
            base.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from tunewright.generation.batched_lora import Lora

    config = _plain_config(folder / CONFIG)
    layers = _targets(config, base, folder / CONFIG)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as weights:
            there, wanted = set(weights.keys()), {_key(name, half) for name in layers for half in "AB"}
            # peft would make up missing weights and drop unexpected ones.
            for names, problem in (
                (wanted - there, "is missing"),
                (there - wanted, "is not part of the configuration"),
            ):
                if names:
                    raise UserError(f"{min(names)} {problem}", where=str(path))
            loras = {}
            for name, layer in layers.items():
                rank, scale = _rank_and_scale(config, name)
                halves = {}
                for half, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                    tensor = weights.get_tensor(_key(name, half))
                    if tuple(tensor.shape) != shape:
                        problem = f"{_key(name, half)} is {list(tensor.shape)}; with this base it must be {list(shape)}"
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
            supported = value in _PLAIN_INITIALIZATIONS
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


def _rank_and_scale(config: LoraConfig, name: str) -> tuple[int, float]:
    """Return a layer's rank and scale, as peft/tuners/lora/model.py and layer.py define them."""
    from peft.utils.other import get_pattern_key

    def own(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        patterns = patterns or {}
        return patterns.get(get_pattern_key(list(patterns), name), default)

    rank = own(config.rank_pattern, config.r)
    alpha = own(config.alpha_pattern, config.lora_alpha)
    return rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _key(layer: str, half: str) -> str:
    return f"{_PREFIX}{layer}.lora_{half}.weight"
