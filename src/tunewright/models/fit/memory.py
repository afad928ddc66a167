"""Bytes that one training step needs, by part: arithmetic over a base's shape, nothing is loaded.

What a step keeps between forward and backward is what autograd saves, tensor by tensor, in transformers' Llama and
Mistral with PEFT's LoRA layers. The tests count those tensors (``torch.autograd.graph.saved_tensors_hooks``) and hold
these sums to them, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from tunewright.models.fit.shape import ATTENTION, MLP, Shape

FLOAT = 4
"""Bytes of a float32 number."""

_NF4_BLOCK = 64
_NF4_NESTED = 256
_NF4_TABLES = 4 * (16 + 256 + 1)
"""bitsandbytes keeps with each matrix: NF4's 16 values, the 256 of the nested quantisation, and its offset."""


@dataclass(frozen=True)
class Way:
    """One way of training an adapter."""

    targets: tuple[str, ...]
    rank: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nf4: bool = False
    """The linear layers' weights in 4-bit NormalFloat, doubly quantised (QLoRA)."""
    checkpointing: bool = False
    """Only each layer's input is kept; the backward pass computes the layer once more."""

    @property
    def number(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.dtype == "bfloat16" else FLOAT

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"QLoRA {self.dtype}" if self.nf4 else f"LoRA {self.dtype}"


@dataclass(frozen=True)
class Load:
    """What is in one micro-batch: rows that share a prefix, laid out as one packed row without padding."""

    rows: int
    shared: int
    """Tokens of the prefix that all rows share; computed once."""
    own: int
    """Tokens of each row after the prefix."""
    trained: int
    """Tokens of each row that have a label: the output layer runs on these alone."""

    def __post_init__(self) -> None:
        assert self.rows >= 1
        assert self.shared >= 0
        assert 0 < self.trained <= self.own + bool(self.shared)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.shared + self.rows * self.own

    @property
    def attended(self) -> int:
        """Keys that attention reads, the prefix's once for each row."""
        return self.rows * (self.shared + self.own)


@dataclass(frozen=True)
class Need:
    """Bytes by part at the moment when most are in use."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """What the layers keep for the backward pass, attention apart."""
    attention: int
    """What attention keeps: queries, keys, values, its output."""
    head: int
    """Logits of the trained tokens, and their gradients."""
    working: int
    """Needed for a moment only, by the layer at work."""
    runtime: int
    """The runtime's own, before any model."""

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())
