"""The engine ``peft`` in a child process: a replica that has its own interpreter, threads and GPU, and may crash."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.engines.child import Child, Plan, socket_in
from tunewright.engines.protocol import PREFILL_TOKENS, EngineStoppedError
from tunewright.serving.engines import peft_worker
from tunewright.serving.engines.host import Event, HostedEngine


@dataclass(frozen=True)
class PeftSettings:
    """Settings of the child.

    Args:
        base: the base's folder.
        architecture: its class in transformers.
        dtype: "bfloat16" or "float32".
        quantization: "none" or "nf4".
        stop_ids, pad_id, max_num_seqs, context_length: see :class:`tunewright.serving.engines.peft.PeftEngine`.
        affixes: see :class:`tunewright.generation.constraints.GrammarCompiler`.
        variables: further environment variables, such as the GPU and the number of threads.
    """

    base: Path
    architecture: str
    dtype: str
    quantization: str
    stop_ids: tuple[int, ...]
    pad_id: int
    max_num_seqs: int
    context_length: int
    affixes: tuple[str, str] = ("", "")
    variables: Mapping[str, str] = field(default_factory=dict)

    def plan(self, folder: Path) -> Plan:
        """Return the plan of a child with this private folder, without any adapter."""
        settings = asdict(self) | {
            "base": str(self.base),
            "socket": str(socket_in(folder)),
            "adapters": str(_listing(folder)),
        }
        del settings["variables"]
        write_json(_listing(folder), {})
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **self.variables}
        command = [sys.executable, "-m", peft_worker.__name__, json.dumps(settings)]
        return Plan("The engine peft", command, variables, peft_worker.METRICS)


class PeftChild(HostedEngine):
    """The embedded engine in a child process, which loads its adapters again when it restarts.

    Nothing is kept from one request to the next, so the tenant makes no difference here.

    Raises:
        UserError: the child failed to start.
    """

    def __init__(self, settings: PeftSettings, reporter: Reporter) -> None:
        self.child = Child(settings.plan, lambda: sum(self.in_flight) > 0, reporter)
        super().__init__(
            "peft",
            _ChildTransport(self.child),
            max_num_seqs=settings.max_num_seqs,
            context_length=settings.context_length,
            prefill_tokens=PREFILL_TOKENS,
        )


class _ChildTransport:
    """The child's socket."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @property
    def failure_reason(self) -> str | None:
        return self._child.failure_reason

    @property
    def given_up(self) -> bool:
        return self._child.given_up

    @property
    def restarts(self) -> int:
        return max(0, self._child.starts - 1)

    async def events(self, method: str, body: Event) -> AsyncGenerator[Event, None]:
        try:
            async with self._child.post(f"/{method}", body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    yield json.loads(line)
        except httpx.HTTPError as error:
            raise EngineStoppedError(self.failure_reason or "The engine peft crashed and is restarting.") from error

    def keep(self, adapters: Mapping[str, Path]) -> None:
        if not self._child.stopping:
            folders = {digest: str(path.absolute()) for digest, path in adapters.items()}
            write_json(_listing(self._child.folder), folders)

    def stop(self) -> None:
        self._child.stop()


def _listing(folder: Path) -> Path:
    """Return the list of adapters that the child loads when it starts."""
    return folder / "adapters.json"
