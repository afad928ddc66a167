"""A base in pieces (FSDP2): each process holds a part of every weight, and a layer is whole only while it computes.

accelerate divides the model and transformers saves and loads it; here is what both leave open. A pass needs all
processes: one that makes a pass alone waits for ever.
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


def divide(accelerator: Any, model: Any) -> None:
    """Have accelerate divide the model, when it prepares it, layer by layer.

    Weights are sent in the precision that they have, and gradients are added up in it: a bfloat16 base under float32
    adapters computes as it does in one process.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        # accelerate 1.15 takes FSDP for a matter of cards: on processors it has read the request, and dropped it.
        plugin = accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    assert plugin.fsdp_version == 2, "required when the processes met"
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in model.get_decoder().layers})
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def is_divided(model: Any) -> bool:
    """Return whether this model is in pieces."""
    return isinstance(model, FSDPModule)


def whole_weight(layer: Any) -> Tensor:
    """Return a layer's weight, put together where it is in pieces: for who uses it without calling the layer."""
    if isinstance(layer, FSDPModule):
        layer.unshard()
    weight: Tensor = layer.weight
    return weight


def release(model: Any) -> None:
    """Let go of what other processes hold too."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def bytes_held(model: Any) -> int:
    """Bytes of the weights that this process holds between passes, counted by what lies in memory for them.

    The scales of 4-bit weights are among them: each process holds all of these.
    """
    release(model)
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
            local += [state.absmax, state.code, *nested]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in local}.values())


def adapter_weights(model: Any) -> dict[str, Any]:
    """Return the trained weights, whole, in the main process; all processes have to ask."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


@contextmanager
def exchanging(model: Any, afterwards: bool) -> Iterator[None]:
    """Have the processes exchange gradients after each pass, whatever they do before and ``afterwards``.

    A divided model keeps the gradients that it has not exchanged where ``zero_grad`` does not reach them.
    """
    model.set_requires_gradient_sync(True)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(afterwards)


@contextmanager
def keeping_step(model: Any, idle_pass: Callable[[], Any]) -> Iterator[None]:
    """Passes of a divided model whose number differs from process to process: those done first go along.

    Before each pass the processes ask each other whether anyone has one left; who has none makes ``idle_pass`` with
    the others. Nothing happens where the model is not divided.
    """
    if not is_divided(model):
        yield
        return

    def announce(*_: Any) -> None:
        distributed.any_of(True)

    hook = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    # Only where all went well: who waits for one that failed is ended by the launcher.
    while distributed.any_of(False):
        idle_pass()
    release(model)
