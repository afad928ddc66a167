"""An adapter's weights times a factor: between the base (0) and the adapter as it was trained (1)."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunewright.adapters.registry import CONFIG, WEIGHTS


def scale_weights(source: Path, factor: float, target: Path) -> None:
    """Write the LoRA adapter in ``source`` into the folder ``target``, with its change of the base times ``factor``.

    The factor goes into the B matrices, so that the configuration stays as it is and whatever serves the one serves the
    other.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(source / WEIGHTS)
    assert any(".lora_B." in name for name in weights), "plain LoRA"
    scaled = {name: (factor * w if ".lora_B." in name else w).contiguous() for name, w in weights.items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(scaled, target / WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(source / CONFIG, target / CONFIG)
