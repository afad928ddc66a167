"""Versions, and the card's limits: matrix products and copies."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu_cases.reporting import Report, peak_flops, seconds_of
from tunewright.models.loading import device

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel", "triton", "unsloth")
QUERIED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.sm", "clocks.mem", "temperature.gpu")


def run(report: Report, toy: bool) -> None:
    """Measure a square bfloat16 matrix product and a copy on the card."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    report("versions", None, **versions)
    place = device()
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        report("card", memory_bytes=memory, capability=capability, **driver_state())
    size = 256 if toy else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=place) for _ in range(2))
    flops = 2 * size**3 / seconds_of(lambda: a @ b, 20)
    peak = peak_flops()
    report("matrix product", size=size, tflops=flops / 1e12, of_peak=flops / peak if peak else None)
    source = torch.empty(1 << (22 if toy else 30), dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    # A copy reads each byte and writes it.
    report("copy", gb_s=2 * source.nbytes / seconds_of(lambda: target.copy_(source), 20) / 1e9)


def driver_state() -> dict[str, Any]:
    """Return what nvidia-smi says of the first card: driver, power limit, clocks and temperature."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia_smi": f"{type(error).__name__}: {error}"}
    return dict(zip(QUERIED, (value.strip() for value in line.split(",")), strict=True))
