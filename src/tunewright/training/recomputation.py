"""The layers whose activations the backward pass computes again instead of keeping them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tunewright.config import TrainConfig
from tunewright.models.families import Shape
from tunewright.models.memory_estimate import BatchShape, weight_bytes
from tunewright.models.memory_plan import available_memory, fewest_recomputed, recomputed_layers, training_setup
from tunewright.training import distributed
from tunewright.training.packing import PackedBatch
from tunewright.training.packing.padding import PaddedBatch


class RecomputedLayers:
    """The first ``count`` layers of a model, which the backward pass computes again.

    A recomputed layer gives the same numbers to the bit, so ``count`` changes speed and memory only.
    """

    def __init__(self, settings: TrainConfig, shape: Shape) -> None:
        card = torch.cuda.is_available()
        asked = recomputed_layers(settings, shape.layers, card=card)
        self.shape, self.setup, self.total = shape, training_setup(settings, card=card), shape.layers
        # The estimate does not cover a base that FSDP shards.
        self.auto = asked is None and not distributed.is_sharded()
        self.count = shape.layers if asked is None or asked == "all" else asked

    def plan(self, batch: PackedBatch | PaddedBatch) -> None:
        """Recompute as few layers as the estimate for this batch allows, if the config leaves the number open."""
        if not self.auto:
            return
        if isinstance(batch, PaddedBatch):
            (rows, own), shared = batch.input_ids.shape, 0
        else:
            rows, tokens = sum(len(block.suffixes) for block in batch.layout.blocks), batch.input_ids.shape[1]
            shared = (batch.row_tokens - tokens) // max(1, rows - 1)
            own = -(-(tokens - shared) // rows)
        load = BatchShape(rows, shared, own, min(own, -(-len(batch.targets) // rows)))
        # The base is on the card already.
        available = available_memory(None).bytes + weight_bytes(self.shape, self.setup)
        setup = replace(self.setup, padded=isinstance(batch, PaddedBatch))
        self.count = fewest_recomputed(self.shape, setup, load, available)

    def recompute_more(self) -> bool:
        """Recompute half of the remaining layers too; return False if the config forbids it or none remains."""
        if not self.auto or self.count == self.total:
            return False
        self.count = (self.count + self.total + 1) // 2
        return True

    def apply(self, model: Any) -> None:
        """Let the model recompute its first layers: at their turn the activations of later layers are freed."""
        decoder = model.get_decoder()  # of a Llama4ForCausalLM it is the whole model
        for place, layer in enumerate(getattr(decoder, "model", decoder).layers):
            layer.gradient_checkpointing = place < self.count
