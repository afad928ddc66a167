"""Steps that workers can import: they need only what Ray's environment has."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.core.workers import WorkerFailedError


def joined(shared: npt.NDArray[Any], part: npt.NDArray[Any], task: Task) -> npt.NDArray[Any]:
    """Both arrays as one."""
    task.advance()
    return np.concatenate([shared, part])


def lost(shared: str, part: int, task: Task) -> int:
    """Nothing: the process of the worker ends, as one that the system kills."""
    os._exit(9)


def unreachable(shared: str, part: int, task: Task) -> int:
    """Nothing: a service that the part needs, apart from the cluster, does not answer."""
    raise ConnectionError(shared)


def failing(file: str, part: int) -> tuple[int, int]:
    """The part and the process, except for part 1 in the first ``int`` processes that the file counts down."""
    left = int(Path(file).read_text())
    if part == 1 and left:
        Path(file).write_text(str(left - 1))
        raise WorkerFailedError("The engine stopped", where="here", fix="Try again.")
    return part, os.getpid()


def released() -> None:
    """Write the process into a file."""
    Path(os.environ["RELEASED"], str(os.getpid())).touch()


def timed(shared: float, part: int, task: Task) -> tuple[int, float, float]:
    """The part, and when it began and ended."""
    began = time.monotonic()
    time.sleep(shared)
    return part, began, time.monotonic()


def where(shared: float, part: int, task: Task) -> tuple[int, int]:
    """The part and the process, after some seconds."""
    time.sleep(shared)
    return part, os.getpid()


def refused_here(shared: int, part: int, task: Task) -> int:
    """The part; the process that is shared refuses it."""
    time.sleep(0.05)
    if os.getpid() == shared:
        raise UserError(f"Part {part} is refused", where="here", fix="None.")
    return part


def ready(needed: str) -> None:
    """Nothing: the machine needs nothing."""
