"""The command line on a real (pseudo) terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import termios
import time
from pathlib import Path


class Terminal:
    """The command on a real (pseudo) terminal."""

    def __init__(self, *arguments: str | Path) -> None:
        self.screen = ""
        pid, self.handle = pty.fork()
        if pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
            os.execv(sys.executable, [sys.executable, "-m", "tunewright", *map(str, arguments)])
        self.pid = pid

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Until ``text`` has come on the screen since the last wait; a line may break at any of its spaces."""
        end = time.monotonic() + seconds
        seen, wanted = "", " ".join(text.split())
        while wanted not in " ".join(seen.split()):
            assert time.monotonic() < end, f"no {text!r} on the screen:\n{seen}"
            if select.select([self.handle], [], [], 0.2)[0]:
                try:
                    seen += os.read(self.handle, 65536).decode(errors="replace")
                except OSError:  # Linux: the other side has ended
                    break
        assert wanted in " ".join(seen.split()), seen
        self.screen += seen

    def press(self, key: str, seconds: float = 300) -> None:
        """Once the command waits for a key: what is typed before, on a row not yet shown, it forgets."""
        end = time.monotonic() + seconds
        while termios.tcgetattr(self.handle)[3] & termios.ICANON:
            assert time.monotonic() < end, "no key was asked for"
            time.sleep(0.01)
        os.write(self.handle, key.encode())

    def type(self, line: str, seconds: float = 300) -> None:
        """Enter a line that is not shown, once the command waits for one: what is typed before would be shown."""
        end = time.monotonic() + seconds
        while termios.tcgetattr(self.handle)[3] & termios.ECHO:
            assert time.monotonic() < end, "no secret was asked for"
            time.sleep(0.01)
        os.write(self.handle, f"{line}\n".encode())

    def code(self) -> int:
        """The exit code."""
        _, wait_status = os.waitpid(self.pid, 0)
        os.close(self.handle)
        return os.waitstatus_to_exitcode(wait_status)

    def kill(self) -> None:
        """End the command where it stands, with no chance to tidy up."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.code() == -signal.SIGKILL
