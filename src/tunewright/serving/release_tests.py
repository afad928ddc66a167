"""Runs the tests of a release on an engine that is started for the tests only, in the server's configuration."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any, get_args

import torch

from tunewright.adapters.lineage import packages
from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter, adapter_digest
from tunewright.config import Config, EngineName, Quantization
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.engines.environment import VLLM, find
from tunewright.engines.pool import engines_at
from tunewright.engines.protocol import AdapterFailedError, Engine, EngineStoppedError
from tunewright.engines.remote import EngineFacts
from tunewright.export.merge import write_merged
from tunewright.export.weights import Weights, read_deltas, trained_dtype
from tunewright.gate import isolation
from tunewright.gate.answers import Digest, Ids, PeftReference, ReferenceAnswer
from tunewright.gate.prompts import Probe
from tunewright.gate.results import IsolationResult, IsolationTest, ServingCheck
from tunewright.gate.serving_check import LOST, NOISE, WRONG, ServingComparison, shortcomings
from tunewright.models.bases import Base
from tunewright.models.loading import context_length
from tunewright.models.memory_plan import gigabytes
from tunewright.open_project import OpenProject
from tunewright.serving.engine_start import EngineSpec, max_num_seqs, require_llamacpp, start_engine

SERVING_CHECK_VERSION = 1
"""The version of the serving check; a result of an earlier version does not count."""
_LORA_B = ".lora_B."


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine in the server's configuration.

    Args:
        config: the project's, with the only address of an engine.
        remote: the facts that the engine at the config's only address reports; None means that one is started here.
    """

    project: OpenProject
    config: Config
    quantization: Quantization
    kind: EngineName
    remote: EngineFacts | None = None

    @property
    def title(self) -> str:
        """Its kind, and its address if it has one."""
        return f"{self.kind} at {self.config.serve.engines[0]}" if self.remote else self.kind

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that affect the numbers, here and in the engine's environment."""
        own = packages(self.quantization)
        if self.remote is not None:
            return {**own, **{f"engine:{name}": found for name, found in self.remote.versions.items()}}
        if self.kind == "llamacpp":
            require_llamacpp()
            return {**own, "xllamacpp": version("xllamacpp")}
        if self.kind != "vllm":
            return own
        return {**own, **{f"vllm:{name}": str(found) for name, found in find(VLLM).versions.items()}}

    @cached_property
    def device(self) -> str:
        """The GPU or kind of processor; a bug may occur on one of them only."""
        if self.remote is not None:
            return self.remote.device
        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    @property
    def precision(self) -> str:
        """The precision of the engine's arithmetic."""
        if self.remote is not None:
            return self.remote.precision
        return self.config.serve.gguf if self.kind == "llamacpp" else self.config.train.dtype

    @property
    def tolerance(self) -> float:
        """Nats by which a correct token may fall short, by the lower of the two precisions compared."""
        return max(isolation.TOLERANCE[self.precision], isolation.TOLERANCE[self.config.train.dtype])

    def subject(self, **own: Any) -> str:
        """Return the SHA-256 of everything that a test's result depends on: the engine, the base and ``own``."""
        return digest(
            {
                "base": self.project.base.digest,
                "chat": self.project.chat.digest,
                "quantization": self.quantization,
                "dtype": self.config.train.dtype,
                "engine": self.kind,
                "max_num_seqs": self.remote.max_num_seqs if self.remote else max_num_seqs(self.kind, self.config),
                "versions": self.versions,
                "device": self.device,
                **own,
            }
        )

    def reference(self, folders: Mapping[str, Path]) -> PeftReference:
        """Return the reference for adapters by digest. Reference and engine are never in memory together."""
        return PeftReference(
            self.project.base, self.config.train.dtype, self.quantization, folders, stop_ids=self.project.chat.stop_ids
        )

    @contextmanager
    def started(self, adapters: Mapping[str, Path], *, spare: int = 0, merged: Base | None = None) -> Iterator[Engine]:
        """Start the engine, and stop it after the block.

        Args:
            adapters: folders of the adapters by digest.
            spare: the number of further adapters to reserve room for.
            merged: the model in place of the base, in 16 bits.
        """
        project, held = self.project, self.quantization if merged is None else "none"
        spec = EngineSpec(merged or project.base, project.chat, held, adapters, spare=spare)
        try:
            engine = start_engine(self.kind, self.config, spec, project.reporter)
            try:
                yield engine
            finally:
                engine.stop()
        except (EngineStoppedError, AdapterFailedError) as error:
            raise UserError(
                f"The engine {self.title} failed during the test: {error}",
                fix="Read its log, and run the command again.",
            ) from error


def engines_under_test(project: OpenProject, quantization: Quantization, kind: EngineName) -> list[EngineUnderTest]:
    """Return the engine that the config starts, or each one at an address of ``serve.engines``."""
    config = project.folder.config
    if not config.serve.engines:
        return [EngineUnderTest(project, config, quantization, kind)]
    found = engines_at(config.serve.engines, project.base.digest, quantization, project.reporter)
    kinds: dict[str, EngineName] = {each: each for each in get_args(EngineName)}
    each = {
        url: config.model_copy(update={"serve": config.serve.model_copy(update={"engines": (url,)})}) for url in found
    }
    return [
        EngineUnderTest(project, each[url], quantization, kinds[facts.engine], facts) for url, facts in found.items()
    ]


@dataclass(frozen=True)
class IsolationRunner:
    """The isolation test of an engine with adapters."""

    on: EngineUnderTest
    named: Mapping[str, Path]
    spare: int

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The adapters by digest; an adapter with several names is in it once."""
        return {adapter_digest(folder): folder for folder in self.named.values()}

    @cached_property
    def subject(self) -> str:
        """The SHA-256 of everything the result depends on."""
        return self.on.subject(
            checks=isolation.VERSION,
            adapters=sorted(self.folders),
            spare=self.spare,
            gguf=self.on.config.serve.gguf if self.on.kind == "llamacpp" else None,
            tolerance=self.on.tolerance,
        )

    def run(self, prompts: Sequence[Ids]) -> IsolationResult:
        """Start the engine, test it, and stop it."""
        if not self.folders:
            raise UserError("The isolation test needs at least one adapter")
        on = self.on
        names: dict[Digest, str] = {None: on.project.base.spec}
        names |= {adapter_digest(folder): name for name, folder in self.named.items()}
        return isolation.check_isolation(
            lambda: on.started(self.folders, spare=self.spare),
            on.reference(self.folders),
            self.folders,
            prompts,
            context=context_length(on.project.base),
            tolerance=on.tolerance,
            names=names,
            reporter=on.project.reporter,
            long=isolation.LONG if on.kind == "vllm" else isolation.SHORT,
        )

    def record(self, prompts: Sequence[Ids]) -> IsolationTest:
        """Run the test, and return its result in the form that is stored with a release."""
        began = monotonic()
        result = self.run(prompts)
        seconds = round(monotonic() - began, 1)
        return IsolationTest(
            verdict=result.verdict,
            subject=self.subject,
            engine=self.on.kind,
            device=self.on.device,
            base=self.on.project.base.digest,
            adapters=tuple(sorted(self.folders)),
            versions=self.on.versions,
            tolerance=result.tolerance,
            checks=result.checks,
            alike=result.alike,
            reasons=result.reasons,
            tested=now(),
            seconds=seconds,
        )


@dataclass(frozen=True)
class ServingCheckRunner:
    """The serving check of one adapter."""

    on: EngineUnderTest
    adapter: Adapter
    probe: Probe

    @cached_property
    def subject(self) -> str:
        """The SHA-256 of everything the result depends on."""
        return self.on.subject(
            check=SERVING_CHECK_VERSION,
            adapter=self.adapter.digest,
            precision=self.on.precision,
            limits=[NOISE, LOST, WRONG, self.on.tolerance],
            prompts=[list(prompt) for prompt in self.probe.prompts],
            max_new_tokens=self.probe.limit,
            stop=self.probe.stop,
        )

    def run(self) -> ServingCheck:
        """Have PEFT answer, then the engine; return the figures."""
        began = monotonic()
        on, own = self.on, self.adapter.digest
        chat, reporter = on.project.chat, on.project.reporter
        compare = ServingComparison(self.probe, chat, on.precision, on.tolerance, on.config.seed, reporter)
        trained, base = self._reference()
        with tempfile.TemporaryDirectory(prefix="tunewright-check-") as temporary:
            asked: dict[Digest, list[ReferenceAnswer]] = {own: trained}
            folders = {own: self.adapter.folder}
            if on.remote is None:
                identity = write_identity(self.adapter.folder, Path(temporary) / "identity")
                asked[adapter_digest(identity)] = base
                folders[adapter_digest(identity)] = identity
            with on.started(folders) as engine:
                answers, *zero = compare.ask(engine, asked)
            figures = [compare.figures("adapter", trained, answers)]
            figures += [compare.figures("identity", base, each) for each in zero]
            left_out = self._no_merge(Path(temporary))
            if left_out is None:
                merged = self._merged(Path(temporary) / "merged")
                with on.started({}, merged=merged) as engine:
                    (answers,) = compare.ask(engine, {None: trained})
                figures.append(compare.figures("merged", trained, answers))
        return ServingCheck(
            subject=self.subject,
            engine=on.kind,
            device=on.device,
            base=on.project.base.digest,
            adapter=own,
            versions=on.versions,
            tolerance=on.tolerance,
            figures=tuple(figures),
            left_out=left_out,
            reasons=shortcomings(figures),
            checked=now(),
            seconds=round(monotonic() - began, 1),
        )

    def _reference(self) -> tuple[list[ReferenceAnswer], list[ReferenceAnswer]]:
        """Return the answers of the adapter and of the base under PEFT."""
        own, chat = self.adapter.digest, self.on.project.chat
        reference = self.on.reference({own: self.adapter.folder})
        with self.on.project.reporter.task(
            "The trained model's answers", 2 * len(self.probe.prompts), "answers"
        ) as task:
            trained, base = (reference.measured(model, self.probe, chat, task.advance) for model in (own, None))
        reference.unload()
        return trained, base

    def _no_merge(self, temporary: Path) -> str | None:
        """Return why the merged model is not served; None if it is."""
        if self.on.remote is not None:
            return "an engine at an address serves stored adapters only, so neither is an adapter that changes nothing"
        if self.on.kind == "llamacpp":
            return "llama.cpp would first have to convert the merged model"
        try:
            read_deltas(self.adapter.folder)
        except UserError as error:
            return error.what
        size = sum((self.on.project.base.folder / name).stat().st_size for name in self._weights.base.files)
        free = shutil.disk_usage(temporary).free
        if free < 1.1 * size:
            return f"it needs {gigabytes(size)} in {temporary.parent}, where {gigabytes(free)} are free"
        return None

    @cached_property
    def _weights(self) -> Weights:
        dequantized = self.on.quantization == "nf4"
        deltas = read_deltas(self.adapter.folder)
        return Weights(self.on.project.base, trained_dtype(self.adapter), deltas, dequantized=dequantized)

    def _merged(self, folder: Path) -> Base:
        """Write the merged model into a folder, and return it as a base."""
        folder.mkdir()
        base = self.on.project.base
        write_merged(folder, self._weights, base, self.on.project.chat, None, self.on.project.reporter)
        # The digest of a model that nothing refers to is not needed.
        return replace(base, spec=f"{base.spec} merged with {self.adapter.name}", folder=folder, commit=None, files={})


def write_identity(adapter: Path, folder: Path) -> Path:
    """Write an adapter of the same shape that changes nothing: LoRA's B is zero, as before training."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    weights = load_file(adapter / WEIGHTS)
    zero = {name: torch.zeros_like(value) if _LORA_B in name else value for name, value in weights.items()}
    save_file(zero, folder / WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    return folder
