"""Runs the application: in the foreground until Ctrl-C, or in the background for a ``with`` block."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from tunewright.config import GatewayConfig
from tunewright.core.errors import UserError
from tunewright.core.interrupts import leave_signals_to_server
from tunewright.serving.gateway.connections import BoundedHttpProtocol, ConnectionState

_DEFAULT_LIMITS = GatewayConfig()
_FLUSH_SECONDS = 5
"""Time for clients to read the error that ends their request."""


class Drainable(Protocol):
    """An application with a graceful shutdown."""

    @property
    def in_flight(self) -> int:
        """The number of requests that have arrived and are not answered."""

    def drain(self) -> None:
        """Refuse further requests. Called in a signal handler."""

    def abort(self) -> None:
        """End the requests in progress."""


def serve(
    app: Starlette,
    host: str,
    port: int,
    limits: GatewayConfig,
    *,
    drain: Drainable | None = None,
    on_ready: Callable[[str], None] = lambda _url: None,
    say: Callable[[str], None] = lambda _message: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish the requests in progress. Call it from the main thread.

    Args:
        limits: the number of connections, their timeouts, and how long requests in progress may take to finish; a
            second signal ends them at once.
        drain: refuses further requests during the shutdown. The server keeps listening until no request is left, so
            that clients get an error with a reason, and not a refused connection.
        on_ready: called with the server's address once it accepts connections.
        say: called with messages about the shutdown.

    Raises:
        UserError: the server cannot listen on the address.
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
    """Serve in a thread while the block runs, and yield the server's address; port 0 picks a free one.

    Raises:
        UserError: the server cannot listen on the address.
    """
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
        drain: Drainable | None = None,
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
            if not self._announced:  # not in the signal handler, which may interrupt another write
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
        # Accepted connections inherit this option. asyncio sets it only for sockets that name their protocol, and these
        # do not. Without it a token waits until the client has acknowledged the one before, for up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise UserError(
            f"Cannot listen on {host} port {port}: {error.strerror}",
            fix="Choose another address or port (0 takes a free one), or stop the program that uses it.",
        ) from error


def require_free(host: str, port: int) -> None:
    """Check that the server can listen on an address, before any slow work.

    Raises:
        UserError: it cannot.
    """
    _listen(host, port).close()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
