"""`fused_lora.FusedLinear` over a 4-bit base; a separate module because importing it needs bitsandbytes."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from tunewright.training.fused_lora import adds_one_adapter, fused


class FusedLinear4bit(Linear4bit):
    """peft's LoRA layer over bitsandbytes' 4-bit layer, as one autograd step for a single plain adapter.

    peft's own layer clones the base's output, since autograd may refuse to add to what bitsandbytes returns, and writes
    the adapter's output to compute, scale and add it: four more tensors of the output's size. Dropout, DoRA, a bias,
    several adapters, and merged or disabled adapters are left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output [..., out] for x [..., in]."""
        base: Any = self.get_base_layer()
        # FSDP replaces the weight parameter in each pass, and bitsandbytes then sets its state again.
        packed = None if base.weight.is_floating_point() else base.weight.quant_state
        # bitsandbytes casts an input of another dtype, and a weight repacked for the CPU cannot be unpacked here.
        usual = x.dtype == base.compute_dtype and not getattr(packed, "packing_format_for_cpu", False)
        if args or kwargs or not usual or packed is None or not adds_one_adapter(self):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        return fused(self, x, packed)
