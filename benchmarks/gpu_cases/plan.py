"""The list of cases in the order in which they run: headlines first, because time may run out."""

from __future__ import annotations

from dataclasses import dataclass, field

FIXED_SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}
GROWING_SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

MODELS = {"8b-lora": ("8b", False), "70b-qlora": ("70b", True), "8b-qlora": ("8b", True), "7b-lora": ("7b", False)}
"""Name of a training case: its shape, and whether the linear layers are in NF4."""

SIDES = ("tunewright", "trl-plain", "trl-padding-free", "unsloth", "tunewright-liger")


@dataclass(frozen=True)
class Case:
    """One case, which runs in a separate process."""

    name: str
    module: str
    """The module of this package that has ``run(report, toy, **arguments)``."""
    seconds: int
    """Its time limit."""
    arguments: dict[str, str | bool] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: dict(GROWING_SEGMENTS))


def cases() -> list[Case]:
    """Return every case in order."""
    listed = [
        Case("ceilings", "ceilings", 120),
        Case("attention", "attention", 180),
        Case("parity", "parity", 240),
        Case("nf4-bits", "nf4_bits", 240),
    ]
    for model, (shape, nf4) in MODELS.items():
        listed += [
            Case(f"{model}/{side}", "training", 480, {"side": side, "shape": shape, "nf4": nf4}) for side in SIDES
        ]
    varied: dict[str, str | bool] = {"side": "tunewright", "shape": "8b", "nf4": False, "varied": True}
    listed += [
        Case("segments/expandable", "training", 300, varied),
        Case("segments/fixed", "training", 300, varied, FIXED_SEGMENTS),
        Case("largest/8b-lora", "largest", 400, {"beyond": False}),
        Case("largest/8b-lora-and-10%", "largest", 400, {"beyond": True}),
        Case("decode", "decoding", 480),
        Case("command-line", "command_line", 540),
    ]
    return listed
