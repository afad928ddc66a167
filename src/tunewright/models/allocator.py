"""What becomes of memory between two passes of a model."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 * 2**20
"""The highest threshold that glibc documents: what is larger is still mapped, and given back at once."""


@cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory that a pass has freed for the next one, in this process from here on.

    Each pass makes and frees the same tensors, of some megabytes each. By default glibc gives them back to the system,
    which hands out the next ones page by page and clears each page first: half of the time that a pass takes to read
    prompts with adapters (benchmarks/adapter_passes.py). In exchange a process keeps the most that it ever had. Nothing
    happens where there is no glibc. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
