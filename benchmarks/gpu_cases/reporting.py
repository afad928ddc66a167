"""Transport of measurements from a case's process to the parent, and measurements that all cases share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

PEAK_FLOPS = {
    "B200": 2250e12,
    "RTX PRO 6000": 503e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOP/s with float32 accumulation, from NVIDIA's data sheets, by a part of the card's name.

A name that contains another comes before it.
"""


class Report(Protocol):
    """The receiver of a case's measurements."""

    def __call__(self, name: str, passed: bool | None = None, **values: Any) -> None:
        """Send one measurement; ``passed`` says whether it met its bar (None: it has no bar)."""


class Skipped(Exception):  # noqa: N818  (nothing went wrong)
    """This case cannot run here; its text is the reason."""


def peak_flops() -> float | None:
    """Return the card's dense bfloat16 peak; None without a card or for one that is not listed."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_name()
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def synchronize() -> None:
    """Wait until the card has finished all submitted work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def host_syncs() -> Iterator[list[str]]:
    """Collect the calls in this block in which the host waits for the card; none without a card."""
    if not torch.cuda.is_available():
        yield []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waits: list[str] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits += [str(each.message) for each in caught if "synchroniz" in str(each.message)]


def seconds_of(work: Callable[[], Any], times: int) -> float:
    """Return the seconds of one call of ``work``, as a mean over ``times`` after one that is not counted."""
    work()
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - began) / times


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ||value - reference|| / ||reference||, in float64."""
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm())
