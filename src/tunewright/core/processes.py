"""Child processes. Each has its own process group, so that Ctrl-C reaches only the parent, which ends the whole group.

No other module starts a process, except the editor that `data review` opens on the user's terminal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

Process = subprocess.Popen[bytes]
StillRunningError = subprocess.TimeoutExpired
PIPE = subprocess.PIPE
NOTHING = subprocess.DEVNULL

KILLED = -signal.SIGKILL
"""The exit code of a killed process; the system kills processes when memory runs out."""
ENOUGH_MEMORY = "Check that it has enough memory, and run the same command again."
"""The remedy for a killed process."""
TIDY_SECONDS = 5.0
"""The time that a stopped process's descendants may take to end. Python's resource tracker is the last one.
Only the tracker frees their shared memory (hundreds of MB in vLLM)."""


def start(
    command: Sequence[str],
    *,
    stdin: int = PIPE,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    terminal: bool = False,
) -> Process:
    """Start a process, which :func:`end` ends. With ``terminal`` it may ask its user and also gets Ctrl-C.

    Its standard input is a pipe that the system closes when this process ends. A child that has to end then calls
    :func:`end_with_parent`, or reads to the end.
    """
    return subprocess.Popen(
        command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env, start_new_session=not terminal
    )


def end(process: Process, patience: float = 0.0) -> None:
    """End a process and its descendants: by SIGTERM if there are seconds to wait for that, then by SIGKILL."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL)[0 if patience else 1 :]:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it has no process group, or has ended
            process.send_signal(number)
        with suppress(StillRunningError):
            process.wait(patience if number == signal.SIGTERM else None)
            if number == signal.SIGKILL or _group_ends(process.pid):
                break
    for output in (process.stdout, process.stderr):
        if output is not None:
            output.close()


def _group_ends(group: int) -> bool:
    until = time.monotonic() + TIDY_SECONDS
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@dataclass(frozen=True)
class Finished:
    """The exit code and the output of a process."""

    code: int
    stdout: str
    stderr: str


def run(
    command: Sequence[str],
    *,
    data: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    terminal: bool = False,
) -> Finished:
    """Run a process to its end, with ``data`` as its input; ``terminal`` is as for :func:`start`."""
    process = start(command, stdout=PIPE, stderr=PIPE, cwd=cwd, env=env, terminal=terminal)
    try:
        stdout, stderr = process.communicate(data)
    finally:
        if process.returncode is None:
            end(process)
    return Finished(process.returncode, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))


def last_lines(log: Path, count: int) -> str:
    """Return the last lines of a log, which may not exist."""
    with suppress(FileNotFoundError):
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-count:])
    return ""


def end_with_parent() -> None:
    """End this process when its parent ends for any reason, even while it computes."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if sys.platform == "linux":
        # A hanging process does not read its input: Linux kills it (PR_SET_PDEATHSIG).
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


def _end_with_stdin() -> None:
    # Not through sys.stdin: Python would wait for its lock at exit.
    while os.read(0, 4096):
        pass
    os._exit(0)
