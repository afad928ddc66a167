"""Commands in which one call that changes a file fails, or at which the process is killed, stopped or delayed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
import tempfile
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from making.forked import Command

SOURCE = Path(__file__).with_name("faults.c")
SEED_VARIABLE = "TUNEWRIGHT_CHAOS_SEED"


class Kind(IntFlag):
    """Calls by what they change, as in faults.c."""

    WRITE = 1
    SYNC = 2
    RENAME = 4
    CREATE = 8
    REMOVE = 16


ALL = Kind.WRITE | Kind.SYNC | Kind.RENAME | Kind.CREATE | Kind.REMOVE


class Action(IntEnum):
    """Faults, as in faults.c."""

    NONE = 0
    FAIL = 1
    KILL = 2
    STOP = 3
    JUMP = 4


def seed() -> int:
    """Return the seed of this run: that of the environment, to replay a failure, or a new one."""
    return int(os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(10**6))))


def compiled(folder: Path) -> Path:
    """Compile faults.c, once for each folder."""
    library = folder / f"faults-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if library.exists():
        return library
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("faults are injected through a library, which needs a C compiler (cc, gcc or clang)")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / library.name
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(made), "-ldl"], check=True)
        made.replace(library)
    return library


def counted(command: Command) -> tuple[int, int, str]:
    """Return how many calls fitted, how often the fault fired, and at which call it first did."""
    content = (command.folder / "faults").read_bytes()
    calls, fired = struct.unpack("=qq", content[:16])
    return calls, fired, content[16:].split(b"\0")[0].decode()
