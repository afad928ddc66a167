"""`lora.FusedLinear` over a base in 4 bits; a module of its own, because only with bitsandbytes it can be imported."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from tunewright.training.lora import adds_one_adapter, fused


class FusedLinear4bit(Linear4bit):
    """peft's LoRA layer over bitsandbytes' 4-bit layer, as one step of autograd where one adapter is all there is.

    peft's own way clones the layer's output, since autograd may refuse to add to what bitsandbytes returns, and writes
    the adapter's output to compute it, to scale it and to add it: four more tensors of the output's size. Dropout,
    DoRA, a bias, several adapters, and merged or disabled ones are left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for x [..., in]: [..., out]."""
        base: Any = self.get_base_layer()
        # FSDP puts another parameter in the weight's place for each pass; bitsandbytes gives that its state then.
        packed = None if base.weight.is_floating_point() else base.weight.quant_state
        # An input of another type is cast by bitsandbytes, and one repacked for the CPU cannot be unpacked as it is.
        usual = x.dtype == base.compute_dtype and not getattr(packed, "packing_format_for_cpu", False)
        if args or kwargs or not usual or packed is None or not adds_one_adapter(self):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        return fused(self, x, packed)
