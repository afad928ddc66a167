"""OpenMP workers of a process, tested in a child process."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HELPERS = """
import os, torch
from tunewright.models.loading import release_openmp_threads
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
before = threads()
numbers = torch.arange(2**20, dtype=torch.float32)
norm = numbers.norm()
computing = threads()
release_openmp_threads()
after = threads()
print(computing - before, computing - after, bool(numbers.norm() == norm))
"""


def _said(script: str) -> str:
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_release_openmp_threads_keeps_no_workers_and_allows_new_ones() -> None:
    assert _said(HELPERS) == "2 2 True"
