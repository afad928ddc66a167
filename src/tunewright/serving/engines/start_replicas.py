"""Starts the replicas of a server: engines of one kind, each in its own process with its share of the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tunewright.config import Config, EngineName
from tunewright.core.errors import UserError
from tunewright.core.interrupts import run_async
from tunewright.core.progress import Reporter, WithoutBars
from tunewright.core.text import count_of
from tunewright.engines.protocol import Engine
from tunewright.models.loading import named
from tunewright.serving.engines.autoscaler import Autoscaler
from tunewright.serving.engines.hosted_replicas import hosted_starter
from tunewright.serving.engines.replicas import Replicas, Starter
from tunewright.serving.engines.scaling import ScalingPolicy, largest_number
from tunewright.serving.engines.start import EngineSpec, Share, load_all, replica_spec, start_engine

_GPUS = "CUDA_VISIBLE_DEVICES"


def start_engines(kind: EngineName, config: Config, spec: EngineSpec, reporter: Reporter) -> Engine:
    """Return the server's engine with the adapters loaded: one engine, or the replicas that the config asks for.

    Raises:
        UserError: as for :func:`start_engine`, or there are fewer GPUs than the largest number of replicas.
    """
    room = config.serve.adapters_per_replica
    if kind == "llamacpp" and room is not None:
        raise UserError(
            "llama.cpp restarts whenever its adapters change, so it holds all of them",
            where="serve.adapters_per_replica",
            fix="Remove it, or use the engine peft or vllm.",
        )
    count, largest = config.serve.replicas, largest_number(config.serve.replicas, config.serve.max_replicas)
    if largest == 1 and room is None:
        return start_engine(kind, config, spec, reporter)
    if kind == "vllm":  # it starts with a number of slots
        room = room or max(1, len(spec.adapters) + len(spec.to_come) + spec.spare)
    with ExitStack() as held:
        if largest > 1 and config.compute.cluster is not None:
            starter = hosted_starter(kind, config, spec, largest, reporter, held)
        else:
            starter = _local_starter(kind, config, spec, largest, reporter)
        # llama.cpp's files are written by the first start.
        engines = _start_all(starter, count, spec.adapters, 1 if kind == "llamacpp" else count)
        replicas = Replicas(engines, room=room, held=held.pop_all(), starter=starter)
    try:
        run_async(load_all(replicas, spec.adapters))
    except BaseException:
        replicas.stop()
        raise
    return replicas


def autoscaler_of(engine: Engine, config: Config, reporter: Reporter) -> Autoscaler | None:
    """Return what lets the number of replicas follow the load; None: the number is fixed."""
    smallest, largest = config.serve.replicas, largest_number(config.serve.replicas, config.serve.max_replicas)
    if largest == smallest:
        return None
    assert isinstance(engine, Replicas)
    policy = ScalingPolicy(smallest, largest, config.serve.target_ttft_s)
    return Autoscaler(engine, policy, reporter, config.gateway.total_timeout_s)


def _local_starter(kind: EngineName, config: Config, spec: EngineSpec, largest: int, reporter: Reporter) -> Starter:
    """Return what starts replicas as processes of this machine.

    Raises:
        UserError: there are fewer GPUs than the largest number of replicas.
    """
    least = config.serve.replicas
    where = "serve.replicas" if least == largest else "serve.max_replicas"
    shares = {share.name: share for share in machine_shares(largest, where)}
    one = next(iter(shares.values()))
    each = "one GPU" if _GPUS in one.variables else count_of(one.threads, "thread")
    number = count_of(least, "replica") if least == largest else f"{least} to {largest} replicas"
    reporter.say(f"Loading {named(spec.base, spec.quantization)}: {number} with {each} each")

    def start(name: str, adapters: Mapping[str, Path]) -> Engine:
        started = replica_spec(kind, spec, adapters)
        return start_engine(kind, config, started, _Named(name, reporter), shares[name])

    return Starter(tuple(shares), start)


def _start_all(starter: Starter, count: int, adapters: Mapping[str, Path], together: int) -> dict[str, Engine]:
    """Start the first replicas, some at the same time; if one fails, stop the others."""
    with ThreadPoolExecutor(together) as pool:
        starting = {name: pool.submit(starter.start, name, adapters) for name in starter.names[:count]}
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


def machine_shares(count: int, where: str = "serve.replicas") -> list[Share]:
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
            where=where,
            fix=f"Set it to {found} at most: each replica has one GPU of its own.",
        )
    inherited = os.environ.get(_GPUS, "")
    gpus = inherited.split(",") if inherited else [str(number) for number in range(found)]
    return [Share(name, {_GPUS: gpu.strip()}, 1) for name, gpu in zip(names, gpus, strict=False)]
