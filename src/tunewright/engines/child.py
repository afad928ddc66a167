"""An engine's server as a child process on a Unix socket, restarted when it crashes or hangs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tunewright.core.errors import UserError
from tunewright.core.locks import lock
from tunewright.core.processes import Process, end, last_lines, start
from tunewright.core.progress import Reporter, duration

START_SECONDS = 900
"""The longest start: with a GPU, vLLM compiles the model first."""
STOP_SECONDS = 20
CONNECT_SECONDS = 5.0
GIVE_UP = 5
"""Consecutive failures after which the child is not restarted."""
PROBE_SECONDS = 15.0
"""The time between two health checks."""
PATIENCE_SECONDS = 5.0
"""The timeout of a health check."""
MISSED = 3
"""Consecutive failed health checks after which a server counts as hanging."""
STUCK_SECONDS = 180.0
"""The time that a server with requests may take for a pass over the model, which can be a minute.

Time without requests does not count. It does not reset the count either, since clients of a hung server give up.
"""
_LONGEST_WAIT = 60.0
_CALM = 300.0
"""After this many seconds without a failure, the count of failures restarts."""
_REPORT_SECONDS = 15.0
_LONGEST_SOCKET = 107  # bytes of sun_path without its last zero (unix(7))


@dataclass(frozen=True)
class Plan:
    """The server to run.

    Args:
        name: its display name.
        command: the command line. The server listens on the socket, and answers ``GET /health`` with 200 once it is
            ready.
        variables: its whole environment.
        metrics: the prefix of the lines of ``GET /metrics`` that change with each pass over the
            model. A server may pass its health checks and yet compute nothing.
    """

    name: str
    command: Sequence[str]
    variables: Mapping[str, str]
    metrics: str


class LoopClients:
    """A client of an engine's server for each event loop, since a connection belongs to the loop that opened it."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, **transport: Any) -> None:
        self._base_url = url
        self._headers = headers
        self._transport = transport
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._closing: set[asyncio.Future[None]] = set()

    def client(self) -> httpx.AsyncClient:
        """Return the HTTP client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            # No idle connection outlives its event loop, and no proxy is between a gateway and its engines (trust_env).
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._clients[loop] = httpx.AsyncClient(
                base_url=self._base_url,
                headers=self._headers,
                transport=httpx.AsyncHTTPTransport(limits=limits, trust_env=False, **self._transport),
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            )
        return self._clients[loop]

    @asynccontextmanager
    async def post(
        self, route: str, body: object, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; the connection is closed at the end, which also aborts the request in the server.

        The caller may be cancelled at this point. So the close is shielded: a half-closed connection would stay open.
        """
        client = self.client()
        reply = await client.send(client.build_request("POST", route, json=body, headers=headers), stream=True)
        try:
            yield reply
        finally:
            closing = asyncio.ensure_future(reply.aclose())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)


class Child(LoopClients):
    """A server on a socket that only this user can reach.

    Its private folder (mode 0700) has the socket, its log, and the files that ``plan`` creates in it.

    Args:
        plan: returns the server to run, given the private folder; it is called once.
        busy: returns whether the server has requests.
    """

    def __init__(self, plan: Callable[[Path], Plan], busy: Callable[[], bool], reporter: Reporter) -> None:
        self._private = PrivateFolder()
        self.folder = self._private.path
        self.socket = socket_in(self.folder)
        if (length := len(os.fsencode(self.socket))) > _LONGEST_SOCKET:
            self._private.remove()
            raise UserError(
                f"A socket's path has at most {_LONGEST_SOCKET} bytes (got {length}): {self.socket}",
                where="TMPDIR",
                fix="Set it to a folder with a shorter path, such as /tmp.",
            )
        super().__init__("http://engine", uds=str(self.socket))
        self.log = self.folder / "log"
        self._plan = plan(self.folder)
        self._busy = busy
        self._reporter = reporter
        self._process: Process | None = None
        self._changed = threading.Condition()
        self._failure_reason: str | None = f"{self._plan.name} is starting."
        self._first_failure: str | None = None
        self._stopping = threading.Event()
        self._end = "crashed"
        self.starts = 0
        self.given_up = False
        # One thread starts the child and waits for it: Linux ends a child with the *thread* that started it.
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="tunewright-child", daemon=True)
        self._thread.start()
        self._await_first_start()

    @property
    def failure_reason(self) -> str | None:
        """Reason why it answers no requests now; None while it does."""
        return self._failure_reason

    @property
    def process_id(self) -> int | None:
        """The id of the running process."""
        return self._process.pid if self._process else None

    @property
    def stopping(self) -> bool:
        """True if it has been stopped for good."""
        return self._stopping.is_set()

    async def is_healthy(self) -> bool:
        """Return whether it is healthy now. After an internal crash, a server fails every request until it exits."""
        try:
            return (await self.client().get("/health", timeout=PATIENCE_SECONDS)).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def said(self) -> str:
        """The end of its log."""
        return last_lines(self.log, 12)

    def stop(self) -> None:
        """Stop it: first by SIGTERM, then by SIGKILL."""
        self._stopping.set()
        self._thread.join()
        self._private.remove()

    def _await_first_start(self) -> None:
        began = reported = time.monotonic()
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._failure_reason is None or self._first_failure, timeout=1):
                    break
            if self._fault is not None:
                self.stop()
                raise self._fault
            now = time.monotonic()
            if now - reported > _REPORT_SECONDS:
                self._reporter.say(f"{self._plan.name} is starting ({duration(now - began)} so far)")
                reported = now
        if self._first_failure:
            failure = self._first_failure
            self.stop()
            raise UserError(f"{self._plan.name} failed to start. The end of its log:\n{failure}")

    def _run(self) -> None:
        try:
            self._keep_running()
        except Exception as error:
            self._fault = error  # the program that starts it must not wait for it forever
            self._set_failure_reason(f"{self._plan.name} cannot be started: {error}. Restart the server.")
            raise

    def _keep_running(self) -> None:
        name, failures, last = self._plan.name, 0, time.monotonic()
        while not self._stopping.is_set():
            ready = self._run_once()
            if self._stopping.is_set():
                break
            if not ready and self.starts == 1:
                self._set_failure_reason(f"{name} failed to start.", first_failure=self.said or "The log is empty.")
                return
            failures = 1 if time.monotonic() - last > _CALM else failures + 1
            last = time.monotonic()
            if failures >= GIVE_UP:
                self.given_up = True
                self._set_failure_reason(f"{name} failed {failures} times in a row. Restart the server.")
                self._reporter.warn(f"{self._failure_reason} The end of its log:\n{self.said}")
                return
            wait = min(2.0 ** (failures - 1), _LONGEST_WAIT)
            self._set_failure_reason(f"{name} {self._end} and is restarting. Try again in a minute.")
            self._reporter.warn(
                f"{name} {self._end} and will be restarted in {wait:.0f} s. The end of its log:\n{self.said}"
            )
            self._stopping.wait(wait)
        self._set_failure_reason("The server is shutting down.")

    def _run_once(self) -> bool:
        """Run it until it ends or must stop; return whether it became ready."""
        self.socket.unlink(missing_ok=True)
        self.starts += 1
        with self.log.open("ab") as log:
            process = start(self._plan.command, env=self._plan.variables, cwd=self.folder, stdout=log, stderr=log)
        self._process = process
        self._end = "crashed"
        try:
            began, ready = time.monotonic(), False
            while not ready and process.poll() is None and not self._stopping.wait(0.05):
                ready = self._answers()
                if time.monotonic() - began > START_SECONDS:
                    break
            if ready:
                self._set_failure_reason(None)
                self._watch(process)
        finally:
            end(process, STOP_SECONDS)
        return ready

    def _watch(self, process: Process) -> None:
        """Wait until it ends, must stop, fails its health checks, or computes nothing although it has requests."""
        checked = polled = time.monotonic()
        missed, stuck, signs = 0, 0.0, self._signs()
        while process.poll() is None and not self._stopping.wait(0.2):
            now = time.monotonic()
            if self._busy():
                stuck += min(now - polled, PROBE_SECONDS)  # time in which the machine slept does not count
            polled = now
            if now - checked < PROBE_SECONDS:
                continue
            checked = now
            missed = 0 if self._answers() else missed + 1
            fresh = self._signs()
            if fresh not in (None, signs):
                stuck, signs = 0.0, fresh
            if missed >= MISSED or stuck > STUCK_SECONDS:
                self._end = "hung"
                # Set before the kill, which closes the connections: waiting requests report this reason.
                self._set_failure_reason(f"{self._plan.name} hung and is restarting. Try again in a minute.")
                process.kill()
                return

    def _answers(self) -> bool:
        reply = self._get("/health")
        return reply is not None and reply.status_code == 200

    def _signs(self) -> list[str] | None:
        """Return the metrics that change when it computes; None if it does not answer."""
        reply = self._get("/metrics")
        if reply is None:
            return None
        return [line for line in reply.text.splitlines() if line.startswith(self._plan.metrics)]

    def _get(self, route: str) -> httpx.Response | None:
        """Return its response; None after a timeout."""
        with socket.socket(socket.AF_UNIX) as listening:
            if listening.connect_ex(str(self.socket)) != 0:
                return None
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=PATIENCE_SECONDS) as client:
                return client.get(f"http://engine{route}")
        except httpx.TransportError:
            return None

    def _set_failure_reason(self, failure_reason: str | None, *, first_failure: str | None = None) -> None:
        with self._changed:
            if failure_reason is None and self.starts > 1:
                self._reporter.say(f"{self._plan.name} is running again.")
            self._failure_reason = failure_reason
            self._first_failure = first_failure
            self._changed.notify_all()


def socket_in(folder: Path) -> Path:
    """Return the socket of a server with this private folder; llama.cpp recognizes a Unix socket by the suffix."""
    return folder / "engine.sock"


FOLDER_PREFIX = "tunewright-engine-"
_LOCK = "lock"


class PrivateFolder:
    """A new folder for temporary files that only this user can open (mode 0700).

    This process holds a lock in it, which the system always releases when the process ends. So a folder with a
    free lock belongs to a killed gateway, and the next start removes it. A folder without a lock file is kept.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        # The lock gets its final name only once it is held, or another process could take it for abandoned.
        fresh = self.path / f"{_LOCK}.new"
        self._lock = fresh.open("xb")
        held = lock(self._lock.fileno())
        assert held, "nobody else knows this file"
        fresh.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove the folder; a second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # another process removes it, or holds its lock
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            with (folder / _LOCK).open("rb") as file:
                if lock(file.fileno()):
                    shutil.rmtree(folder, ignore_errors=True)


def refusal(name: str, body: bytes) -> str:
    """Return the message of a server's error response."""
    try:
        return f"{name} refused the request: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{name} refused the request: {body[:500].decode(errors='replace')}"
