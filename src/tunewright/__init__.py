"""Fine-tune open-weight models for your domain, and prove that they beat prompting."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright._version import __version__
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from tunewright.api import Project
    from tunewright.core.progress import Reporter

__all__ = ["UserError", "__version__", "open"]

_STAT = Path("/proc/stat")


def _is_busy() -> bool:
    """Return whether other programs use at least half of the cores now, and have done so for a while.

    A high load average alone may come from a program that has just ended.
    """
    cores = os.cpu_count() or 1
    if os.getloadavg()[0] <= cores / 2:
        return False
    if not _STAT.exists():  # not Linux
        return True
    running = []
    for _ in range(5):
        time.sleep(0.01)
        words = _STAT.read_text().split()
        running.append(int(words[words.index("procs_running") + 1]) - 1)  # without this process
    return sum(running) / len(running) >= cores / 2


# An OpenMP thread that waits for the others keeps its core busy for milliseconds before it sleeps. On a busy machine
# the thread that it waits for may need that core, so a thread spins for a shorter time and the run computes several
# times as fast (docs/decisions/0009-what-is-decided-by-the-clock.md). libgomp reads this when torch is imported.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() and _is_busy():
    os.environ["GOMP_SPINCOUNT"] = "3000"

if not any(Path(folder, "torch").is_dir() for folder in sys.path):
    # Without torch, only transformers' tokenizers are used, and transformers advises to install torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def open(root: str | Path = ".", reporter: Reporter | None = None) -> Project:  # noqa: A001
    """Open the project in folder ``root``. It has a method for each command: ``open(".").train()``.

    Without a ``reporter``, progress and warnings are printed on stderr or, in a program that configures logging, logged
    to ``tunewright``. ``logging.getLogger("tunewright").addHandler(logging.NullHandler())`` silences both.

    Raises:
        UserError: ``tunewright.yaml`` is missing or invalid.
    """
    from tunewright.config.project import ProjectFolder

    project = ProjectFolder(Path(root))
    _ = project.config  # refused before the packages of the API are imported
    from tunewright.api import Project

    return Project(project, reporter)
