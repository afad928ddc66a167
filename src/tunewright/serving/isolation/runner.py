"""Runs the isolation test of a base and its adapters on an engine that is started for the test only."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from time import monotonic

from tunewright.adapters.lineage import packages
from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.config import Config, EngineName, Quantization
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.engines.protocol import Engine
from tunewright.models.bases import Base
from tunewright.models.loading import context_length
from tunewright.serving.engines.start import EngineSpec, max_num_seqs, require_llamacpp
from tunewright.serving.engines.start_replicas import start_engines
from tunewright.serving.isolation.checks import LONG, SHORT, TOLERANCE, VERSION, check_isolation
from tunewright.serving.isolation.probes import Digest, Ids
from tunewright.serving.isolation.result import IsolationResult
from tunewright.serving.tenants.release_record import IsolationCheck, IsolationTest


@dataclass(frozen=True)
class IsolationRunner:
    """The test of an engine in the server's configuration, with a base and adapters.

    Args:
        quantization: the precision of the base's weights.
        named: folders of the adapters by name.
        engine: the kind of engine.
        spare: the number of further adapters that the server reserves room for.
    """

    config: Config
    base: Base
    chat: ChatFormat
    quantization: Quantization
    named: Mapping[str, Path]
    engine: EngineName
    spare: int
    reporter: Reporter

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The adapters by digest; an adapter with several names is in it once."""
        return {adapter_digest(folder): folder for folder in self.named.values()}

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that affect the numbers, here and in the engine's environment."""
        own = packages(self.quantization)
        if self.engine == "llamacpp":
            require_llamacpp()
            return {**own, "xllamacpp": version("xllamacpp")}
        if self.engine != "vllm":
            return own
        from tunewright.engines.environment import VLLM, find

        return {**own, **{f"vllm:{name}": str(found) for name, found in find(VLLM).versions.items()}}

    @cached_property
    def device(self) -> str:
        """The GPU or kind of processor; a bug may occur on one of them only."""
        import torch

        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    @cached_property
    def subject(self) -> str:
        """The SHA-256 of everything the result depends on."""
        return digest(
            {
                "checks": VERSION,
                "base": self.base.digest,
                "chat": self.chat.digest,
                "quantization": self.quantization,
                "dtype": self.config.train.dtype,
                "adapters": sorted(self.folders),
                "engine": self.engine,
                "max_num_seqs": max_num_seqs(self.engine, self.config),
                "spare": self.spare,
                "versions": self.versions,
                "device": self.device,
                "gguf": self.config.serve.gguf if self.engine == "llamacpp" else None,
                "tolerance": _tolerance(self.engine, self.config),
            }
        )

    def run(self, prompts: Sequence[Ids]) -> IsolationResult:
        """Start the engine, test it, and stop it.

        Args:
            prompts: prompts on which the models differ, the most promising first.

        Raises:
            UserError: there is no adapter, or the engine is not installed or cannot hold these adapters.
        """
        from tunewright.serving.isolation.reference import PeftReference

        if not self.folders:
            raise UserError("The isolation test needs at least one adapter")
        names: dict[Digest, str] = {None: self.base.spec}
        names |= {adapter_digest(folder): name for name, folder in self.named.items()}
        reference = PeftReference(
            self.base, self.config.train.dtype, self.quantization, self.folders, stop_ids=self.chat.stop_ids
        )
        return check_isolation(
            self._engine,
            reference,
            self.folders,
            prompts,
            context=context_length(self.base),
            tolerance=_tolerance(self.engine, self.config),
            names=names,
            reporter=self.reporter,
            long=LONG if self.engine == "vllm" else SHORT,
        )

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        """Start the engine, and stop it after the block."""
        spec = EngineSpec(self.base, self.chat, self.quantization, self.folders, spare=self.spare)
        engine = start_engines(self.engine, self.config, spec, self.reporter)
        try:
            yield engine
        finally:
            engine.stop()

    def record(self, prompts: Sequence[Ids]) -> IsolationTest:
        """Run the test, and return its result in the form that is stored with a release."""
        began = monotonic()
        result = self.run(prompts)
        seconds = round(monotonic() - began, 1)
        checks = tuple(IsolationCheck(c.name, c.asked, c.wrong, round(c.worst, 4)) for c in result.checks)
        return IsolationTest(
            verdict=result.verdict,
            subject=self.subject,
            engine=self.engine,
            device=self.device,
            base=self.base.digest,
            adapters=tuple(sorted(self.folders)),
            versions=self.versions,
            tolerance=result.tolerance,
            checks=checks,
            alike=result.alike,
            reasons=result.reasons,
            tested=now(),
            seconds=seconds,
        )


def _tolerance(kind: EngineName, config: Config) -> float:
    """Return the isolation test's tolerance for an engine in nats, by the lower of the two precisions compared."""
    own = TOLERANCE[config.train.dtype]
    return max(own, TOLERANCE[config.serve.gguf]) if kind == "llamacpp" else own
