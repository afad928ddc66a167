"""Memory plans: the available memory, the largest micro-batch of each length in it, and whether a config fits.

The memory of common GPUs is known by their names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.models.families import Shape
from tunewright.models.loading import device
from tunewright.models.memory_estimate import BatchShape, MemoryBreakdown, TrainingSetup, estimate

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", re.IGNORECASE)

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MOST_ROWS = 1024
"""Largest micro-batch that is tried: no config asks for more rows."""

_MEMORY_MIB = {
    "A10": 23028,
    "A10G": 23028,
    "A30": 24576,
    "A40": 46068,
    "A100 40GB": 40960,
    "A100 80GB": 81920,
    "B200": 183359,
    "H100 80GB": 81559,
    "H200": 143771,
    "L4": 23034,
    "L40S": 46068,
    "RTX 3090": 24576,
    "RTX 4070 Ti Super": 16376,
    "RTX 4080": 16376,
    "RTX 4090": 24564,
    "RTX 5070 Ti": 16303,
    "RTX 5080": 16303,
    "RTX 5090": 32607,
    "RTX 6000 Ada": 49140,
    "RTX A4000": 16376,
    "RTX A6000": 49140,
    "RTX PRO 6000": 97887,
    "T4": 15360,
    "V100 16GB": 16384,
    "V100 32GB": 32768,
}
"""The total that `nvidia-smi` shows: less than in the data sheet if ECC or the driver reserves a part."""
_LEFT_OUT = re.compile(r"nvidia|geforce|tesla|blackwell|generation|sxm\d?|pcie|hbm\d\w?|rtx|[\s_-]")
"""Parts of names, as torch and `nvidia-smi` print them, that distinguish no two GPUs of the table."""
_SIZE_OF_NAME = re.compile(r" \d+GB$")


@dataclass(frozen=True)
class Memory:
    """The memory available for training."""

    bytes: int
    card: bool
    """True for a CUDA GPU's memory, False for this machine's RAM."""
    source: str
    """The origin of the number, in words."""


def available_memory(gpu: str | None) -> Memory:
    """Return the memory of the GPU that ``gpu`` names (RTX 4090, 24GB), of the GPU present, or of this machine."""
    if gpu is not None:
        size = parse_size(gpu)
        if size is not None:
            return Memory(size, True, f"a GPU with {gpu}")
        name = card_named(gpu, "--gpu")
        return Memory(_MEMORY_MIB[name] << 20, True, f"{name}, {_MEMORY_MIB[name]:,} MiB in `nvidia-smi`")
    import torch

    if torch.cuda.is_available():
        own = device()
        free, _ = torch.cuda.mem_get_info(own)
        # The driver counts torch's cache as used, but the next model can have it.
        free += torch.cuda.memory_reserved(own) - torch.cuda.memory_allocated(own)
        return Memory(free, True, f"{gigabytes(free)} free on this machine's {torch.cuda.get_device_name(own)}")
    own_memory = machine_memory()
    return replace(own_memory, source=f"{own_memory.source}; no GPU is present")


def machine_memory() -> Memory:
    """Return the free memory of this machine or, if that is less, what is left to this container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = container_left()
    if limit is not None and limit < free:
        return Memory(limit, False, f"{gigabytes(limit)} left to this container")
    return Memory(free, False, f"{gigabytes(free)} free in this machine's memory")


def container_left(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that a control group leaves to this process; None without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class SetupPlan:
    """One training setup: memory of the requested batch, and the largest micro-batch by length."""

    setup: TrainingSetup
    asked: MemoryBreakdown
    largest: dict[int, int]
    """Rows that fit, by their length in tokens; 0 if not even one fits."""
    longest: int
    """Tokens of the longest single row that fits; 0 if none does."""

    @property
    def least(self) -> int:
        """The least bytes for the requested batch: the total without the assumed runtime."""
        return self.asked.total - self.asked.runtime


@dataclass(frozen=True)
class Plan:
    """All setups for training a base in some memory."""

    base: str
    shape: Shape
    memory: Memory
    asked: BatchShape
    length: int
    answer: int
    """Trained tokens of a row."""
    setups: tuple[SetupPlan, ...]
    recomputed: int | Literal["all"] | None
    """Layers that the config has training recompute; None: as few as fit."""

    @property
    def used(self) -> dict[bool, SetupPlan]:
        """The setups as `tunewright train` uses them where memory is shortest, by whether the base is in NF4."""
        most = "all" if self.recomputed is None else self.recomputed
        return {each.setup.nf4: each for each in self.setups if each.setup.recomputed == most}

    def need(self, setup: TrainingSetup, rows: int, length: int) -> MemoryBreakdown:
        """Return the need of a micro-batch of ``rows`` rows of ``length`` tokens, shared and trained as requested."""
        return estimate(self.shape, setup, _load(rows, length, self.asked.shared, self.answer))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for ``--json``, with all sizes in bytes."""
        return {
            "base": self.base,
            "parameters": self.shape.parameters,
            "memory": asdict(self.memory),
            "batch": {**asdict(self.asked), "length": self.length, "tokens": self.asked.tokens},
            "ways": [
                {
                    "name": planned.setup.name,
                    "gradient_checkpointing": planned.setup.recomputed != 0,
                    "recomputed_layers": planned.setup.recomputed_of(self.shape.layers),
                    "target_modules": list(planned.setup.targets),
                    "lora_r": planned.setup.rank,
                    "adapter_parameters": self.shape.adapter_parameters(planned.setup.targets, planned.setup.rank),
                    "bytes": asdict(planned.asked),
                    "total": planned.asked.total,
                    "fits": planned.asked.total <= self.memory.bytes,
                    "largest": [
                        {"length": length, "micro_batch_size": rows} for length, rows in planned.largest.items()
                    ],
                    "longest_row": planned.longest,
                }
                for planned in self.setups
            ],
        }


def plan(
    base: str,
    shape: Shape,
    settings: TrainConfig,
    memory: Memory,
    *,
    rows: int,
    length: int,
    answer: int,
    shared: int = 0,
    padded: bool = False,
) -> Plan:
    """Plan LoRA and QLoRA in this memory: with no layer recomputed, with all, and with the number in the config.

    ``shared`` tokens of each row are the prefix of all rows, and ``answer`` tokens are trained; of
    a shorter row, all after the prefix. ``padded`` rows share nothing.
    """
    setups, shared = [], 0 if padded else shared
    recomputed = recomputed_layers(settings, shape.layers, card=memory.card)
    numbers: list[int | Literal["all"]] = [0, "all"]
    if recomputed is not None and recomputed not in numbers:
        numbers.append(recomputed)
    asked = _load(rows, length, shared, answer)
    # NF4 would quantize next to nothing of a mixture of experts (models.families).
    for nf4 in (False,) if shape.experts else (False, True):
        for number in numbers:
            setup = replace(training_setup(settings, card=memory.card), nf4=nf4, recomputed=number, padded=padded)

            def fits(rows: int, length: int, setup: TrainingSetup = setup) -> bool:
                return estimate(shape, setup, _load(rows, length, shared, answer)).total <= memory.bytes

            largest = {
                each: _most(lambda n, each=each, fits=fits: fits(n, each), MOST_ROWS)  # type: ignore[misc]
                for each in LENGTHS
            }
            longest = _most(lambda n, fits=fits: fits(1, n), 1 << 20)  # type: ignore[misc]
            setups.append(SetupPlan(setup, estimate(shape, setup, asked), largest, longest))
    return Plan(base, shape, memory, asked, length, answer, tuple(setups), recomputed)


def training_setup(settings: TrainConfig, *, card: bool) -> TrainingSetup:
    """Return the setup of this config, with no layer recomputed."""
    return TrainingSetup(
        tuple(settings.target_modules),
        settings.lora_r,
        settings.dtype,
        nf4=settings.quantization == "nf4",
        card=card,
        dropout=settings.lora_dropout > 0,
    )


def recomputed_layers(settings: TrainConfig, layers: int, *, card: bool) -> int | Literal["all"] | None:
    """Return the number of layers that the config has training recompute; None if training chooses it."""
    asked = settings.gradient_checkpointing
    if asked == "auto":
        # Recomputing all layers costs a third of the speed, and LoRA on the CPU has enough memory.
        return None if card else 0
    if asked == "all" or asked == layers:
        return "all"
    if asked == "none":
        return 0
    if asked > layers:
        raise UserError(
            f"{asked:,} layers cannot be recomputed: the base has {layers:,}",
            where="train.gradient_checkpointing",
            fix=f"Set it to auto, all, none or a number up to {layers:,}.",
        )
    return asked


def fewest_recomputed(shape: Shape, setup: TrainingSetup, load: BatchShape, available: int) -> int:
    """Return the smallest number of recomputed layers with which a step fits; all layers if it fits with none."""

    def fits(kept: int) -> bool:
        need = estimate(shape, replace(setup, recomputed=shape.layers - kept), load)
        # The allocator's share twice: counted peaks are up to 5% above the estimate.
        return need.total + need.allocator <= available

    return shape.layers - _most(fits, shape.layers)


def _load(rows: int, length: int, shared: int, answer: int) -> BatchShape:
    own = max(1, length - shared)
    return BatchShape(rows, min(shared, length - own), own, min(answer, own))


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number from 1 to ``limit`` that fits, by bisection; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class MemoryCheck:
    """Result of checking whether the config's training fits into the memory."""

    fits: bool
    text: str
    """The result and its reason, in one or two sentences."""
    micro_batch_size: int
    """Rows that go through at once; 0 if not even one row fits."""
    length: int
    """Tokens of each of these rows."""
    longest_row: int | None
    """Tokens of the dataset's longest row in train or dev; None if unknown."""
    recomputed_layers: int
    """Layers that the backward pass computes again."""


def check_memory(
    plan: Plan, settings: TrainConfig, longest_row: int | None, *, rows: bool, length: bool
) -> MemoryCheck:
    """Check whether training fits, as `tunewright train` does it in this memory.

    Without ``rows`` the micro-batch may be halved until it fits, as training halves it. Without
    ``length`` rows of ``train.max_length`` tokens must fit, or at least the dataset's longest row.

    ``rows`` and ``length`` say if the user set them.
    """
    own, nf4 = plan.used[settings.quantization == "nf4"], plan.used.get(True)
    setup, available = own.setup, gigabytes(plan.memory.bytes)
    asked = plan.asked.rows
    yours = "" if longest_row is None else f"; your longest row has {longest_row:,} tokens"
    lengths = {plan.length: "."}
    if not length and longest_row is not None and longest_row < plan.length:
        lengths[longest_row] = f". train.max_length ({plan.length:,}) does not fit."
    for tokens, end in lengths.items():
        if many := _rows_that_fit(plan, setup, tokens, asked, halving=not rows):
            if plan.recomputed is None:
                load = _load(many, tokens, plan.asked.shared, plan.answer)
                setup = replace(setup, recomputed=fewest_recomputed(plan.shape, setup, load, plan.memory.bytes))
            layers, needed = setup.recomputed_of(plan.shape.layers), gigabytes(plan.need(setup, many, tokens).total)
            again = f", {layers} of {plan.shape.layers} layers recomputed" if layers or plan.memory.card else ""
            text = f"Fits: micro-batch {many} × {tokens:,} ({setup.name}{again}, {needed} of {available}){yours}{end}"
            return MemoryCheck(True, text, many, tokens, longest_row, layers)
    fewest, least = asked if rows else 1, min(lengths)
    needed = gigabytes(plan.need(setup, fewest, least).total)
    text = f"Does not fit: micro-batch {fewest} × {least:,} ({setup.name}) needs {needed} of {available}{yours}."
    # What fits instead, the change with the lowest cost first.
    if fewer := _rows_that_fit(plan, setup, least, fewest, halving=True):
        text += f" Micro-batch {fewer} × {least:,} does."
    if 0 < own.longest < least:
        text += f" The longest single row that fits has {own.longest:,} tokens."
    if nf4 is not None and nf4 != own and plan.need(nf4.setup, fewest, least).total <= plan.memory.bytes:
        text += " With train.quantization: nf4 it fits."
    return MemoryCheck(False, text, 0, least, longest_row, setup.recomputed_of(plan.shape.layers))


def _rows_that_fit(plan: Plan, setup: TrainingSetup, length: int, asked: int, *, halving: bool) -> int:
    """Return the rows that go through at once: the requested rows, or with ``halving`` the first half that fits."""
    while asked and plan.need(setup, asked, length).total > plan.memory.bytes:
        asked = asked // 2 if halving else 0
    return asked


def parse_size(text: str) -> int | None:
    """Return the bytes of a size such as ``24GB`` (10^9 bytes each) or ``24GiB`` (2^30); None if it is invalid."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()]) or None


def gigabytes(count: int) -> str:
    """Return bytes as text in units of 10^9, such as ``13.5 GB``."""
    return f"{count / 1e9:,.{1 if count >= 10**9 else 2}f} GB"


def card_named(text: str, where: str) -> str:
    """Return the GPU of the table that ``text`` names, such as ``RTX 4090``, ``h100`` or ``a100-80gb``."""
    wanted = _key(text)
    keys = {_key(name): name for name in _MEMORY_MIB}
    found = [name for name in _MEMORY_MIB if wanted in (_key(name), _key(_SIZE_OF_NAME.sub("", name)))]
    if len(found) == 1:
        return found[0]
    if found:
        both = " or ".join(name.replace(" ", "-").lower() for name in found)
        raise UserError(f"{text!r} exists with different memory sizes", where=where, fix=f"Write {both}.")
    parts = [name for key, name in keys.items() if key in wanted]
    near = [*parts, *(keys[key] for key in get_close_matches(wanted, keys, n=4, cutoff=0.5) if keys[key] not in parts)]
    raise UserError(
        f"{text!r} is neither a memory size nor a known GPU",
        where=where,
        fix=(f"Similar names: {', '.join(near)}. " if near else "") + "Or write its memory, such as 24GB or 24GiB.",
    )


def _key(name: str) -> str:
    return _LEFT_OUT.sub("", name.lower())


def unusable_card() -> str | None:
    """Return why a torch that is built for CUDA can use no GPU here.

    None if it uses one, if it is built without CUDA, or if CUDA_VISIBLE_DEVICES hides all GPUs.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # Torch's message states the cause first, and then advice.
        return str(error).split(" Please ")[0].strip().rstrip(".")
    return "torch finds no GPU"
