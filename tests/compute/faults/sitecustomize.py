"""Python imports this at the start of a raylet's processes, which then lose their machine at a chosen moment.

``MACHINE_KILLED_AT`` is a pattern of the file whose writing kills the machine, and ``MACHINE_KILLED`` a file that is
made by then, so that it happens once.
"""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
from contextlib import suppress
from typing import Any


def _kill(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and fnmatch.fnmatch(str(arguments[0]), os.environ["MACHINE_KILLED_AT"]):
        with suppress(FileExistsError):
            os.close(os.open(os.environ["MACHINE_KILLED"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getppid(), signal.SIGKILL)  # the raylet
            os.kill(os.getpid(), signal.SIGKILL)


if "MACHINE_KILLED_AT" in os.environ:
    sys.addaudithook(_kill)
