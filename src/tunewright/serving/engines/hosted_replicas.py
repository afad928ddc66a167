"""Replicas on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.compute import open_hosts
from tunewright.config import Config, EngineName
from tunewright.core.progress import LogReporter, Reporter
from tunewright.engines.protocol import EngineStoppedError
from tunewright.models.bases import base_here
from tunewright.serving.engines.host import EngineHost, Event, HostedEngine
from tunewright.serving.engines.replicas import Starter
from tunewright.serving.engines.start import EngineSpec, replica_spec, start_engine

if TYPE_CHECKING:
    from tunewright.compute.hosts import Host


@dataclass(frozen=True)
class _Setting:
    """The engine to start on another machine."""

    kind: EngineName
    config: Config
    spec: EngineSpec


def _make(setting: _Setting) -> EngineHost:
    """Start the engine on this machine, for a gateway on another one.

    Raises:
        UserError: the base is not here, or as for :func:`start_engine`.
    """
    from tunewright.chat.answers import grammar_compiler

    spec = replace(setting.spec, base=base_here(setting.spec.base))
    return EngineHost(
        start_engine(setting.kind, setting.config, spec, LogReporter()), lambda: grammar_compiler(spec.chat)
    )


class _HostTransport:
    """The way to an engine on another machine."""

    given_up = False

    def __init__(self, host: Host) -> None:
        self._host = host
        self._kept: dict[str, Path] = {}
        host.restore = self._restore

    @property
    def failure_reason(self) -> str | None:
        return self._host.failure_reason

    @property
    def restarts(self) -> int:
        return self._host.restarts

    async def events(self, method: str, body: Event) -> AsyncGenerator[Event, None]:
        from tunewright.compute.hosts import HostLostError

        try:
            async with aclosing(self._host.events(method, body)) as events:
                async for event in events:
                    yield event
        except HostLostError as error:
            raise EngineStoppedError(self.failure_reason or str(error)) from error

    def keep(self, adapters: Mapping[str, Path]) -> None:
        self._kept = dict(adapters)

    def stop(self) -> None:
        self._host.stop()

    def _restore(self) -> None:
        """Load the adapters again; requests for one that cannot be loaded are refused."""
        for digest, folder in self._kept.items():
            self._host.call("load", {"digest": digest, "folder": str(folder.absolute())})


def hosted_starter(
    kind: EngineName, config: Config, spec: EngineSpec, largest: int, reporter: Reporter, held: ExitStack
) -> Starter:
    """Return what starts replicas on the machines of the config's cluster.

    Args:
        largest: the largest number of replicas.
        held: disconnects from the cluster.

    Raises:
        UserError: as for :func:`tunewright.compute.open_hosts`.
    """
    serve = config.serve.model_copy(update={"replicas": 1, "max_replicas": None})
    alone = config.model_copy(update={"serve": serve})
    hosts = held.enter_context(open_hosts(config, config.serve.replicas, largest, base_here, spec.base, reporter))

    def start(name: str, adapters: Mapping[str, Path]) -> HostedEngine:
        host = hosts.start(name, _make, _Setting(kind, alone, replica_spec(kind, spec, adapters)))
        (facts,) = host.call("facts")
        return HostedEngine(
            kind,
            _HostTransport(host),
            max_num_seqs=facts["max_num_seqs"],
            context_length=facts["context_length"],
            prefill_tokens=facts["prefill_tokens"],
            unsupported=frozenset(facts["unsupported"]),
        )

    names = tuple(f"replica-{number}" for number in range(1, largest + 1))
    return Starter(names, start, hosts.give_up)
