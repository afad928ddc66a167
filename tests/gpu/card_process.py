"""A process with a fake CUDA card: real shapes, devices, dtypes and bytes, and no kernels.

Functions of a test file run there, one after another, by the fixture ``card``::

    def _peak(rows: int) -> int:                      # at the top level of the file; it may import torch
        with FakeCard() as card:                      # from fake_card
            ...
        return card.peak

    def test_peak_grows_with_rows(card: CardProcess) -> None:
        assert card.run(_peak, 2) > card.run(_peak, 1)

What a function returns comes back; if it raises, `CardError` does. Each test file has a process of its own, started by
its first test, since the card has to be inserted before torch is imported and changes torch for the whole process.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

SOURCE = Path(__file__).with_name("guard.cpp")


class CardError(Exception):
    """An exception in the card's process, as its traceback in text: not every exception of torch can be sent."""


class CardProcess:
    """Runs functions in the process that has the card."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call a function of a test file there, and return what it returns.

        Raises:
            CardError: the function raised.
        """
        work: Any = _called
        result: Result = self._pool.submit(work, function, *args, **kwargs).result()
        return result


@contextmanager
def card_process(library: Path) -> Iterator[CardProcess]:
    """Start a process and insert the card, which is the library that `compiled` returned."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_insert, initargs=(str(library),)) as pool:
        yield CardProcess(pool)


def reason_to_skip() -> str | None:
    """Return why there can be no fake card here, or None."""
    if _compiler() is None:
        return "the fake card needs a C++ compiler (g++ or clang++)"
    if any((_torch() / "lib").glob("libtorch_cuda.*")):
        return "the fake card stands in for CUDA in builds of PyTorch without it, and this build has it"
    return None


def compiled(folder: Path) -> Path:
    """Compile guard.cpp for the torch that is installed, once for each folder."""
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:12]
    library = folder / f"guard-{key}.so"
    if library.exists():
        return library
    torch, compiler = _torch(), _compiler()
    assert compiler is not None
    includes = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    links = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / library.name
        command = [compiler, "-shared", "-fPIC", "-O1", "-std=c++20", *includes, str(SOURCE), "-o", str(made), *links]
        subprocess.run(command, check=True)
        made.replace(library)
    return library


def _called(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    try:
        return function(*args, **kwargs)
    except Exception:  # noqa: BLE001  (raised again in the test's process; without itself as a cause, which may not pickle)
        raise CardError(traceback.format_exc()) from None


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _torch() -> Path:
    """Return torch's folder without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _insert(library: str) -> None:
    """Insert the card into this process."""
    import sys

    assert "torch" not in sys.modules
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ctypes.CDLL(library)
    from fake_card import pretend

    pretend()
