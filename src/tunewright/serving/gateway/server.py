"""Assembles a server from a base and adapters, and runs it: until Ctrl-C, or in the background for a ``with`` block."""

from __future__ import annotations

import gc
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.chat.answers import grammar_compiler, stop_strings
from tunewright.config import Config, GatewayConfig, Quantization
from tunewright.core.errors import UserError
from tunewright.core.interrupts import leave_signals_to_server
from tunewright.core.progress import Reporter
from tunewright.models.bases import Base
from tunewright.serving.engine_start import EngineSpec, start_engine
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth, ServedAdapter, constraint_text
from tunewright.serving.gateway.connections import BoundedHttpProtocol, ConnectionState
from tunewright.serving.gateway.metrics import exposed
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.tenant_auth import Auth, TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile

_DEFAULT_LIMITS = GatewayConfig()
_FLUSH_SECONDS = 5
"""Time for clients to read the error that ends their request."""


def serve(
    app: Starlette,
    host: str,
    port: int,
    limits: GatewayConfig,
    *,
    drain: Gateway | None = None,
    on_ready: Callable[[str], None] = lambda _url: None,
    say: Callable[[str], None] = lambda _message: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish the requests in progress. Call it from the main thread.

    Args:
        limits: the number of connections, their timeouts, and how long requests in progress may
            take to finish; a second signal ends them immediately.
        drain: refuses further requests during the shutdown. The server keeps listening until no
            request is left, so that clients get an error with a reason, and not a refused connection.
        on_ready: called with the server's address once it accepts connections.
        say: called with messages about the shutdown.
    """
    listener = _listen(host, port)
    server = _Server(app, limits, lambda: on_ready(_url(listener)), drain, say)
    # uvicorn has shut down in good order and hands the signal on.
    with leave_signals_to_server(), suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        raise RuntimeError("the server stopped before it was ready; see its log")
    say("Stopped.")


@contextmanager
def serving(
    app: Starlette, host: str = "127.0.0.1", port: int = 0, limits: GatewayConfig = _DEFAULT_LIMITS
) -> Iterator[str]:
    """Serve in a thread while the block runs, and yield the server's address; port 0 picks a free one."""
    listener = _listen(host, port)
    ready = threading.Event()
    server = _Server(app, limits, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="tunewright-server", daemon=True)
    thread.start()
    while not ready.wait(0.1):
        if not thread.is_alive():
            raise RuntimeError("the server stopped before it was ready; see its log")
    try:
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    """uvicorn's server with bounded connections, a callback when it is ready, and draining before it closes."""

    def __init__(
        self,
        app: Starlette,
        limits: GatewayConfig,
        on_ready: Callable[[], None],
        drain: Gateway | None = None,
        say: Callable[[str], None] = lambda _message: None,
    ) -> None:
        connections = ConnectionState(limits)
        config = uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            ws="none",
            log_config=None,
            lifespan="on",
            backlog=connections.backlog,
            timeout_graceful_shutdown=math.ceil(limits.drain_timeout_s) if drain is None else _FLUSH_SECONDS,
        )
        super().__init__(config)
        self.server_state = self._connections = connections
        self._on_ready = on_ready
        self._drain = drain
        self._drain_seconds = limits.drain_timeout_s
        self._until: float | None = None
        self._say = say
        self._announced = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is None or not self.started or self.should_exit:
            super().handle_exit(sig, frame)
            return
        # uvicorn would re-raise the signal after its shutdown; this one has been handled.
        if self._until is None:
            self._drain.drain()
            self._until = time.monotonic() + self._drain_seconds
        else:
            self._until = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        self._connections.report()
        if self._drain is not None and self._until is not None:
            count = self._drain.in_flight
            in_flight = "1 request" if count == 1 else f"{count} requests"
            if not self._announced:  # written here, since the signal handler may interrupt another write
                self._say(
                    f"Stopping: refusing new requests and waiting up to {self._drain_seconds:g} s for {in_flight}."
                )
                self._announced = True
            if not self._drain.in_flight:
                self.should_exit = True
            elif time.monotonic() >= self._until and not self.should_exit:
                self._say(f"Timed out: aborting {in_flight}.")
                self._drain.abort()
                self.should_exit = True
        return await super().on_tick(counter)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
        # Accepted connections inherit this option. asyncio sets it only for sockets that name their
        # protocol, and these sockets do not. Without it a token waits until the client has
        # acknowledged the previous token, for up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while attempting")[0]  # Python repeats the address
        raise UserError(
            f"Cannot listen on {host} port {port}: {reason}",
            fix="Choose another address or port (0 takes a free one), or stop the program that uses it.",
        ) from error


def require_free(host: str, port: int) -> None:
    """Check that the server can listen on an address, before any slow work."""
    _listen(host, port).close()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


@dataclass(frozen=True)
class TenantSource:
    """The tenants and their releases, as the source of a server's models."""

    state: State
    locate: Callable[[str, str], ServedAdapter]
    live: Mapping[str, Path]
    record_key: KeyFile | None = None
    """The key of recorded requests; None: no request is recorded."""


class Service:
    """A base and adapters, loaded and ready to serve.

    Args:
        served: adapters by model name, for every client; or the tenants with their releases, whose adapters are loaded
            when the server starts.
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
            self._auth: Auth = TenantAuth(served.state, self._engine, served.locate, reporter, served.record_key)
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
        return [each.alias for each in self._auth.released if each.role == "live"]

    @property
    def system_prompts(self) -> dict[str, str]:
        """The system messages added to requests without one, by model."""
        return self._auth.system_prompts

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Serve until Ctrl-C or SIGTERM; ``on_ready`` is called with the address."""
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
        """Serve in the background while the block runs, and yield the address."""
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
    others = gc.get_freeze_count() > 0  # another server in this process, which may continue when this one stops
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not others:
            gc.unfreeze()
