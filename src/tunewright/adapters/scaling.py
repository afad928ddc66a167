"""Scaled adapters: weights between the base (factor 0) and the trained adapter (factor 1)."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunewright.adapters.registry import CONFIG, WEIGHTS


def scale_weights(source: Path, factor: float, target: Path) -> None:
    """Write the LoRA adapter in ``source`` into ``target``, with its change of the base scaled by ``factor``.

    The factor is multiplied into the B matrices, so the configuration stays the same, and engines that serve one serve
    the other.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(source / WEIGHTS)
    assert any(".lora_B." in name for name in weights), "plain LoRA"
    scaled = {name: (factor * w if ".lora_B." in name else w).contiguous() for name, w in weights.items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(scaled, target / WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(source / CONFIG, target / CONFIG)
