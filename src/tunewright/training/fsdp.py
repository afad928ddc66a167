"""FSDP2 support: each process holds a shard of every weight, and a layer is gathered only while it computes.

accelerate shards the model, and transformers saves and loads it; this module covers what both leave
open. Every pass is a collective operation: a process that makes a pass alone waits forever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from tunewright.training import distributed


def shard(accelerator: Any, model: Any) -> None:
    """Configure accelerate to shard the model layer by layer when it prepares it.

    Weights are sent, and gradients reduced, in the weights' own precision: a bfloat16 base under
    float32 adapters computes as it does in one process.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        # accelerate 1.15 ignores a request for FSDP on the CPU.
        plugin = accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    assert plugin.fsdp_version == 2, "distributed.init refuses version 1"
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in model.get_decoder().layers})
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def is_sharded(model: Any) -> bool:
    """Return whether this model is sharded."""
    return isinstance(model, FSDPModule)


def full_weight(layer: Any) -> Tensor:
    """Return a layer's weight, gathered if it is sharded, for use without calling the layer."""
    if isinstance(layer, FSDPModule):
        layer.unshard()
    weight: Tensor = layer.weight
    return weight


def reshard(model: Any) -> None:
    """Free the gathered parts of weights that other processes hold."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def bytes_held(model: Any) -> int:
    """Return the bytes of weights that this process holds between passes, counted by their storage in memory.

    This includes the scales of 4-bit weights, which every process holds in full.
    """
    reshard(model)
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
            local += [state.absmax, state.code, *nested]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in local}.values())


def adapter_weights(model: Any) -> dict[str, Any]:
    """Return the trained weights in full in the main process; all processes must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


@contextmanager
def syncing_gradients(model: Any, afterwards: bool) -> Iterator[None]:
    """Synchronize gradients after each pass while this is open, and set the sync to ``afterwards`` at its end.

    A sharded model keeps unsynchronized gradients where ``zero_grad`` does not reach them.
    """
    model.set_requires_gradient_sync(True)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(afterwards)


@contextmanager
def match_forward_passes(model: Any, idle_pass: Callable[[], Any]) -> Iterator[None]:
    """Let processes make different numbers of passes of a sharded model: early finishers join with idle passes.

    Before each pass the processes ask each other if any has a pass left; a process without one
    makes ``idle_pass``. An unsharded model needs none of this.
    """
    if not is_sharded(model):
        yield
        return

    def announce(*_: Any) -> None:
        distributed.any_process(True)

    hook = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    # Only after success: if a process failed, the launcher ends processes that wait for it.
    while distributed.any_process(False):
        idle_pass()
    reshard(model)
