"""Assembles a server from the config's base and the stored adapters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.chat.answers import grammar_compiler, stop_strings
from tunewright.config import Config, Quantization
from tunewright.core.progress import Reporter
from tunewright.models.bases import Base
from tunewright.serving.engines.start import EngineSpec, start_engine
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth, ServedAdapter, constraint_text
from tunewright.serving.gateway.metrics import exposed
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import require_free, serve, serving
from tunewright.serving.gateway.tenant_auth import TenantAuth
from tunewright.serving.tenants import State


@dataclass(frozen=True)
class TenantSource:
    """The tenants and their releases, as the source of a server's models.

    Args:
        state: tenants, keys and releases; the server closes it.
        locate: returns a released adapter by its name and digest.
        live: folders of the adapters with a live release, by name.
    """

    state: State
    locate: Callable[[str, str], ServedAdapter]
    live: Mapping[str, Path]


class Service:
    """A base and adapters, loaded and ready to serve.

    Args:
        config: sets engine, precision, addresses, ports and batch.
        quantization: the precision of the base's weights.
        served: adapters by model name, for every client; or the tenants with their releases, whose adapters are loaded
            when the server starts.

    Raises:
        UserError: the server cannot listen on an address; or the engine is not installed, does not start, or cannot
            hold the base or an adapter.
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        chat: ChatFormat,
        quantization: Quantization,
        served: Mapping[str, ServedAdapter] | TenantSource,
        reporter: Reporter,
    ) -> None:
        adapters = {} if isinstance(served, TenantSource) else served
        digests = {name: adapter_digest(adapter.folder) for name, adapter in adapters.items()}
        self._config = config
        self._reporter = reporter
        # Before the base is loaded, which takes minutes if it is large.
        require_free(config.serve.host, config.serve.port)
        if config.serve.metrics_port is not None:
            require_free(config.serve.metrics_host, config.serve.metrics_port)
        spec = EngineSpec(
            base,
            chat,
            quantization,
            # One adapter under several names is loaded once.
            {digests[name]: adapter.folder for name, adapter in adapters.items()},
            to_come=tuple(served.live.values()) if isinstance(served, TenantSource) else (),
            spare=config.serve.spare_adapters if isinstance(served, TenantSource) else 0,
        )
        self._engine = start_engine(config.serve.engine, config, spec, reporter)
        if isinstance(served, TenantSource):
            self._auth: TenantAuth | AnonymousAuth = TenantAuth(served.state, self._engine, served.locate, reporter)
        else:
            prompts = {name: adapter.system_prompt for name, adapter in adapters.items()}
            for name, prompt in prompts.items():
                prompt.report(name, reporter)
            added = {name: prompt.text for name, prompt in prompts.items() if prompt.text is not None}
            grammars = {name: adapter.grammar for name, adapter in adapters.items() if adapter.grammar is not None}
            for name, grammar in grammars.items():
                reporter.say(f"{name}: {constraint_text(grammar)}")
            self._auth = AnonymousAuth({base.spec: None, **digests}, added, grammars)
        tokenization = Tokenization(
            chat.prompt, chat.continuation, chat.text, grammar_compiler(chat), stop_strings(config, chat), chat
        )
        self.metrics_url: str | None = None
        """The address of the metrics while the server runs."""
        self._gateway = Gateway(self._engine, self._auth, tokenization, config.gateway)

    @property
    def models(self) -> list[str]:
        """The names of all models; with tenants, the aliases with a live release."""
        return self._auth.names

    @property
    def system_prompts(self) -> dict[str, str]:
        """The system messages added to requests without one, by model."""
        return self._auth.system_prompts

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Serve until Ctrl-C or SIGTERM; ``on_ready`` is called with the address.

        Raises:
            UserError: the server cannot listen on the address.
        """
        try:
            with _frozen_heap(), self._serving_metrics():
                serve(
                    self._gateway.app,
                    self._config.serve.host,
                    self._config.serve.port,
                    self._config.gateway,
                    drain=self._gateway,
                    on_ready=on_ready,
                    say=self._reporter.say,
                )
        finally:
            self._engine.stop()

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in the background while the block runs, and yield the address.

        Raises:
            UserError: the server cannot listen on the address.
        """
        try:
            listened = self._config.serve
            with (
                _frozen_heap(),
                self._serving_metrics(),
                serving(self._gateway.app, listened.host, listened.port, self._config.gateway) as url,
            ):
                yield url
        finally:
            self._engine.stop()

    @contextmanager
    def _serving_metrics(self) -> Iterator[None]:
        config = self._config.serve
        if config.metrics_port is None:
            yield
            return
        with exposed(self._gateway.metrics, config.metrics_host, config.metrics_port) as self.metrics_url:
            yield


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Exempt everything imported and loaded so far from garbage collection.

    Otherwise each full collection visits those 600,000 objects. That takes a third of a second, in which no request
    gets a token, and happens more often with more requests (docs/decisions/0023).
    """
    others = gc.get_freeze_count() > 0  # another server in this process, which may serve on when this one stops
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not others:
            gc.unfreeze()
