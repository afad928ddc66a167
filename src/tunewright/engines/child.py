"""An engine's server as a child process on a Unix socket, started again when it dies or hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, duration
from tunewright.engines.private_folder import PrivateFolder

START_SECONDS = 900
"""The most that a start may take: with a GPU vLLM compiles the model first."""
STOP_SECONDS = 20
TIDY_SECONDS = 5.0
"""For what a server that has ended leaves behind to end by itself: Python's resource tracker is the last one, and frees
the shared memory of all others (vLLM has hundreds of MB), which nobody would do in its place."""
GIVE_UP = 5
"""Starts that may fail one after the other."""
PROBE_SECONDS = 15.0
"""Between two looks at whether it still answers."""
PATIENCE_SECONDS = 5.0
"""For one such answer."""
MISSED = 3
"""Looks without an answer, one after the other, of what hangs."""
STUCK_SECONDS = 180.0
"""With requests under way, and without a pass over the model: one over hundreds of tokens may take a minute. Time
without requests does not count, but ends nothing: whoever is not answered gives up."""
_LONGEST_WAIT = 60.0
_CALM = 300.0
"""After so many seconds without a failure the next one is a first one again."""
_TOLD_EVERY = 15.0


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        name: what people call it.
        command: the server; it listens on ``socket``, and answers ``GET /health`` by 200 once it is ready.
        variables: its whole environment.
        metrics: how the lines of ``GET /metrics`` begin that change with each pass over the model: it may answer probes
            and compute nothing.
    """

    name: str
    command: Sequence[str]
    variables: Mapping[str, str]
    metrics: str


class Child:
    """A server on a socket that only this user can reach.

    Its private folder (mode 0700) holds the socket, its log, and what ``plan`` puts there.

    Args:
        plan: what to run, given the private folder; it is asked once.
        busy: whether it has requests.

    Raises:
        UserError: it does not start; with the end of its log.
    """

    def __init__(self, plan: Callable[[Path], Plan], busy: Callable[[], bool], reporter: Reporter) -> None:
        self._private = PrivateFolder()
        self.folder = self._private.path
        self.socket = socket_in(self.folder)
        self.log = self.folder / "log"
        self._plan = plan(self.folder)
        self._busy = busy
        # Connections belong to the event loop that opened them.
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._closing: set[asyncio.Future[None]] = set()
        self._reporter = reporter
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._trouble: str | None = f"{self._plan.name} is starting."
        self._first_failure: str | None = None
        self._stopping = threading.Event()
        self._end = "has died"
        self.starts = 0
        self.given_up = False
        # One thread starts it and waits for it: Linux ends the child when the *thread* that started it ends.
        self._thread = threading.Thread(target=self._keep_running, name="tunewright-child", daemon=True)
        self._thread.start()
        self._await_first_start()

    @property
    def trouble(self) -> str | None:
        """Why it answers nothing now, or None while it does."""
        return self._trouble

    @property
    def process_id(self) -> int | None:
        """The running process."""
        return self._process.pid if self._process else None

    @property
    def stopping(self) -> bool:
        """True if it has been stopped for good."""
        return self._stopping.is_set()

    def client(self) -> httpx.AsyncClient:
        """For requests to it, on the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            # A new connection over a Unix socket costs nothing, and none is left to an event loop that has ended.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            transport = httpx.AsyncHTTPTransport(uds=str(self.socket), limits=limits)
            self._clients[loop] = httpx.AsyncClient(
                transport=transport, base_url="http://engine", timeout=httpx.Timeout(None, connect=5)
            )
        return self._clients[loop]

    @asynccontextmanager
    async def post(self, route: str, body: object) -> AsyncIterator[httpx.Response]:
        """Ask it something; the connection is closed in the end, which ends the request over there, too.

        Whoever has all that it waits for is often cancelled while it closes, and a connection closed by half stays.

        Raises:
            httpx.TransportError: it has died.
        """
        client = self.client()
        reply = await client.send(client.build_request("POST", route, json=body), stream=True)
        try:
            yield reply
        finally:
            closing = asyncio.ensure_future(reply.aclose())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)

    async def is_well(self) -> bool:
        """Return whether it says so now: one that has failed as a whole says it of each request, too, until it ends."""
        try:
            return (await self.client().get("/health", timeout=PATIENCE_SECONDS)).status_code == 200
        except httpx.TransportError:
            return False

    def said(self, lines: int = 12) -> str:
        """Return the end of its log."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        return ""

    def stop(self) -> None:
        """End it: politely, then not."""
        self._stopping.set()
        self._thread.join()
        self._private.remove()

    def _await_first_start(self) -> None:
        began = told = time.monotonic()
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._trouble is None or self._first_failure, timeout=1):
                    break
            now = time.monotonic()
            if now - told > _TOLD_EVERY:
                self._reporter.say(f"{self._plan.name} is starting, {duration(now - began)} so far")
                told = now
        if self._first_failure:
            failure = self._first_failure
            self.stop()
            raise UserError(
                f"{self._plan.name} does not start:\n{failure}", fix="The lines above are the end of its log."
            )

    def _keep_running(self) -> None:
        name, failures, last = self._plan.name, 0, time.monotonic()
        while not self._stopping.is_set():
            ready = self._run_once()
            if self._stopping.is_set():
                break
            if not ready and self.starts == 1:
                self._set_trouble(f"{name} does not start.", first_failure=self.said() or "It says nothing.")
                return
            failures = 1 if time.monotonic() - last > _CALM else failures + 1
            last = time.monotonic()
            if failures >= GIVE_UP:
                self.given_up = True
                self._set_trouble(f"{name} has failed {failures} times in a row and the server must be restarted.")
                self._reporter.warn(f"{self._trouble} The end of its log:\n{self.said()}")
                return
            wait = min(2.0 ** (failures - 1), _LONGEST_WAIT)
            self._set_trouble(f"{name} {self._end} and is being started again: try again in a minute.")
            self._reporter.warn(
                f"{name} {self._end}; it is started again in {wait:.0f} s. The end of its log:\n{self.said()}"
            )
            self._stopping.wait(wait)
        self._set_trouble("The server is shutting down.")

    def _run_once(self) -> bool:
        """Start it and wait until it ends or is to end; whether it was ready in between."""
        self.socket.unlink(missing_ok=True)
        self.starts += 1
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self._plan.command,
                env=dict(self._plan.variables),
                cwd=self.folder,
                stdin=subprocess.PIPE,  # it ends when the gateway does
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the gateway's: it lets answers come to their end first
            )
        self._process = process
        self._end = "has died"
        try:
            ready = self._await_ready(process)
            if ready:
                self._set_trouble(None)
                self._watch(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            _end(process)
        return ready

    def _await_ready(self, process: subprocess.Popen[bytes]) -> bool:
        began = time.monotonic()
        while process.poll() is None and not self._stopping.wait(0.05):
            if self._answers():
                return True
            if time.monotonic() - began > START_SECONDS:
                return False
        return False

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until it ends, is to end, answers no more, or computes nothing though it has requests."""
        looked = polled = time.monotonic()
        missed, stuck, signs = 0, 0.0, self._signs()
        while process.poll() is None and not self._stopping.wait(0.2):
            now = time.monotonic()
            if self._busy():
                stuck += min(now - polled, PROBE_SECONDS)  # while the machine slept nothing was stuck
            polled = now
            if now - looked < PROBE_SECONDS:
                continue
            looked = now
            missed = 0 if self._answers() else missed + 1
            fresh = self._signs()
            if fresh not in (None, signs):
                stuck, signs = 0.0, fresh
            if missed >= MISSED or stuck > STUCK_SECONDS:
                self._end = "hangs"
                # Whoever waits for it hears of it now: its connections are closed as it is killed.
                self._set_trouble(f"{self._plan.name} hangs and is being started again: try again in a minute.")
                process.kill()
                return

    def _answers(self) -> bool:
        reply = self._get("/health")
        return reply is not None and reply.status_code == 200

    def _signs(self) -> list[str] | None:
        """Return what changes when it computes; None where it does not say so now."""
        reply = self._get("/metrics")
        if reply is None:
            return None
        return [line for line in reply.text.splitlines() if line.startswith(self._plan.metrics)]

    def _get(self, route: str) -> httpx.Response | None:
        """Return what it answers; None if nothing in time."""
        with socket.socket(socket.AF_UNIX) as listening:
            if listening.connect_ex(str(self.socket)) != 0:
                return None
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=PATIENCE_SECONDS) as client:
                return client.get(f"http://engine{route}")
        except httpx.TransportError:
            return None

    def _set_trouble(self, trouble: str | None, *, first_failure: str | None = None) -> None:
        with self._changed:
            if trouble is None and self.starts > 1:
                self._reporter.say(f"{self._plan.name} answers again.")
            self._trouble = trouble
            self._first_failure = first_failure
            self._changed.notify_all()


def socket_in(folder: Path) -> Path:
    """Where a server in this private folder listens; llama.cpp knows a Unix socket by how its name ends."""
    return folder / "engine.sock"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if number == signal.SIGKILL or _group_ends(process.pid):
                return


def _group_ends(group: int) -> bool:
    until = time.monotonic() + TIDY_SECONDS
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False
