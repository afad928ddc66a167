"""The work of one layer at the real width of an 8B, counted: it rises or falls on purpose only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from card_process import CardProcess
from fake_models import SHAPES
from recorder import ADAPTER, ATTENTION, ELEMENTWISE, PRODUCT, UNPACK, training_step
from test_decoding_gpu import AROUND, ONE, decode

from tunewright.models.memory_estimate import BatchShape

ALL = {"gradient_checkpointing": "all"}
UNSHARED, SHARED = BatchShape(2, 0, 2048, 32), BatchShape(8, 384, 128, 32)


@dataclass(frozen=True)
class Layer:
    """A training step's work in one layer: forward, recomputation, backward and optimizer. Counts are exact."""

    load: BatchShape
    launches: int
    products: int
    """With the base's weights."""
    adapter_products: int
    """With LoRA's matrices: two forward, two recomputed and four backward in each of seven linear layers.

    Of down_proj, the last, only one is recomputed.
    """
    unpackings: int
    """Of a 4-bit weight and of its scales, also those inside of bitsandbytes' product."""
    attention: int
    megabytes: float
    """Elementwise traffic for each computed token: at most."""
    settings: dict[str, Any] = field(default_factory=dict)


LAYERS = {
    # Products: 7 forward, 6 recomputed (not the last, down_proj), 7 backward.
    "lora": Layer(UNSHARED, 244, 20, 55, 0, 3, 2.45, ALL),
    "qlora": Layer(UNSHARED, 265, 20, 55, 27, 3, 2.46, {**ALL, "quantization": "nf4"}),
    # Keys and values are gathered for each row, and their gradients summed in float32.
    "lora, shared prompts": Layer(SHARED, 256, 20, 55, 0, 3, 2.65, ALL),
    # Where memory suffices, as on the fake card of 80 GB: 7 products forward and 7 backward.
    "lora, no layer recomputed": Layer(UNSHARED, 181, 14, 42, 0, 2, 1.88),
    # One kernel for each norm, rotary embedding and SwiGLU, forward and backward (stand_ins/liger_kernel).
    "lora, Liger": Layer(UNSHARED, 116, 14, 42, 0, 2, 0.6, {"use_liger_kernel": True}),
}
"""The bounds, stated once. A change that launches, computes or moves less lowers them here."""

READS = 0
"""Host reads of a step that wait for the card: its numbers are read while the next step computes."""


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "qlora",
        "lora, no layer recomputed",
        "lora, Liger",
        pytest.param("lora, shared prompts", marks=pytest.mark.slow),
    ],
)
def test_training_step_does_the_listed_work_in_each_layer(card: CardProcess, name: str) -> None:
    listed = LAYERS[name]
    one, two = (
        card.run(training_step, replace(SHAPES["llama-3-8b"], layers=layers), listed.load, listed.settings)
        for layers in (1, 2)
    )
    layer = two.plus(one, -1)
    counted = replace(
        listed,
        launches=layer.launches,
        products=layer.count(PRODUCT),
        adapter_products=layer.count(ADAPTER),
        unpackings=layer.count(UNPACK),
        attention=layer.count(ATTENTION),
    )
    assert counted == listed
    moved = layer.bytes(ELEMENTWISE) / listed.load.tokens / 1e6
    assert 0.95 * listed.megabytes <= moved <= listed.megabytes, "lower the bound if less is moved"
    assert (one.reads, layer.reads) == (READS, 0)


def test_decoding_a_token_launches_as_many_kernels_as_listed_and_reads_once(card: CardProcess) -> None:
    """Four rows with one adapter on all linear layers."""
    one, two = (card.run(decode, ["a"] * 4, layers)["token"] for layers in (1, 2))
    assert two.launches - one.launches == ONE
    assert one.launches - ONE <= AROUND
    assert len(one.syncs) == len(two.syncs) == 1
