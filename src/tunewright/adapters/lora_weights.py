"""An adapter's matrices for each of the base's layers, read from its files by peft's rules, without touching the base.

peft's own ``load_adapter`` builds layers into the model; beside 32 adapters of a small base that takes seconds, in
which the model can answer nobody. tests/adapters/test_lora_weights.py holds what is read here to what peft builds.
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

_HEEDED = {
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
_ABOUT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
_ABOUT |= {"task_type"}
"""What decides no answer of a trained adapter."""
_STARTS = (None, True, False, "gaussian")
"""That leave the base as it is."""
_PREFIX = "base_model.model."


def read_matrices(folder: Path, base: nn.Module) -> dict[str, Lora]:
    """What an adapter brings for the base's layers, by their names: in float32, as peft holds it, on the base's device.

    Args:
        folder: the adapter's.
        base: a causal language model of transformers, whole or with its linear layers in 4 bits.

    Raises:
        UserError: it is more than LoRA on linear layers, or its weights are not those that its configuration and the
            base call for.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from tunewright.generation.batched_lora import Lora

    config = _plain_config(folder / CONFIG)
    layers = _targets(config, base, folder / CONFIG)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as weights:
            _check_names(set(weights.keys()), layers, path)
            loras = {}
            for name, layer in layers.items():
                rank, scale = _rank_and_scale(config, name)
                halves = {}
                for half, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                    tensor = weights.get_tensor(_key(name, half))
                    if tuple(tensor.shape) != shape:
                        told = f"{_key(name, half)} is {list(tensor.shape)}, and with this base it is {list(shape)}"
                        raise UserError(told, where=str(path))
                    # A copy: what is read is the file itself, which others can change.
                    halves[half] = tensor.to(layer.weight.device, torch.float32, copy=True)
                loras[name] = Lora(halves["A"].t(), halves["B"].t(), scale)
    except SafetensorError as error:
        raise UserError(f"its weights cannot be read: {error}", where=str(path)) from None
    return loras


def _plain_config(path: Path) -> LoraConfig:
    """Return the configuration, if whatever it says is heeded here."""
    from peft import LoraConfig

    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    plain = LoraConfig().to_dict()
    for key, value in said.items():
        if key == "init_lora_weights":
            does_nothing = value in _STARTS
        else:
            does_nothing = key in _HEEDED | _ABOUT or (value or None) == (plain.get(key) or None)
        if not does_nothing:
            raise UserError(
                f"it is not plain LoRA ({key}: {json.dumps(value)}), so it cannot answer in one batch with others",
                where=str(path),
                fix="`tunewright evaluate` measures it. To serve it, train plain LoRA.",
            )
    try:
        return LoraConfig(**{key: value for key, value in said.items() if key in _HEEDED})
    except ValueError as error:
        raise UserError(f"peft does not take this configuration: {error}", where=str(path)) from None


def _targets(config: LoraConfig, base: nn.Module, path: Path) -> dict[str, Any]:
    """Return the linear layers that it is for, by name."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn

    layers = {name: layer for name, layer in base.named_modules() if check_target_module_exists(config, name)}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise UserError(f"it is for {name}, which is no linear layer", where=f"{path}, target_modules")
    return layers


def _rank_and_scale(config: LoraConfig, name: str) -> tuple[int, float]:
    """Of its weights on a layer; as peft/tuners/lora/model.py and layer.py have it."""
    from peft.utils.other import get_pattern_key

    def own(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        patterns = patterns or {}
        return patterns.get(get_pattern_key(list(patterns), name), default)

    rank = own(config.rank_pattern, config.r)
    alpha = own(config.alpha_pattern, config.lora_alpha)
    return rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _check_names(there: set[str], layers: Mapping[str, Any], path: Path) -> None:
    """peft would leave out what it does not expect, and make up what is missing."""
    wanted = {_key(name, half) for name in layers for half in "AB"}
    for names, told in ((wanted - there, "is missing"), (there - wanted, "is not called for by its configuration")):
        if names:
            raise UserError(f"{min(names)} {told}", where=str(path))


def _key(layer: str, half: str) -> str:
    return f"{_PREFIX}{layer}.lora_{half}.weight"
