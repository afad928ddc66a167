"""Processes that train one adapter together, each on a device of its own, as torchrun or accelerate launch starts them.

All of them read and compute the same; the first, the *main* one, alone writes and reports. What they have to agree on
(a stop, the checkpoint to go on from) goes through here. In a process of its own every question has a plain answer.
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
    "FSDP_OFFLOAD_PARAMS": "offloading the pieces",
    "FSDP_IGNORED_MODULES": "leaving modules out of the division",
    "FSDP_ACTIVATION_CHECKPOINTING": "FSDP's recomputing of activations (on cards they are recomputed anyway)",
}
_DECIDED = {
    # Every process maps the base's file: its pages are in memory once, and there is nothing to send.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    # An adapter is small and is stored whole; with cards this also gives processes a way to send what lies in memory.
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What accelerate's settings say is decided here."""


def count() -> int:
    """Return how many processes there are, by the launcher's word."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def is_main() -> bool:
    """Return whether this is the process that writes and reports."""
    return count() == 1 or int(os.environ["RANK"]) == 0


def join() -> None:
    """Meet the other processes; with none, nothing happens.

    Raises:
        UserError: they were started for a way of sharing work that is not had here.
    """
    if _asked(_DEEPSPEED):
        raise UserError(
            "DeepSpeed was asked for, and is not supported",
            where="accelerate launch",
            fix="Leave it out (`--multi_gpu`), or divide the base by FSDP2 (`--use_fsdp --fsdp_version 2`).",
        )
    if _asked(_FSDP):
        _require_usable()
        os.environ.update(_DECIDED)
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def _asked(key: str) -> bool:
    return os.environ.get(key, "").lower() == "true"


def _require_usable() -> None:
    """Refuse what FSDP cannot be had with here."""
    if count() == 1:
        raise UserError(
            "FSDP was asked for, and there is one process, with none to share the base with",
            where="accelerate launch",
            fix="Start several: `--num_processes N`, or without cards `torchrun --nproc-per-node N`.",
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP's first version is not supported", where="FSDP_VERSION", fix="Add `--fsdp_version 2`.")
    for key, what in _UNSUPPORTED.items():
        if os.environ.get(key, "false").lower() not in ("false", ""):
            raise UserError(f"{what} is not supported", where=key, fix="Leave it out.")


def in_pieces() -> bool:
    """Return whether the processes divide the base among them (FSDP), instead of holding it each."""
    return count() > 1 and _asked(_FSDP)


def leave() -> None:
    """Part from the other processes at the end of the work."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def lonely_launch() -> bool:
    """Whether `accelerate launch --cpu` promised several processes and, having no MPI, started this one alone."""
    mpi = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    wanted = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    return wanted and count() == 1 and not any(key in os.environ for key in mpi)


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def any_of(flag: bool) -> bool:
    """Return whether ``flag`` is true in any process; all of them ask at once."""
    if count() == 1:
        return flag
    import torch
    from accelerate import PartialState

    told = torch.tensor(int(flag), device=PartialState().device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return bool(told)


def by_main(make: Callable[[], Value]) -> Value:
    """Return what the main process makes, in every process."""
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    made: list[Value | None] = [make() if is_main() else None]
    value: Value = broadcast_object_list(made)[0]
    return value


def first_to_fail() -> bool:
    """Return whether this process fails before any other, and so is the one to say why."""
    if count() == 1:
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return is_main()
    rank = os.environ["RANK"]
    try:
        return bool(distributed.distributed_c10d._get_default_store().compare_set(_FAILED, "", rank).decode() == rank)
    except distributed.DistError:  # the process that kept the store is gone, and has said why
        return False


def lost_another(error: RuntimeError) -> bool:
    """Return whether an error only says that another process is gone."""
    return count() > 1 and bool(re.search("gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE))
