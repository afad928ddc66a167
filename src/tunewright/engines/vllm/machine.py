"""vLLM on the machines of a cluster: every one needs an equal environment, each in its own folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tunewright.core.errors import UserError
from tunewright.core.processes import run
from tunewright.core.workers import ModelWorkers, on_machine
from tunewright.engines import environment
from tunewright.engines.environment import VLLM, Build, Environment

_WHERE = "evaluate.engine"
_CARDS = """
import torch
print(min(torch.cuda.get_device_properties(card).total_memory for card in range(torch.cuda.device_count())))
"""


@dataclass(frozen=True)
class MachineVllm:
    """vLLM's environment on a machine.

    Args:
        environment: its environment.
        card: bytes of the machine's smallest GPU; None with the build for the CPU.
    """

    environment: Environment
    card: int | None


def vllm_of(workers: ModelWorkers) -> MachineVllm:
    """Return the environment that every machine of a cluster has, with the bytes of the smallest GPU of all machines.

    Raises:
        UserError: a machine has no vLLM for the workers' device, another version, or a GPU that torch cannot use.
    """
    build: Build = workers.device
    answers = workers.ask(vllm_here, build)
    expected = answers[0][1].environment
    for host, found in answers:
        try:
            require_equal(expected, found.environment)
        except UserError as error:
            raise on_machine(host, error) from None
    cards = [found.card for _, found in answers if found.card is not None]
    return MachineVllm(expected, min(cards, default=None))


def vllm_here(build: Build) -> MachineVllm:
    """Return this machine's vLLM.

    Raises:
        UserError: this build is not installed, or torch cannot use a GPU that it needs.
    """
    try:
        found = environment.find(VLLM, build)
    except UserError:
        missing = {
            "cpu": "vLLM is not installed for the CPU, and the cluster has no GPU",
            "cuda": "vLLM is not installed for CUDA",
        }
        fix = f"`tunewright engine install vllm --build {build}` on each machine, or set it to peft."
        raise UserError(missing[build], where=_WHERE, fix=fix) from None
    return MachineVllm(found, _smallest_card() if build == "cuda" else None)


def require_equal(expected: Environment, found: Environment) -> None:
    """Check that a machine has the versions of another one.

    Raises:
        UserError: they differ.
    """
    ours, theirs = _versions(expected.versions), _versions(found.versions)
    if ours != theirs:
        fix = "Run `tunewright engine install vllm` with the same tunewright on each machine, or set it to peft."
        raise UserError(f"Its vLLM differs from another machine's: {theirs} (there {ours})", where=_WHERE, fix=fix)


def _versions(versions: Mapping[str, str]) -> str:
    return " with ".join(f"{name} {versions[name]}" for name in ("vllm", "torch"))


def _smallest_card() -> int:
    """Return the bytes of this machine's smallest GPU.

    Another process asks: Ray hides the GPUs from this one, which would keep some of their memory.
    """
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    asked = run([sys.executable, "-c", _CARDS], env=variables)
    if asked.code != 0:
        fix = "Install torch for its GPUs there, or start Ray there with --num-gpus 0."
        raise UserError("torch finds no CUDA card, and Ray has GPUs", where="compute.cluster", fix=fix)
    return int(asked.stdout)
