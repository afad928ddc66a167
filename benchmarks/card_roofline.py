"""Time of a training step on a card, computed from counted work: nothing runs on a card.

    python benchmarks/card_roofline.py [NAME …]

Each case trains models of real width with 2 and 4 layers on the fake card of tests/gpu. It counts FLOPs and bytes of
every operation of one step, and extends them to full depth. An operation takes the longer of FLOPs / F and bytes / B,
and a gap. F, B and the gap are assumptions, below. Prints a Markdown table and writes
benchmarks/results/card_roofline.json; with names, only these cases run, and the others are kept. To compare two states
of the code, run it in each. A setting of `train` gets a row by a case in CASES.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The process with the fake card imports this file before torch may be imported.
sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("gpu", ".")]

if TYPE_CHECKING:
    from recorder import Work

    from tunewright.models.families import Shape

RESULTS = Path(__file__).with_name("results") / "card_roofline.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
GAP = 1.5e-6
"""Assumed seconds between two kernels."""
BACKWARD = 2.5
"""FLOPs of FlashAttention's backward pass for each of its forward pass: five products against two."""


@dataclass(frozen=True)
class Card:
    """A card's dense bfloat16 peak by its data sheet, and rates that are assumed to last."""

    peak: float
    flops: float
    """F of matrix products: 66% of the peak for the H100, 82% for the A100, 88% for the 4090."""
    bytes: float
    """B: 82 to 88% of the data sheet's memory bandwidth."""
    attention: float
    """F of FlashAttention 2, forward and backward together."""


CARDS = {
    "H100": Card(989e12, 653e12, 2.75e12, 250e12),
    "A100": Card(312e12, 256e12, 1.7e12, 160e12),
    "RTX 4090": Card(165e12, 145e12, 0.89e12, 105e12),
}


@dataclass(frozen=True)
class Case:
    """One training step: rows, the tokens they share, own tokens and trained tokens of each."""

    shape: str
    rows: tuple[int, int, int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of `train`."""
    cards: tuple[str, ...] = tuple(CARDS)


ALL, NONE = {"gradient_checkpointing": "all"}, {"gradient_checkpointing": "none"}
NF4, LIGER = {"quantization": "nf4"}, {"use_liger_kernel": True}
SHARED, LONG = (8, 384, 128, 32), (2, 0, 2048, 2048)
LARGE = ("H100", "A100")
CASES = {
    "8B LoRA, 8 x 512, 384 shared": Case("llama-3-8b", SHARED, ALL),
    "8B LoRA, 8 x 512, 384 shared, no layer recomputed": Case("llama-3-8b", SHARED, NONE, LARGE),
    "8B QLoRA, 8 x 512, 384 shared": Case("llama-3-8b", SHARED, {**NF4, **ALL}),
    "8B QLoRA, 8 x 512, 384 shared, no layer recomputed": Case("llama-3-8b", SHARED, {**NF4, **NONE}),
    "8B LoRA, 2 x 2,048": Case("llama-3-8b", LONG, ALL),
    "8B LoRA, 2 x 2,048, no layer recomputed": Case("llama-3-8b", LONG, NONE, LARGE),
    "8B LoRA, 2 x 2,048, no layer recomputed, Liger": Case("llama-3-8b", LONG, {**NONE, **LIGER}, LARGE),
    "8B QLoRA, 2 x 2,048": Case("llama-3-8b", LONG, {**NF4, **ALL}),
    "8B QLoRA, 2 x 2,048, no layer recomputed": Case("llama-3-8b", LONG, {**NF4, **NONE}, LARGE),
    "70B QLoRA, 8 x 512, 384 shared": Case("llama-3-70b", SHARED, {**NF4, **ALL}, LARGE),
}
"""Each for the cards whose memory it fits."""
COLUMNS = ("product", "4-bit unpacking", "elementwise", "adapter product", "attention")
"""Kinds of operations, which recorder.py names."""
HEADER = (
    "| case | card | step, ms | products | 4-bit unpacking | elementwise | LoRA's products | attention | launches "
    "| computed tokens/s (row tokens/s) | MFU |"
)


def main(names: list[str]) -> None:
    """Count, compute, print and write."""
    from card_process import card_process, compiled
    from fake_models import SHAPES
    from recorder import training_step

    from tunewright.core.io import write_json
    from tunewright.models.memory_estimate import BatchShape

    cases = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if names else {}
    with tempfile.TemporaryDirectory() as folder, card_process(compiled(Path(folder))) as card:
        for name, case in CASES.items():
            if names and name not in names:
                continue
            shape, load = SHAPES[case.shape], BatchShape(*case.rows)
            two, four = (
                card.run(training_step, replace(shape, layers=layers), load, dict(case.settings)) for layers in (2, 4)
            )
            layers = four.plus(two, -1)
            cases[name] = {
                "launches_a_layer": layers.launches // 2,
                **_computed(two.plus(layers, (shape.layers - 2) // 2), shape, case),
            }
    document = {
        "date": datetime.date.today().isoformat(),
        "versions": {package: version(package) for package in PACKAGES},
        "cases": cases,
    }
    print(table(document))
    write_json(RESULTS, document)


def _computed(work: Work, shape: Shape, case: Case) -> dict[str, Any]:
    """Return a step's launches, host reads and milliseconds by kind on each card."""
    from recorder import ATTENTION, KINDS

    rows, shared, own, _ = case.rows
    pairs = shared**2 / 2 + rows * (own * shared + own**2 / 2)  # of a query and a key that it sees
    forward = 4 * shape.queries * pairs
    counts = {operation.name: count for operation, count in work.operations.items() if operation.kind == ATTENTION}
    attended = forward * (counts["_varlen_attn"] + BACKWARD * counts["_varlen_attn_backward"])
    tokens = shared + rows * own
    cards = {}
    for name in case.cards:
        card = CARDS[name]
        seconds = dict.fromkeys(KINDS, 0.0)
        for operation, count in work.operations.items():
            seconds[operation.kind] += count * (max(operation.flops / card.flops, operation.bytes / card.bytes) + GAP)
        seconds[ATTENTION] = attended / card.attention + work.count(ATTENTION) * GAP
        step = sum(seconds.values())
        cards[name] = {
            "ms": {kind: round(1e3 * each, 1) for kind, each in seconds.items()},
            "step_ms": round(1e3 * step, 1),
            "computed_tokens_s": round(tokens / step),
            "row_tokens_s": round(rows * (shared + own) / step),
            "mfu": round(4 * shape.linear_parameters * tokens / step / card.peak, 3),
        }
    return {"launches": work.launches, "host_reads": work.reads, "cards": cards}


def table(document: Mapping[str, Any]) -> str:
    """Return the Markdown table of docs/gpu.md."""
    lines = [HEADER, "| --- | --- " + "| ---: " * 9 + "|"]
    for name in filter(document["cases"].__contains__, CASES):
        case = document["cases"][name]
        for card in CASES[name].cards:
            found = case["cards"][card]
            ms = [found["ms"][kind] for kind in COLUMNS]
            lines.append(
                f"| {name} | {card} | {found['step_ms']:,.0f} | {' | '.join(f'{each:,.0f}' for each in ms)} "
                f"| {case['launches']:,} | {found['computed_tokens_s']:,} ({found['row_tokens_s']:,}) "
                f"| {found['mfu']:.0%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
