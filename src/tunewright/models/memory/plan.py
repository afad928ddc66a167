"""What fits: the memory at hand, and the largest micro-batch of each length in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.config import TrainConfig
from tunewright.models.cards import card_named
from tunewright.models.loading import device
from tunewright.models.memory.estimate import Load, Need, Way, need
from tunewright.models.memory.shape import Shape
from tunewright.models.memory.sizes import gigabytes, parse_size

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MOST_ROWS = 1024
"""Micro-batches are tried up to this many rows: no config asks for more."""


@dataclass(frozen=True)
class Memory:
    """The memory that training is to fit into."""

    bytes: int
    card: bool
    """On a CUDA card; else this machine's own."""
    source: str
    """Where the number is from, in words."""


def memory_at_hand(gpu: str | None) -> Memory:
    """Return the memory of a card that ``gpu`` names (RTX 4090, 24GB); else of the card present; else of this machine.

    Raises:
        UserError: ``gpu`` is neither a size nor a known card.
    """
    if gpu is not None:
        size = parse_size(gpu)
        if size is not None:
            return Memory(size, True, f"a card with {gpu}")
        card = card_named(gpu, "--gpu")
        return Memory(card.bytes, True, f"{card.name}, {card.bytes >> 20:,} MiB in `nvidia-smi`")
    import torch

    if torch.cuda.is_available():
        own = device()
        free, _ = torch.cuda.mem_get_info(own)
        # What torch keeps of models that are gone counts as used with the driver, and goes to the next one.
        free += torch.cuda.memory_reserved(own) - torch.cuda.memory_allocated(own)
        return Memory(free, True, f"{gigabytes(free)} free on the card here, {torch.cuda.get_device_name(own)}")
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = container_left()
    if limit is not None and limit < free:
        return Memory(limit, False, f"{gigabytes(limit)} left to this container; no card is present")
    return Memory(free, False, f"{gigabytes(free)} free in this machine's memory; no card is present")


def container_left(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a control group leaves to this process; None where there is no limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Planned:
    """One way of training: what the asked batch needs, and the largest micro-batch of each length."""

    way: Way
    asked: Need
    largest: dict[int, int]
    """Rows that fit, by their length in tokens; 0 where not even one does."""
    longest: int
    """Tokens of the longest single row that fits; 0 where none does."""

    @property
    def least(self) -> int:
        """Bytes without which not even the asked batch can be trained: the runtime's own are an assumption."""
        return self.asked.total - self.asked.runtime


@dataclass(frozen=True)
class Plan:
    """All ways of training a base in some memory."""

    base: str
    shape: Shape
    memory: Memory
    asked: Load
    length: int
    answer: int
    """Trained tokens of a row that has them."""
    ways: tuple[Planned, ...]

    def need(self, way: Way, rows: int, length: int) -> Need:
        """Return what a micro-batch of ``rows`` rows of ``length`` tokens needs, shared and trained as was asked."""
        return need(self.shape, way, _load(rows, length, self.asked.shared, self.answer))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as ``--json`` prints it; bytes everywhere."""
        return {
            "base": self.base,
            "parameters": self.shape.parameters,
            "memory": asdict(self.memory),
            "batch": {**asdict(self.asked), "length": self.length, "tokens": self.asked.tokens},
            "ways": [
                {
                    "name": planned.way.name,
                    "gradient_checkpointing": planned.way.checkpointing,
                    "target_modules": list(planned.way.targets),
                    "lora_r": planned.way.rank,
                    "adapter_parameters": self.shape.adapter_parameters(planned.way.targets, planned.way.rank),
                    "bytes": asdict(planned.asked),
                    "total": planned.asked.total,
                    "fits": planned.asked.total <= self.memory.bytes,
                    "largest": [
                        {"length": length, "micro_batch_size": rows} for length, rows in planned.largest.items()
                    ],
                    "longest_row": planned.longest,
                }
                for planned in self.ways
            ],
        }


def plan(
    base: str, shape: Shape, settings: TrainConfig, memory: Memory, *, rows: int, length: int, shared: int, answer: int
) -> Plan:
    """LoRA and QLoRA, with and without gradient checkpointing, in this memory.

    Args:
        base: its name.
        shape: its sizes.
        settings: targets, rank, dtype and dropout.
        memory: what it has to fit into.
        rows, length: of the batch whose parts are told.
        shared: tokens at the beginning of each row that all rows share.
        answer: trained tokens of each row; of a shorter row, all that it has of its own.
    """

    ways = []
    asked = _load(rows, length, shared, answer)
    # Of a mixture of experts NF4 would hold next to nothing (models.families).
    for nf4 in (False,) if shape.experts else (False, True):
        for checkpointing in (False, True):
            way = Way(
                tuple(settings.target_modules),
                settings.lora_r,
                settings.dtype,
                nf4=nf4,
                checkpointing=checkpointing,
                card=memory.card,
                dropout=settings.lora_dropout > 0,
            )

            def fits(rows: int, length: int, way: Way = way) -> bool:
                return need(shape, way, _load(rows, length, shared, answer)).total <= memory.bytes

            largest = {
                each: _most(lambda n, each=each, fits=fits: fits(n, each), MOST_ROWS)  # type: ignore[misc]
                for each in LENGTHS
            }
            longest = _most(lambda n, fits=fits: fits(1, n), 1 << 20)  # type: ignore[misc]
            ways.append(Planned(way, need(shape, way, asked), largest, longest))
    return Plan(base, shape, memory, asked, length, answer, tuple(ways))


def _load(rows: int, length: int, shared: int, answer: int) -> Load:
    own = max(1, length - shared)
    return Load(rows, min(shared, length - own), own, min(answer, own))


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number from 1 to ``limit`` that fits, where all below one that fits do too; 0 for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
