"""The choice of the engine that computes the answers of an evaluation and the base's self-samples.

On a cluster, install the same vLLM environment on every machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright.adapters.lora_weights import CONFIG, planned_config, vllm_refusals
from tunewright.config import Config, Quantization
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.processes import run
from tunewright.core.progress import Reporter
from tunewright.core.workers import ModelWorkers, on_machine
from tunewright.engines import environment
from tunewright.engines.environment import VLLM, Build, Environment
from tunewright.engines.vllm.answers import VllmAnswers
from tunewright.models.bases import Base
from tunewright.models.loading import device

_WHERE = "evaluate.engine"
_CARDS = """
import torch
print(min(torch.cuda.get_device_properties(card).total_memory for card in range(torch.cuda.device_count())))
"""
_failed: dict[Path, str] = {}
"""Why vLLM did not start in this process, by the file that a start would have written."""


@dataclass(frozen=True)
class AnswerEngine:
    """The engine of an evaluation.

    One engine answers every arm. With two engines, a contrast would mistake their difference for a
    difference between the arms.

    Args:
        name: "peft" is the embedded loop on transformers and peft.
        why: the reason, for display.
        environment: vLLM's environment; None with peft. Its folder is another machine's if a cluster answers.
        card: bytes of the GPU that decides how many rows decode at once; None means this process's GPU, or no GPU.
    """

    name: Literal["peft", "vllm"]
    why: str
    environment: Environment | None = None
    card: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The engine's part in the digest of everything that depends on answers.

        It is empty with peft, so that answers and evidence of older versions, which had no other engine, keep their
        digests.
        """
        return {} if self.name == "peft" else {"engine": self.name}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages in vLLM's environment; empty with peft."""
        if self.environment is None:
            return {}
        return {name: str(self.environment.versions[name]) for name in ("vllm", "torch")}


EMBEDDED = AnswerEngine("peft", "it is built in")


def answer_engine(
    config: Config,
    quantization: Quantization,
    *,
    adapter: Path | None = None,
    constrained: bool = False,
    workers: ModelWorkers | None = None,
    start_on: tuple[Base, Reporter] | None = None,
) -> AnswerEngine:
    """Choose the engine by ``evaluate.engine``: ``auto`` takes vLLM if its CUDA build is installed and starts on a GPU.

    On a cluster it takes vLLM if its workers have CUDA cards, and every machine has the CUDA build in one version.

    Args:
        config: names the engine, and the adapters that will be trained.
        quantization: the precision of the base's weights.
        adapter: folder of the adapter that will answer; None: the config will train it, or the base answers.
        constrained: some answers must match a grammar.
        workers: a cluster's workers, which answer; None means that this machine answers.
        start_on: a base on which ``auto`` starts vLLM the first time, with the receiver of messages; None: no trial.
    """
    chosen = config.evaluate.engine
    if chosen == "peft":
        return AnswerEngine("peft", f"{_WHERE} says so")
    obstacle = _obstacle(config, quantization, adapter, constrained=constrained)
    if chosen == "vllm":
        if obstacle is not None:
            raise UserError(f"vLLM cannot answer here: {obstacle}", where=_WHERE, fix="Set it to auto or peft.")
        return _vllm(f"{_WHERE} says so", workers)
    if (device() if workers is None else workers.device) == "cpu":
        return AnswerEngine("peft", "there is no CUDA card")
    if obstacle is not None:
        return AnswerEngine("peft", obstacle)
    found = "vLLM is installed for the CUDA card"
    try:
        there = _vllm(found, workers) if workers else AnswerEngine("vllm", found, environment.find(VLLM, "cuda"))
    except UserError as error:
        if workers is not None:
            return AnswerEngine("peft", f"vLLM cannot answer on every machine ({error.what})")
        return AnswerEngine("peft", "vLLM is not installed with CUDA (`tunewright engine install vllm` does that)")
    why = _start_failure(there.environment, config, *start_on) if start_on and not workers else None
    return there if why is None else AnswerEngine("peft", why)


def _start_failure(there: Environment | None, config: Config, base: Base, reporter: Reporter) -> str | None:
    """Return why vLLM does not start on this base; None if it does or once did.

    It is tried before the first answer: digests and the access log name the engine earlier.
    """
    started = environment.default_folder(VLLM, "cuda").with_suffix(".started") / base.digest
    if started.exists() or started in _failed:
        return _failed.get(started)
    assert there is not None
    rows, rank = config.evaluate.batch_size, config.train.lora_r
    vllm = VllmAnswers(base, config.train.dtype, there, rows, rank, reporter)
    try:
        vllm.generate((), stop_ids=())
    except UserError as error:
        reporter.warn(f"{error.what}\npeft computes the answers instead, because {_WHERE} is auto.")
        _failed[started] = error.what.splitlines()[0].removesuffix(". The end of its log:")
    else:
        write_text(started, "")
    finally:
        vllm.stop()
    return _failed.get(started)


def _vllm(why: str, workers: ModelWorkers | None) -> AnswerEngine:
    if workers is None:
        try:
            return AnswerEngine("vllm", why, environment.find(VLLM))
        except UserError as error:
            fix = "`tunewright engine install vllm`, or set it to peft."
            raise UserError(error.what, where=_WHERE, fix=fix) from None
    found = vllm_of(workers)
    return AnswerEngine("vllm", why, found.environment, found.card)


def _obstacle(config: Config, quantization: Quantization, adapter: Path | None, *, constrained: bool) -> str | None:
    """Return why vLLM cannot answer as the embedded loop would; None if it can."""
    if quantization == "nf4":
        return "the base is held in NF4, and vLLM would hold it in 16 bits, which is another model"
    if constrained:
        return (
            "evaluate.structured_outputs takes the embedded loop, and vLLM has another release of the grammar library"
        )
    if adapter is not None:
        model_config: Mapping[str, Any] = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    else:
        model_config = planned_config(config.train)
    refused = list(vllm_refusals(model_config).values())
    return f"vLLM does not load {', '.join(refused)}" if refused else None


@dataclass(frozen=True)
class MachineVllm:
    """vLLM's environment on a machine."""

    environment: Environment
    card: int | None


def vllm_of(workers: ModelWorkers) -> MachineVllm:
    """Return the environment that every machine of a cluster has, with the bytes of the smallest GPU."""
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
    """Return this machine's vLLM."""
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
    """Check that a machine has the same versions as another machine."""
    ours, theirs = _versions(expected.versions), _versions(found.versions)
    if ours != theirs:
        fix = "Run `tunewright engine install vllm` with the same tunewright on each machine, or set it to peft."
        raise UserError(f"Its vLLM differs from another machine's: {theirs} (there {ours})", where=_WHERE, fix=fix)


def _versions(versions: Mapping[str, str]) -> str:
    return " with ".join(f"{name} {versions[name]}" for name in ("vllm", "torch"))


def _smallest_card() -> int:
    """Return the bytes of this machine's smallest GPU.

    Another process asks: Ray hides the GPUs from this process, which would keep some of their memory.
    """
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    asked = run([sys.executable, "-c", _CARDS], env=variables)
    if asked.code != 0:
        fix = "Install torch for its GPUs there, or start Ray there with --num-gpus 0."
        raise UserError("torch finds no CUDA card, and Ray has GPUs", where="compute.cluster", fix=fix)
    return int(asked.stdout)
