"""The end of an engine's process together with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """End with the parent process, however that ends, even while the model is loading."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if sys.platform == "linux":
        # A hanging process does not read its input: Linux kills it (PR_SET_PDEATHSIG).
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


def _end_with_stdin() -> None:
    # Not through sys.stdin: Python would wait for its lock at exit.
    while os.read(0, 4096):
        pass
    os._exit(0)
