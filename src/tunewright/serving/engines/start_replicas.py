"""Starts the replicas of a server: engines of one kind, each in its own process with its share of the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from tunewright.config import Config, EngineName
from tunewright.core.errors import UserError
from tunewright.core.interrupts import run_async
from tunewright.core.progress import Reporter, WithoutBars
from tunewright.core.text import count_of
from tunewright.engines.protocol import Engine
from tunewright.models.loading import named
from tunewright.serving.engines.hosted_replicas import start_hosted
from tunewright.serving.engines.replicas import Replicas
from tunewright.serving.engines.start import EngineSpec, Share, load_all, start_engine

_GPUS = "CUDA_VISIBLE_DEVICES"


def start_engines(kind: EngineName, config: Config, spec: EngineSpec, reporter: Reporter) -> Engine:
    """Return the server's engine with the adapters loaded: one engine, or the replicas that the config asks for.

    Raises:
        UserError: as for :func:`start_engine`, or there are fewer GPUs than replicas.
    """
    count, room = config.serve.replicas, config.serve.adapters_per_replica
    if kind == "llamacpp" and room is not None:
        raise UserError(
            "llama.cpp restarts whenever its adapters change, so it holds all of them",
            where="serve.adapters_per_replica",
            fix="Remove it, or use the engine peft or vllm.",
        )
    if count == 1 and room is None:
        return start_engine(kind, config, spec, reporter)
    if kind == "vllm":  # it starts with a number of slots
        room = room or max(1, len(spec.adapters) + len(spec.to_come) + spec.spare)
    # llama.cpp takes all adapters in one start. The others load each one where it is needed.
    started = (
        spec if kind == "llamacpp" else replace(spec, adapters={}, to_come=(*spec.to_come, *spec.adapters.values()))
    )
    held = ExitStack()
    engines: Mapping[str, Engine]
    if count > 1 and config.compute.cluster is not None:
        with held:
            engines = start_hosted(kind, config, started, reporter, held)
            held = held.pop_all()
    else:
        shares = machine_shares(count)
        each = "one GPU" if _GPUS in shares[0].variables else count_of(shares[0].threads, "thread")
        reporter.say(f"Loading {named(spec.base, spec.quantization)}: {count_of(count, 'replica')} with {each} each")
        engines = _start_all(kind, config, started, shares, reporter)
    replicas = Replicas(engines, room=room, held=held)
    try:
        run_async(load_all(replicas, spec.adapters))
    except BaseException:
        replicas.stop()
        raise
    return replicas


def _start_all(
    kind: EngineName, config: Config, spec: EngineSpec, shares: Sequence[Share], reporter: Reporter
) -> dict[str, Engine]:
    """Start the engines at the same time; if one fails, stop the others."""

    def start(share: Share) -> Engine:
        return start_engine(kind, config, spec, _Named(share.name, reporter), share)

    # llama.cpp's files are written by the first start.
    with ThreadPoolExecutor(1 if kind == "llamacpp" else len(shares)) as pool:
        starting = {share.name: pool.submit(start, share) for share in shares}
    failed = [error for future in starting.values() if (error := future.exception()) is not None]
    if failed:
        for future in starting.values():
            if future.exception() is None:
                future.result().stop()
        raise failed[0]
    return {name: future.result() for name, future in starting.items()}


class _Named(WithoutBars):
    """A reporter of one replica's messages."""

    def __init__(self, name: str, reporter: Reporter) -> None:
        super().__init__(reporter)
        self.say = lambda message: reporter.say(f"{name}: {message}")
        self.warn = lambda message: reporter.warn(f"{name}: {message}")


def machine_shares(count: int) -> list[Share]:
    """Return equal shares of this machine: a GPU each, or an equal number of the processor's threads.

    Raises:
        UserError: there are GPUs, but fewer than replicas.
    """
    import torch

    names = [f"replica-{number}" for number in range(1, count + 1)]
    if not torch.cuda.is_available():
        threads = max(1, torch.get_num_threads() // count)
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        return [Share(name, variables, threads) for name in names]
    found = torch.cuda.device_count()
    if found < count:
        raise UserError(
            f"Too few GPUs for {count} replicas: {found}",
            where="serve.replicas",
            fix=f"Set it to {found} at most: each replica has one GPU of its own.",
        )
    inherited = os.environ.get(_GPUS, "")
    gpus = inherited.split(",") if inherited else [str(number) for number in range(found)]
    return [Share(name, {_GPUS: gpu.strip()}, 1) for name, gpu in zip(names, gpus, strict=False)]
