"""The work of one training step on the fake card: FLOPs of products, bytes of everything, launches and host reads.

`training_step` runs in a process of `card_process` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fake_card import FakeCard
from fake_models import build, rows, train, use_stand_in_for_liger
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tunewright.models.families import Shape
from tunewright.models.memory_estimate import BatchShape

PRODUCT, ADAPTER, UNPACK, ATTENTION, ELEMENTWISE = KINDS = (
    "product", "adapter product", "4-bit unpacking", "attention", "elementwise",
)  # fmt: skip
"""Products with the base's weights and with LoRA's, unpacking of 4-bit weights, FlashAttention, and everything else."""

NARROW = 64
"""A product with a dimension of at most this is with LoRA's matrices; the base's are wider."""

_UNREAD = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full"}
"""Operations that write only."""
_LOOKUPS = {"embedding", "index_select", "gather", "index"}
"""Operations that read as much as they write."""


class Operation(NamedTuple):
    """One kernel's work."""

    kind: str
    name: str
    flops: int
    """Of a product: 2 for each multiplication. Attention, whose lengths are not known here, has 0."""
    bytes: int
    """Read and written, each tensor once."""


@dataclass
class Work:
    """A sum of operations. Counts of a difference may be negative: an optimizer's bytes grow with the layers."""

    operations: Counter[Operation]
    launches: int
    reads: int
    """Copies from the card to the host, for which the host waits."""

    def plus(self, other: Work, times: int) -> Work:
        """Return this work and ``times`` the other."""
        operations = Counter(self.operations)
        for operation, count in other.operations.items():
            operations[operation] += times * count
        return Work(operations, self.launches + times * other.launches, self.reads + times * other.reads)

    def count(self, kind: str) -> int:
        """Return the number of operations of this kind."""
        return sum(count for operation, count in self.operations.items() if operation.kind == kind)

    def bytes(self, kind: str) -> int:
        """Return the bytes of this kind's operations."""
        return sum(operation.bytes * count for operation, count in self.operations.items() if operation.kind == kind)

    def flops(self, kind: str) -> int:
        """Return the FLOPs of this kind's operations."""
        return sum(operation.flops * count for operation, count in self.operations.items() if operation.kind == kind)


class Recorder(FakeCard):
    """A fake card that records the work of each operation.

    Attributes:
        steps: the work up to each optimizer step, which it includes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.steps: list[Work] = []

    def record(self, func: Any, inputs: tuple[Any, ...], out: Any) -> None:
        """Record an operation by what it reads, writes and multiplies."""
        name: str = func._schema.name.split("::")[-1]
        written = _bytes((out,))
        if out is None:
            arguments = zip(func._schema.arguments, inputs, strict=False)
            written = _bytes(value for each, value in arguments if each.alias_info and each.alias_info.is_write)
        read = 0 if name in _UNREAD else written if name in _LOOKUPS else _bytes(inputs)
        kind, flops = ELEMENTWISE, 0
        if name.removesuffix("_") in ("mm", "bmm", "addmm", "baddbmm", "gemm_4bit"):
            left: Tensor = inputs["add" in name]
            flops = 2 * out.numel() * left.shape[-1]
            kind = ADAPTER if min(*out.shape[-2:], left.shape[-1]) <= NARROW else PRODUCT
            if name == "gemm_4bit":
                # bitsandbytes 0.50's kernel for more than 512 tokens: unpack the weight, then multiply.
                weight = 2 * out.shape[-1] * left.shape[-1]
                packed = read - left.nbytes
                self.operations[Operation(UNPACK, name, 0, packed + weight)] += 1
                read += weight - packed
        elif name.startswith("_varlen_attn"):
            kind = ATTENTION
        elif name.startswith("dequantize"):
            kind = UNPACK
        self.operations[Operation(kind, name, flops, read + written)] += 1
        if name == "_fused_adamw_":
            self.steps.append(
                Work(Counter(self.operations), sum(self.launches.values()), sum(sync.blocking for sync in self.syncs))
            )


def _bytes(values: Iterable[Any]) -> int:
    """Return the bytes of tensors on the card; an expanded one is read once."""
    tensors = (each for each in tree_leaves(list(values)) if isinstance(each, Tensor) and each.is_cuda)
    return sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in tensors)


def training_step(shape: Shape, load: BatchShape, settings: dict[str, Any]) -> Work:
    """Return the work of a step of ``tunewright train`` in one micro-batch, from one optimizer step to the next."""
    settings = {"preset": "all-linear", "epochs": 1, "batch_size": load.rows, "max_length": 1 << 17, **settings}
    if settings.get("use_liger_kernel"):
        use_stand_in_for_liger()
    with Recorder() as card:
        model = build(shape, nf4=settings.get("quantization") == "nf4")
        train(model, settings, rows(replace(load, rows=2 * load.rows)), rows(BatchShape(1, 0, 4, 2)))
    first, second = card.steps
    return second.plus(first, -1)
