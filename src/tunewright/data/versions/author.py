"""Who makes a dataset version."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from pathlib import Path


def current_author(folder: Path) -> str | None:
    """Who is at work: git's user.name as it holds in this folder, else the login name, else nobody."""
    if shutil.which("git"):
        command = ["git", "config", "user.name"]
        told = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if name := " ".join(told.stdout.split()):
            return name
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a process whose user has no name, in a container for example
        return None
