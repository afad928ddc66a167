"""Running the application: in the foreground until Ctrl-C, or in the background for as long as a ``with`` block."""

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

from tunewright.core.errors import UserError
from tunewright.core.interrupts import handled_elsewhere

DRAIN_SECONDS = 30
_FAREWELL_SECONDS = 5
"""How long clients may take to read what they are told at the end."""


class Drain(Protocol):
    """What ends an application in good order."""

    @property
    def under_way(self) -> int:
        """Requests that have come and are not answered."""

    def drain(self) -> None:
        """Take no further requests. Called in a signal's handler."""

    def abandon(self) -> None:
        """End the requests under way."""


def serve(
    app: Starlette,
    host: str,
    port: int,
    *,
    drain: Drain | None = None,
    drain_seconds: float = DRAIN_SECONDS,
    on_ready: Callable[[str], None] = lambda _url: None,
    say: Callable[[str], None] = lambda _message: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; answers under way are finished first. Call it from the main thread.

    Args:
        drain: is told to stop, and the server goes on listening until nothing is under way, so that who asks meanwhile
            is refused in words.
        drain_seconds: how long answers under way may take to come to their end; the second signal ends them at once.
        on_ready: told the server's address once it takes connections.
        say: told how it ends.

    Raises:
        UserError: the address cannot be listened on.
    """
    listener = _listen(host, port)
    server = _Server(app, lambda: on_ready(_url(listener)), drain, drain_seconds, say)
    # uvicorn has shut down in good order and hands the signal on.
    with handled_elsewhere(), suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        raise RuntimeError("the server ended before it was ready; its log says why")
    say("Stopped.")


@contextmanager
def serving(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread while the block runs, which is given the server's address; port 0 takes a free one.

    Raises:
        UserError: the address cannot be listened on.
    """
    listener = _listen(host, port)
    ready = threading.Event()
    server = _Server(app, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="tunewright-server", daemon=True)
    thread.start()
    while not ready.wait(0.1):
        if not thread.is_alive():
            raise RuntimeError("the server ended before it was ready; its log says why")
    try:
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready, and drains before it closes."""

    def __init__(
        self,
        app: Starlette,
        on_ready: Callable[[], None],
        drain: Drain | None = None,
        drain_seconds: float = DRAIN_SECONDS,
        say: Callable[[str], None] = lambda _message: None,
    ) -> None:
        grace = math.ceil(drain_seconds) if drain is None else _FAREWELL_SECONDS
        super().__init__(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=grace))
        self._on_ready = on_ready
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._until: float | None = None
        self._say = say
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is None or not self.started or self.should_exit:
            super().handle_exit(sig, frame)
            return
        # It is not handed on afterwards, as uvicorn would: it has been obeyed.
        if self._until is None:
            self._drain.drain()
            self._until = time.monotonic() + self._drain_seconds
        else:
            self._until = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._drain is not None and self._until is not None:
            under_way = _requests(self._drain.under_way)
            if not self._told:  # not in the signal's handler, which may interrupt what writes
                self._say(f"Stopping: nobody is let in, and {under_way} may take {self._drain_seconds:g} s to end.")
                self._told = True
            if not self._drain.under_way:
                self.should_exit = True
            elif time.monotonic() >= self._until and not self.should_exit:
                self._say(f"Time is up: cutting off {under_way}.")
                self._drain.abandon()
                self.should_exit = True
        return await super().on_tick(counter)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
        # Accepted connections inherit it. asyncio sets it only for sockets that name their protocol, which these do
        # not; and without it a token waits for the client to acknowledge the one before, which takes up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}",
            fix="Choose another address or port (0 takes a free one), or stop what uses it.",
        ) from error


def require_free(host: str, port: int) -> None:
    """Find out whether an address can be listened on, before what takes its time.

    Raises:
        UserError: it cannot.
    """
    _listen(host, port).close()


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
