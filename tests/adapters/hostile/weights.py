"""The weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adapter_helpers import lora_config, lora_weights, write_adapter
from hostile.corpus import Q0, hostile


def _weights(at: Path, change: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    weights = lora_weights()
    change(weights)
    return write_adapter(at / "evil", lora_config(**config), weights)


@hostile("1 of 256 weights are not finite")
def a_weight_that_is_not_a_number(at: Path) -> Path:
    return _weights(at, lambda w: w[f"{Q0}.lora_A.weight"].__setitem__((0, 0), np.nan))


@hostile("1 of 256 weights are not finite")
def a_weight_that_is_infinite(at: Path) -> Path:
    return _weights(at, lambda w: w[f"{Q0}.lora_B.weight"].__setitem__((3, 1), -np.inf))


@hostile("above float16's")
def a_weight_that_overflows_in_sixteen_bits(at: Path) -> Path:
    def change(weights: dict[str, Any]) -> None:
        weights[f"{Q0}.lora_A.weight"][:] = 0
        weights[f"{Q0}.lora_A.weight"][0, 0] = 1e30

    return _weights(at, change)


@hostile(r"times their norm \(limit 2\)")
def a_change_that_drowns_the_base(at: Path) -> Path:
    return _weights(at, lambda w: w.__setitem__(f"{Q0}.lora_B.weight", 100 * w[f"{Q0}.lora_B.weight"] + 1))


@hostile(r"times their norm \(limit 2\)")
def a_scale_that_drowns_the_base(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(lora_alpha=500_000))


@hostile("The shape is 4 x 63; with this base and rank 4 it must be 4 x 64")
def weights_for_another_width(at: Path) -> Path:
    return _weights(at, lambda w: w.__setitem__(f"{Q0}.lora_A.weight", w[f"{Q0}.lora_A.weight"][:, :63].copy()))


@hostile("The shape is 4 x 64; with this base and rank 8 it must be 8 x 64")
def weights_of_another_rank_than_it_says(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(r=8))


@hostile("a rank from 1 to 512")
def a_rank_over_the_cap(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(r=513))


@hostile("Not a LoRA weight of this configuration and base")
def a_whole_output_layer_among_the_weights(at: Path) -> Path:
    return _weights(at, lambda w: w.__setitem__("base_model.model.lm_head.weight", np.zeros((259, 64), np.float32)))


@hostile("Not a LoRA weight of this configuration and base")
def weights_for_a_layer_that_is_not_there(at: Path) -> Path:
    def change(weights: dict[str, Any]) -> None:
        for half in "AB":
            name = f"{Q0}.lora_{half}.weight"
            weights[name.replace("layers.0", "layers.7")] = weights[name]

    return _weights(at, change)


@hostile("The weight is missing, but the configuration requires it")
def half_of_a_pair(at: Path) -> Path:
    return _weights(at, lambda w: w.pop(f"{Q0}.lora_B.weight"))


@hostile("The adapter has earlier checkpoints but no lineage.json")
def a_checkpoint_of_a_training_that_nobody_knows(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    write_adapter(folder / "checkpoints" / "step-1")
    return folder
