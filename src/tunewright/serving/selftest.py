"""The isolation test of a base and its adapters, on an engine that is started for it and serves nobody."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from time import monotonic

from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.config import Config, EngineName, Quantize
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.engines.protocol import Engine
from tunewright.models.bases import Base
from tunewright.models.loading import context_length
from tunewright.serving.canaries import Digest, Ids
from tunewright.serving.engines.start import Wanted, max_batch, require_llamacpp, start_engine, tolerance
from tunewright.serving.isolation import LONG, SHORT, VERSION, IsolationResult, check_isolation
from tunewright.serving.state.isolation import IsolationCheck, IsolationTest
from tunewright.training.lineage import packages


@dataclass(frozen=True)
class SelfTest:
    """What is tested: an engine as the server has it, with the base and adapters.

    Args:
        quantize: how the base is held.
        named: folders of the adapters, by what people call them.
        engine: which one.
        spare: how many further adapters it has room for, as the server's.
    """

    config: Config
    base: Base
    chat: ChatFormat
    quantize: Quantize
    named: Mapping[str, Path]
    engine: EngineName
    spare: int
    reporter: Reporter

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The adapters by digest: one is there once under however many names."""
        return {adapter_digest(folder): folder for folder in self.named.values()}

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of the packages that decide numbers, here and in the engine's own environment."""
        own = packages(self.quantize)
        if self.engine == "llamacpp":
            require_llamacpp()
            return {**own, "xllamacpp": version("xllamacpp")}
        if self.engine != "vllm":
            return own
        from tunewright.engines.vllm.environment import find

        return {**own, **{f"vllm:{name}": str(found) for name, found in find().versions.items()}}

    @cached_property
    def device(self) -> str:
        """What computes; an engine's bugs may be one kind's alone."""
        import torch

        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    @cached_property
    def subject(self) -> str:
        """SHA-256 of all that the result depends on."""
        return digest(
            {
                "checks": VERSION,
                "base": self.base.digest,
                "chat": self.chat.digest,
                "quantization": self.quantize,
                "dtype": self.config.train.dtype,
                "adapters": sorted(self.folders),
                "engine": self.engine,
                "max_num_seqs": max_batch(self.engine, self.config),
                "spare": self.spare,
                "versions": self.versions,
                "device": self.device,
                "gguf": self.config.serve.gguf if self.engine == "llamacpp" else None,
                "tolerance": tolerance(self.engine, self.config),
            }
        )

    def run(self, prompts: Sequence[Ids]) -> IsolationResult:
        """Start the engine, test it and end it.

        Args:
            prompts: on which the models differ, the likeliest first.

        Raises:
            UserError: there is no adapter, or the engine is not installed or cannot hold these.
        """
        from tunewright.serving.oracle import PeftOracle

        if not self.folders:
            raise UserError("there is no adapter that could be taken for another model", where="the isolation test")
        names: dict[Digest, str] = {None: self.base.spec}
        names |= {adapter_digest(folder): name for name, folder in self.named.items()}
        oracle = PeftOracle(
            self.base, self.config.train.dtype, self.quantize, self.folders, stop_ids=self.chat.stop_ids
        )
        return check_isolation(
            self._engine,
            oracle,
            self.folders,
            prompts,
            context=context_length(self.base),
            tolerance=tolerance(self.engine, self.config),
            names=names,
            reporter=self.reporter,
            long=LONG if self.engine == "vllm" else SHORT,
        )

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        """The engine while it is asked."""
        wanted = Wanted(self.base, self.chat, self.quantize, self.folders, spare=self.spare)
        engine = start_engine(self.engine, self.config, wanted, self.reporter)
        try:
            yield engine
        finally:
            engine.stop()

    def kept(self, prompts: Sequence[Ids]) -> IsolationTest:
        """Run the test; the result is as a release keeps it."""
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
