"""Handling of Ctrl-C and SIGTERM: announced immediately and finished within seconds, even if the main thread is busy.

Python runs a signal's handler between two bytecodes of the main thread: during a native call, nothing
would happen. The interpreter also writes signal numbers to a pipe immediately; a thread here reads it.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from tunewright.cli.live import json_line
from tunewright.core.interrupts import pending_work

STOPPED = 128 + signal.SIGINT
"""Exit code that shells report after Ctrl-C."""
PATIENCE_S = 4.0
"""Time for the main thread to clean up; then the process ends as if killed, from which every command recovers."""
_ANNOUNCE_S = 0.2
"""Time for the announcement to precede the main thread's last output; a KeyboardInterrupt may have no signal."""
_END_S = 1.0
"""Time for the watcher to see its pipe closed; a watcher that had no memory to start never sees it."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


_alone = False
_stopped = False
_ending = threading.Lock()


def mark_command_process() -> None:
    """Mark this process as running one command: once the command is stopped, the interpreter's exit is also bounded."""
    global _alone
    _alone = True
    atexit.register(_skip_teardown)  # registered first, so it runs last


def _skip_teardown() -> None:
    """Skip the interpreter's work after its exit handlers, since freeing a model takes seconds."""
    if _stopped:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        end_process(STOPPED)


def end_process(code: int) -> NoReturn:
    """End the process without the interpreter's exit handlers.

    The main thread and the signals' thread may both call this at the same time; tools that extend
    ``os._exit``, such as coverage's patch, save their data there and expect one thread.
    """
    _ending.acquire()  # the thread that ends the process never releases it
    os._exit(code)


@contextmanager
def stoppable(kept: str, *, as_json: bool, quiet: bool, log_json: bool = False) -> Iterator[None]:
    """Announce the block's first SIGINT or SIGTERM, and end the process at the second or after a while.

    ``kept`` says what remains and how to resume. A ``quiet`` process prints nothing: another one reports for it.
    """
    global _stopped
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = _SignalWatcher(reading, kept, as_json=as_json, quiet=quiet, log_json=log_json)
    start_new_thread(watcher.watch, ())
    stopped = False
    try:
        yield
    except KeyboardInterrupt:
        stopped = _stopped = True
        watcher.announced.wait(_ANNOUNCE_S)
        raise
    finally:
        # After a stop, the interpreter's exit is watched as well: it joins threads and ends servers.
        if not (stopped and _alone):
            signal.set_wakeup_fd(before)
            os.close(writing)  # the watcher reads the end of the pipe
            watcher.ended.wait(_END_S)
            os.close(reading)


class _SignalWatcher:
    """Reads signals in a thread that the main thread never waits for.

    ``Thread.start`` waits for the new thread without a limit, even if that thread has no memory to start
    (https://github.com/python/cpython/issues/140746): a command with too little memory would hang.
    """

    def __init__(self, reading: int, kept: str, *, as_json: bool, quiet: bool, log_json: bool) -> None:
        self.reading = reading
        self.kept = kept
        self.as_json = as_json
        self.quiet = quiet
        self.log_json = log_json
        self.asked = 0
        """Signals so far."""
        self.announced = threading.Event()
        self.ended = threading.Event()

    def watch(self) -> None:
        """Read signals until the pipe is closed."""
        try:
            self._read()
        finally:
            self.ended.set()

    def _read(self) -> None:
        until = math.inf
        while True:
            ready, _, _ = select.select([self.reading], [], [], 0.1 if self.asked else None)
            if ready:
                numbers = os.read(self.reading, 64)
                if not numbers:
                    return
                for _ in range(sum(number in _SIGNALS for number in numbers)):
                    self._take()
            if pending_work() is not None:
                until = math.inf
            elif self.asked and until == math.inf:
                until = time.monotonic() + PATIENCE_S
            elif time.monotonic() > until:
                self._end()

    def _take(self) -> None:
        self.asked += 1
        if self.asked > 1:
            self._end()
        elif not self.quiet:
            waits = pending_work()  # what is kept is in the last line
            self._say(f"Stopping{'' if waits is None else f': {waits}'}. Ctrl-C again ends at once.")
        self.announced.set()

    def _end(self) -> None:
        """End the process now. Its children end with it."""
        what = f"Stopped at once; {self.kept}"
        if self.as_json and not self.quiet:
            document = {"error": {"what": what, "where": None, "fix": None}}
            with suppress(OSError):
                os.write(1, f"{json.dumps(document, indent=2)}\n".encode())
        elif not self.quiet:
            self._say(f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}{what}.")
        end_process(STOPPED)

    def _say(self, text: str) -> None:
        _write(f"{json_line('warning', text, at=time.time())}\n" if self.log_json else f"\n{text}\n")


def _write(text: str) -> None:
    """Write on stderr past its buffer, whose lock the main thread may hold."""
    with suppress(OSError):
        os.write(2, text.encode())
