"""vLLM as a child process on a Unix socket, started again when it dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from tunewright.errors import UserError
from tunewright.progress import Reporter, duration
from tunewright.serving.engines.vllm import inside

PACKAGE = "tunewright_vllm"
START_SECONDS = 900
"""The most that a start may take: with a GPU vLLM compiles the model first."""
STOP_SECONDS = 20
GIVE_UP = 5
"""Starts that may fail one after the other."""
_LONGEST_WAIT = 60.0
_CALM = 300.0
"""After so many seconds without a failure the next one is a first one again."""
_TOLD_EVERY = 15.0

# What the caller's environment may not decide: vLLM's own switches (one of them answers unknown names with the base),
# and where Python looks for packages.
_NOT_HANDED_ON = ("VLLM_", "PYTHON", "VIRTUAL_ENV", "LORA_")


class Child:
    """vLLM's API server, on a socket that only this user can reach.

    Its private folder (mode 0700) holds the socket, the list of adapters that it may load, and its log.

    Args:
        python: the interpreter of vLLM's environment.
        options: of vLLM's API server, without the socket.
        variables: for its environment.

    Raises:
        UserError: it does not start; with the end of its log.
    """

    def __init__(self, python: Path, options: Sequence[str], variables: Mapping[str, str], reporter: Reporter) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tunewright-vllm-"))
        self.socket = self.folder / "socket"
        self.log = self.folder / "log"
        self._manifest = self.folder / "adapters.json"
        self.list_adapters({})
        _write_plugin(self.folder / "site")
        self._command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--uds", str(self.socket), *options]
        self._environment = self._variables(variables)
        self._reporter = reporter
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._trouble: str | None = "vLLM is starting."
        self._first_failure: str | None = None
        self._stopping = threading.Event()
        self.starts = 0
        self.given_up = False
        # One thread starts it and waits for it: Linux ends the child when the *thread* that started it ends.
        self._thread = threading.Thread(target=self._keep_running, name="tunewright-vllm", daemon=True)
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

    def list_adapters(self, entries: Mapping[str, Mapping[str, object]]) -> None:
        """Say which adapters it may load: see :data:`tunewright.serving.engines.vllm.inside.MANIFEST`."""
        fresh = self._manifest.with_suffix(".new")
        fresh.write_text(json.dumps(dict(entries)), encoding="utf-8")
        fresh.replace(self._manifest)

    def said(self, lines: int = 12) -> str:
        """The end of its log."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        return ""

    def stop(self) -> None:
        """End it: politely, then not."""
        self._stopping.set()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _variables(self, more: Mapping[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_HANDED_ON)}
        ours = {
            "PYTHONPATH": str(self.folder / "site"),
            inside.MANIFEST: str(self._manifest),
            inside.GATEWAY: str(os.getpid()),
            "VLLM_PLUGINS": PACKAGE,  # and not vLLM's own resolvers
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # resolvers need it; the routes that it opens, the gate closes
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return {**inherited, **ours, **more}

    def _await_first_start(self) -> None:
        began = told = time.monotonic()
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._trouble is None or self._first_failure, timeout=1):
                    break
            now = time.monotonic()
            if now - told > _TOLD_EVERY:
                self._reporter.say(f"vLLM is starting, {duration(now - began)} so far")
                told = now
        if self._first_failure:
            failure = self._first_failure
            self.stop()
            raise UserError(f"vLLM does not start:\n{failure}", fix="The lines above are the end of its log.")

    def _keep_running(self) -> None:
        failures, last = 0, time.monotonic()
        while not self._stopping.is_set():
            ready = self._run_once()
            if self._stopping.is_set():
                break
            if not ready and self.starts == 1:
                self._set_trouble("vLLM does not start.", first_failure=self.said())
                return
            failures = 1 if time.monotonic() - last > _CALM else failures + 1
            last = time.monotonic()
            if failures >= GIVE_UP:
                self.given_up = True
                self._set_trouble(f"vLLM has died {failures} times in a row and the server must be restarted.")
                self._reporter.warn(f"{self._trouble} The end of its log:\n{self.said()}")
                return
            wait = min(2.0 ** (failures - 1), _LONGEST_WAIT)
            self._set_trouble("vLLM has died and is being started again: try again in a minute.")
            self._reporter.warn(
                f"vLLM has died; it is started again in {wait:.0f} s. The end of its log:\n{self.said()}"
            )
            self._stopping.wait(wait)
        self._set_trouble("The server is shutting down.")

    def _run_once(self) -> bool:
        """Start it and wait until it ends or is to end; whether it was ready in between."""
        self.socket.unlink(missing_ok=True)
        self.starts += 1
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the gateway's: it lets answers come to their end first
            )
        self._process = process
        ready, began = False, time.monotonic()
        try:
            while process.poll() is None and not self._stopping.wait(0.2):
                if not ready and self._answers():
                    ready = True
                    self._set_trouble(None)
                if not ready and time.monotonic() - began > START_SECONDS:
                    break
        finally:
            _end(process)
        return ready

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as listening:
            if listening.connect_ex(str(self.socket)) != 0:
                return False
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=5) as client:
                return client.get("http://vllm/health").status_code == 200
        except httpx.TransportError:
            return False

    def _set_trouble(self, trouble: str | None, *, first_failure: str | None = None) -> None:
        with self._changed:
            if trouble is None and self.starts > 1:
                self._reporter.say("vLLM answers again.")
            self._trouble = trouble
            self._first_failure = first_failure
            self._changed.notify_all()


def _write_plugin(site: Path) -> None:
    """The package that vLLM finds by its entry point."""
    package, info = site / PACKAGE, site / f"{PACKAGE}-1.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    shutil.copyfile(inside.__file__, package / "__init__.py")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1\n", encoding="utf-8")
    entry = f"[vllm.general_plugins]\n{PACKAGE} = {PACKAGE}:register\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if number == signal.SIGKILL or not _group_lives(process.pid):
                return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
