"""Command lines in child processes that can be killed, without importing torch in each."""

from __future__ import annotations

import ctypes
import fnmatch
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Ended:
    """A command's exit code (negative: the signal that killed it) and its stderr."""

    code: int
    stdout: str
    stderr: str

    @property
    def had_no_memory_for_a_message(self) -> bool:
        """True if OpenMP, oneDNN, a library in Rust or the C library ended the process, or Python could not print."""
        return self.code < 0 or "lost sys.stderr" in self.stderr or "memory for thread-local data" in self.stderr


def kill_when(reached: Callable[[], bool], work: Callable[[], object]) -> None:
    """Do this work in a copy of the process, and kill it once a state is reached that this process sees."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 300
    while not reached():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


FOREVER = 2**31


@dataclass(frozen=True)
class Fault:
    """A fault of tests/chaos/faults.c: at the ``when``-th call that changes something in ``folder``, or never."""

    folder: str
    kinds: int
    action: int = 0
    when: int = 1
    number: int = 0
    """errno of the failed call."""
    lasting: int = 0
    """Number of later calls that fail too."""
    seconds: int = 0


class Command:
    """A running command."""

    def __init__(self, server: Server, pids: list[int], folder: Path) -> None:
        self.server = server
        self.pids = pids
        self.folder = folder

    @property
    def stderr(self) -> str:
        """Return its stderr so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def send(self, *signals: signal.Signals) -> None:
        """Send signals to the first process; several arrive together."""
        together = [signal.SIGSTOP, *signals, signal.SIGCONT] if len(signals) > 1 else signals
        for number in together:
            os.kill(self.pids[0], number)

    def wait(self) -> Ended:
        """Wait for its end."""
        codes = [self.server.answer() for _ in self.pids]
        self.server.running = None
        return Ended(codes[0], (self.folder / "stdout").read_text(encoding="utf-8"), self.stderr)


class Server:
    """The process that forks, one command at a time."""

    def __init__(self, folder: Path, preload: Path | None = None) -> None:
        self.folder = folder
        self.preload = preload
        self.count = 0
        self.running: Command | None = None
        """The command that is not yet waited for."""
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            # A backtrace needs memory: a library in Rust that has none for it never ends.
            env=os.environ | {"RUST_BACKTRACE": "0"} | ({"LD_PRELOAD": str(preload)} if preload else {}),
        )

    def start(
        self,
        *arguments: str | Path,
        killed_at: tuple[str, int] | None = None,
        file_limit: int | None = None,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        fault: Fault | None = None,
        memory: int | None = None,
        warming: bool = False,
    ) -> Command:
        """Start a command.

        Args:
            arguments: as after ``python -m tunewright``.
            killed_at: (pattern, n): it is killed at its nth change of a path that fits the pattern.
            file_limit: the largest file that it may write, in bytes.
            processes: their number, started as by torchrun; ``killed_at`` and ``file_limit`` are for the first.
            environment: variables besides, as a launcher sets them.
            fault: what happens to it; the server must have been started with the compiled faults.c.
            memory: bytes that it may take in addition to those of its start.
            warming: later commands find in memory the modules that this one imports.
        """
        if self.running is not None:  # a test that failed has left it
            with suppress(ProcessLookupError):
                self.running.send(signal.SIGKILL)
            self.running.wait()
        self.count += 1
        folder = self.folder / f"command-{self.count}"
        folder.mkdir(parents=True)
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        request = {
            "arguments": [str(a) for a in arguments],
            "folder": str(folder),
            "killed_at": killed_at,
            "file_limit": file_limit,
            "processes": processes,
            "environment": dict(environment or {}),
            "fault": fault and asdict(fault),
            "memory": memory,
            "warming": warming,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.running = Command(self, [self.answer() for _ in range(processes)], folder)
        return self.running

    def run(self, *arguments: str | Path, **options: Any) -> Ended:
        """Run a command to its end, with the options of `start`; the exit code is the first process's."""
        return self.start(*arguments, **options).wait()

    def answer(self) -> int:
        """Return the server's next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server has died"
        return int(line)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


def _serve() -> None:
    # Imports alone: a thread that torch starts would not survive the fork. Commands would look at what they made each
    # time they collect garbage, and so copy its memory.
    gc.disable()
    import peft
    import trl
    import typer.main

    import tunewright.cli
    import tunewright.training.train

    assert all((peft, trl, tunewright.training.train))
    # Building the tree of all commands takes most of a quick command's time: the forked ones find it in memory.
    typer.main.get_command = cache(typer.main.get_command)
    typer.main.get_command(tunewright.cli.commands())
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        pids = []
        for rank in range(request["processes"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                _become(request, rank, port)
            print(pids[-1], flush=True)  # noqa: T201
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if request["warming"]:
            for name in (Path(request["folder"]) / "modules").read_text().splitlines():
                with suppress(ImportError):  # a module that exists under another name only
                    importlib.import_module(name)
            gc.collect()
            gc.freeze()
        for code in codes:
            print(code, flush=True)  # noqa: T201


def _become(request: dict[str, Any], rank: int, port: int) -> None:
    if request["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= request["environment"]
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for handle, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, handle)
    if request["file_limit"] is not None and rank == 0:
        sys.dont_write_bytecode = True  # Python would keep compiled modules that the limit cut short
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    if request["killed_at"] is not None and rank == 0:
        sys.addaudithook(_Killer(*request["killed_at"]))
    from tunewright.cli.stopping import end_process

    if request["memory"] is not None:
        taken = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        limit = int(taken.split()[1]) * 1024 + request["memory"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if request["fault"] is not None:
        fault = Fault(**request["fault"])
        counts = os.fsencode(Path(request["folder"]) / "faults")
        ctypes.CDLL(None).faults_arm(
            counts,
            os.fsencode(fault.folder),
            fault.kinds,
            fault.action,
            ctypes.c_long(fault.when),
            fault.number,
            ctypes.c_long(fault.lasting),
            ctypes.c_long(fault.seconds),
        )
    sys.argv = ["tunewright", *request["arguments"]]
    code: Any = 0
    try:
        runpy.run_module("tunewright", run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter would
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if request["warming"]:
        (Path(request["folder"]) / "modules").write_text("\n".join(sorted(sys.modules)))
    end_process(code or 0)


class _Killer:
    """Kills this process at the nth of Python's changes to a path: before it is made."""

    changes = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile"})

    def __init__(self, pattern: str, left: int) -> None:
        self.pattern = pattern
        self.left = left

    def __call__(self, event: str, arguments: Sequence[Any]) -> None:
        if event not in self.changes or (event == "open" and not self._writes(arguments)):
            return
        if any(isinstance(a, str | Path) and fnmatch.fnmatch(str(a), self.pattern) for a in arguments):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _writes(arguments: Sequence[Any]) -> bool:
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    _serve()
