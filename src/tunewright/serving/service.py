"""From a config's base and stored adapters to a running server."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.chat.answers import stop_strings
from tunewright.config import Config, Quantize
from tunewright.core.progress import Reporter
from tunewright.models.bases import Base
from tunewright.serving.access import OpenAccess, ServedAdapter
from tunewright.serving.app import Gateway
from tunewright.serving.engines.start import Wanted, start_engine
from tunewright.serving.metrics import exposed
from tunewright.serving.orders import Texts
from tunewright.serving.server import require_free, serve, serving
from tunewright.serving.state import State
from tunewright.serving.tenancy import TenantAccess


@dataclass(frozen=True)
class Tenancy:
    """What a server needs to answer tenants.

    Args:
        state: tenants, keys and releases; the server closes it.
        locate: a released adapter, by its name and digest.
        live: folders of the adapters that are released now, by name.
    """

    state: State
    locate: Callable[[str, str], ServedAdapter]
    live: Mapping[str, Path]


class Service:
    """A base and adapters, loaded and ready to be served.

    Args:
        config: gives engine, precision, addresses, ports and batch.
        quantize: how the base is held.
        served: adapters by the names that everybody may ask for; or the tenants and their releases, whose
            adapters are loaded when the server starts.

    Raises:
        UserError: an address cannot be listened on; the engine is not installed or does not start, or cannot hold the
            base or an adapter.
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        chat: ChatFormat,
        quantize: Quantize,
        served: Mapping[str, ServedAdapter] | Tenancy,
        reporter: Reporter,
    ) -> None:
        adapters = {} if isinstance(served, Tenancy) else served
        digests = {name: adapter_digest(adapter.folder) for name, adapter in adapters.items()}
        self._config = config
        self._reporter = reporter
        # Before the base is loaded, which takes minutes where it is large.
        require_free(config.serve.host, config.serve.port)
        if config.serve.metrics_port is not None:
            require_free(config.serve.metrics_host, config.serve.metrics_port)
        wanted = Wanted(
            base,
            chat,
            quantize,
            # By its digest, an adapter is there once under however many names.
            {digests[name]: adapter.folder for name, adapter in adapters.items()},
            to_come=tuple(served.live.values()) if isinstance(served, Tenancy) else (),
            spare=config.serve.spare_adapters if isinstance(served, Tenancy) else 0,
        )
        self._engine = start_engine(config.serve.engine, config, wanted, reporter)
        if isinstance(served, Tenancy):
            self._access: TenantAccess | OpenAccess = TenantAccess(served.state, self._engine, served.locate, reporter)
        else:
            known = {name: adapter.system_prompt for name, adapter in adapters.items()}
            for name, prompt in known.items():
                prompt.report(name, reporter)
            added = {name: prompt.text for name, prompt in known.items() if prompt.text is not None}
            self._access = OpenAccess({base.spec: None, **digests}, added)
        texts = Texts(chat.prompt, chat.continuation, chat.text, stop_strings(config, chat))
        self.metrics_url: str | None = None
        """Where Prometheus may ask while the server runs."""
        self._gateway = Gateway(self._engine, self._access, texts, config.gateway)

    @property
    def models(self) -> list[str]:
        """What can be asked for by name, by whoever may; of tenants' aliases, those that are live."""
        return self._access.names

    @property
    def system_prompts(self) -> dict[str, str]:
        """What requests without a system message get as one, by model; of tenants' aliases, those that are live."""
        return self._access.system_prompts

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Serve until Ctrl-C or SIGTERM; ``on_ready`` is told the address.

        Raises:
            UserError: the address cannot be listened on.
        """
        try:
            with _settled(), self._exposing():
                serve(
                    self._gateway.app,
                    self._config.serve.host,
                    self._config.serve.port,
                    drain=self._gateway,
                    drain_seconds=self._config.gateway.drain_timeout_s,
                    on_ready=on_ready,
                    say=self._reporter.say,
                )
        finally:
            self._engine.stop()

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in the background while the block runs, which is given the address.

        Raises:
            UserError: the address cannot be listened on.
        """
        try:
            listened = self._config.serve
            with _settled(), self._exposing(), serving(self._gateway.app, listened.host, listened.port) as url:
                yield url
        finally:
            self._engine.stop()

    @contextmanager
    def _exposing(self) -> Iterator[None]:
        config = self._config.serve
        if config.metrics_port is None:
            yield
            return
        with exposed(self._gateway.metrics, config.metrics_host, config.metrics_port) as self.metrics_url:
            yield


@contextmanager
def _settled() -> Iterator[None]:
    """Spare the garbage collector what is there to stay: all that has been imported and loaded.

    Else each full collection goes through those 600,000 objects: a third of a second in which nobody gets a token, and
    the more requests there are the more often.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
