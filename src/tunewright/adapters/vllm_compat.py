"""vLLM compatibility: LoRA adapters that vLLM loads or refuses, and weights that are not finite.

The rules are those of vLLM 0.32: ``PEFTHelper`` in vllm/lora/peft_helper.py (features), ``MaxLoRARanks`` in
vllm/config/lora.py (ranks) and ``parse_fine_tuned_lora_name`` in vllm/lora/utils.py (names of tensors). Earlier
releases check fewer features: they load an unconverted PiSSA adapter silently and answer wrongly with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunewright.config import TrainConfig
from tunewright.core.errors import UserError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

MAX_RANK = 512
"""The largest ``--max-lora-rank``; its default is 16, so a higher rank requires the option."""

# peft's initializations that leave the base unchanged. All others change it, which vLLM does not reproduce.
_PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases in addition to the LoRA weights (lora_bias)",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}


def require_servable(settings: TrainConfig) -> None:
    """Refuse, before anything is loaded, a config whose adapter vLLM would not load.

    Raises:
        UserError: naming the config's key; not with ``require_vllm_compatible: false``.
    """
    if not settings.require_vllm_compatible:
        return
    keys = {"use_dora": "use_dora", "r": "lora_r"}
    config = {"use_dora": settings.use_dora, "r": settings.lora_r}
    for name, why in vllm_refusals(config).items():
        key = f"train.{keys[name]}"
        instead = f"Set it to {MAX_RANK} or less" if name == "r" else "Set it to false"
        raise UserError(
            f"vLLM does not load {why}",
            where=key,
            fix=f"{instead}. Or set train.require_vllm_compatible to false for an adapter that only tunewright and "
            "peft load.",
        )


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
    kinds = [_REFUSED[key] for key in ("use_dora", "alora_invocation_tokens") if config.get(key)]
    if kinds:
        raise UserError(
            f"{kinds[0]} cannot share a batch with other adapters, so it cannot be served",
            where=folder.name,
            fix="Measure it with `tunewright evaluate`. To serve it, train plain LoRA.",
        )
