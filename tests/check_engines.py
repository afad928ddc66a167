"""Install vLLM's CUDA build as `tunewright engine install vllm --build cuda` does, and import it. It needs no card.

python tests/check_engines.py FOLDER

It downloads 4 GB and needs 11 GB of free disk. FOLDER is removed, unless the installation failed: then the same command
resumes it. The exit code is 1 if a package cannot be installed or imported, if `pip check` finds a requirement that the
pins do not meet, or if pip took a torch without CUDA.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from release import say
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines.environment import VLLM, install

WITHOUT_CARD = f"{VLLM.title} cannot use a GPU on this machine"


class Printer(LogReporter):
    """Prints messages, and keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def say(self, message: str) -> None:
        say(message)

    def warn(self, message: str) -> None:
        say(f"Warning: {message}")
        self.warnings.append(message)


def main(folder: Path, **other: Any) -> int:
    """Return the exit code; ``other`` are options of `install`, for packages in place of vLLM."""
    # The user's cache would have `tunewright serve` start this build, and pip's cache would keep the downloads.
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "PIP_NO_CACHE_DIR": "1"}
    began, reporter = time.monotonic(), Printer()
    try:
        made = install(VLLM, reporter, to=folder / VLLM.name, build="cuda", **other)
    except UserError as error:
        say(f"FAILED: {error.what}")
        return 1
    problems = [warning for warning in reporter.warnings if not warning.startswith(WITHOUT_CARD)]
    if "+cpu" in made.versions["torch"]:
        problems.append(f"torch {made.versions['torch']} is a build without CUDA")
    size = sum(file.stat().st_size for file in made.folder.rglob("*") if file.is_file() and not file.is_symlink())
    say(f"{VLLM.title} (cuda): {made.versions}, {size / 1e9:.1f} GB, {time.monotonic() - began:.0f} s")
    # Also after problems: a complete environment is not checked again.
    shutil.rmtree(folder)
    if problems:
        say(f"FAILED: {'; '.join(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]).absolute()))
