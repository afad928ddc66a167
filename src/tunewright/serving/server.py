"""Running the application: in the foreground until Ctrl-C, or in the background for as long as a ``with`` block."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from tunewright.errors import UserError

# How long answers under way may take to come to their end when the server stops; a second Ctrl-C does not wait.
DRAIN_SECONDS = 30


def serve(app: Starlette, host: str, port: int, *, on_ready: Callable[[str], None] = lambda _url: None) -> None:
    """Serve until Ctrl-C or SIGTERM; answers under way are finished first. Call it from the main thread.

    Args:
        on_ready: told the server's address once it takes connections.

    Raises:
        UserError: the address cannot be listened on.
    """
    listener = _listen(host, port)
    server = _Server(app, lambda: on_ready(_url(listener)))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        # uvicorn has shut down in good order and hands the signal on.
        return
    if not server.started:
        raise RuntimeError("the server ended before it was ready; its log says why")


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
    """uvicorn's server, which says when it is ready."""

    def __init__(self, app: Starlette, on_ready: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=DRAIN_SECONDS))
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}",
            fix="Choose another address or port (0 takes a free one), or stop what uses it.",
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
