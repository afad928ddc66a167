"""Processes that train one adapter together, each on its own device, as torchrun or accelerate launch starts them.

All processes read and compute the same; only the *main* process writes and reports. What they must agree
on (a stop, the checkpoint to resume) goes through this module. A single process gets trivial answers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from tunewright.core.errors import UserError

Value = TypeVar("Value")

_FAILED = "tunewright/failed"
_FSDP = "ACCELERATE_USE_FSDP"
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_UNSUPPORTED = {
    "FSDP_OFFLOAD_PARAMS": "Offloading parameters",
    "FSDP_IGNORED_MODULES": "Ignoring modules",
    "FSDP_ACTIVATION_CHECKPOINTING": "FSDP's activation checkpointing (set train.gradient_checkpointing instead)",
}
_DECIDED = {
    # Every process maps the base's file: its pages are in memory once, and nothing has to be sent.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    # An adapter is small and is stored in full; with GPUs this also sets up a way to send CPU tensors.
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""Settings of accelerate that are fixed here."""


def world_size() -> int:
    """Return the number of processes, as the launcher set it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this process writes and reports."""
    return world_size() == 1 or int(os.environ["RANK"]) == 0


def init() -> None:
    """Connect to the other processes; a single process does nothing."""
    if _asked(_DEEPSPEED):
        raise UserError(
            "DeepSpeed is not supported",
            where="accelerate launch",
            fix="Use `--multi_gpu`, or shard the base with FSDP2: `--use_fsdp --fsdp_version 2`.",
        )
    if _asked(_FSDP):
        if world_size() == 1:
            raise UserError(
                "FSDP needs at least 2 processes (got 1)",
                where="accelerate launch",
                fix="Start several: `--num_processes N`, or without GPUs `torchrun --nproc-per-node N`.",
            )
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("FSDP version 1 is not supported", where="FSDP_VERSION", fix="Add `--fsdp_version 2`.")
        for key, what in _UNSUPPORTED.items():
            if os.environ.get(key, "false").lower() not in ("false", ""):
                raise UserError(f"{what} is not supported", where=key, fix="Remove this setting.")
        os.environ.update(_DECIDED)
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def _asked(key: str) -> bool:
    return os.environ.get(key, "").lower() == "true"


def is_sharded() -> bool:
    """Return whether the processes share one base (FSDP) instead of holding a copy each."""
    return world_size() > 1 and _asked(_FSDP)


def shutdown() -> None:
    """Disconnect from the other processes."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def barrier() -> None:
    """Wait until every process arrives."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def any_process(flag: bool) -> bool:
    """Return whether ``flag`` is true in any process; all processes must call this together."""
    if world_size() == 1:
        return flag
    import torch
    from accelerate import PartialState

    result = torch.tensor(int(flag), device=PartialState().device)
    torch.distributed.all_reduce(result, op=torch.distributed.ReduceOp.MAX)
    return bool(result)


def broadcast_from_main(make: Callable[[], Value]) -> Value:
    """Return in every process what ``make`` returns in the main process."""
    if world_size() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    made: list[Value | None] = [make() if is_main_process() else None]
    value: Value = broadcast_object_list(made)[0]
    return value


def failed_first() -> bool:
    """Return whether this process failed before all others, and so reports the error."""
    if world_size() == 1:
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return is_main_process()
    rank = os.environ["RANK"]
    try:
        return bool(distributed.distributed_c10d._get_default_store().compare_set(_FAILED, "", rank).decode() == rank)
    except distributed.DistError:  # the process that kept the store is gone, and has reported its error
        return False


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether an error only says that another process is gone."""
    return world_size() > 1 and bool(re.search("gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE))
