"""The list of cases in the order in which they run: what answers most comes first, because time may run out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

FIXED_SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}
GROWING_SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

MODELS = {
    "8b-lora": ("8b", False, "shared"),
    "8b-lora-2048": ("8b", False, "unshared"),
    "8b-qlora": ("8b", True, "shared"),
    "8b-qlora-2048": ("8b", True, "unshared"),
    "70b-qlora": ("70b", True, "shared"),
}
"""Name of a training case: its shape, whether the linear layers are in NF4, and its rows (a key of training.LOADS)."""

OURS: dict[str, dict[str, bool | str]] = {
    "tunewright": {},
    "tunewright-liger": {"use_liger_kernel": True},
    "tunewright-recompute-all": {"gradient_checkpointing": "all"},
}
"""Our own sides, with the settings of each that are not the defaults."""

TRL = ("trl-plain", "trl-padding-free")


@dataclass(frozen=True)
class Case:
    """One case, which runs in a separate process."""

    name: str
    module: str
    """The module of this package that has ``run(report, toy, **arguments)``."""
    expected: int
    """Seconds that it takes on an H100, with the start of its process: computed, not measured."""
    seconds: int
    """Its time limit."""
    arguments: dict[str, str | bool] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: dict(GROWING_SEGMENTS))


def cases() -> list[Case]:
    """Return every case in order. Five calls of nine minutes run them all; docs/gpu.md says which are in each."""
    varied: dict[str, str | bool] = {"side": "tunewright", "model": "8b-lora", "varied": True}
    return [
        # Every question on kernels.
        Case("ceilings", "ceilings", 25, 120),
        Case("attention", "attention", 25, 180),
        Case("parity", "parity", 75, 240, {"nf4": False}),
        Case("parity-nf4", "parity", 60, 240, {"nf4": True}),
        Case("nf4-bits", "nf4_bits", 90, 240),
        *_training("8b-lora", ("tunewright", "tunewright-liger"), 40),
        Case("decode", "decoding", 50, 480),
        Case("float32", "float32", 75, 240),
        # Speed against trl, with torchtune's setting.
        *_training("8b-lora-2048", (*OURS, *TRL), 45),
        *_training("8b-lora", TRL, 40),
        *_training("8b-qlora", ("tunewright", "trl-plain"), 45),
        *_training("8b-qlora-2048", ("tunewright", "trl-plain"), 50),
        # Memory, and 70B.
        *_training("70b-qlora", ("tunewright", "trl-plain"), 110),
        Case("largest/8b-lora", "largest", 50, 400, {"beyond": False}),
        Case("largest/8b-lora-and-10%", "largest", 80, 400, {"beyond": True}),
        Case("out-of-memory/training", "out_of_memory", 60, 300, {"what": "training"}),
        Case("out-of-memory/dev-answers", "out_of_memory", 60, 300, {"what": "dev answers"}),
        Case("command-line", "command_line", 240, 540),
        Case("fsdp", "sharded", 90, 400),
        Case("vllm-adapters", "vllm_adapters", 150, 480),
        Case("segments/expandable", "training", 50, 300, varied),
        Case("segments/fixed", "training", 50, 300, varied, FIXED_SEGMENTS),
        *_training("8b-qlora", ("tunewright-liger", "trl-padding-free"), 45),
        *_training("8b-qlora-2048", ("tunewright-liger", "trl-padding-free"), 50),
        *_training("70b-qlora", ("tunewright-liger", "trl-padding-free"), 110),
        # Unsloth compiles its kernels first.
        *(case for model in MODELS for case in _training(model, ("unsloth",), 300)),
    ]


def _training(model: str, sides: Iterable[str], expected: int) -> list[Case]:
    return [Case(f"{model}/{side}", "training", expected, 480, {"side": side, "model": model}) for side in sides]
