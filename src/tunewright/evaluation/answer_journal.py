"""The answer journal: one file per decoding setup, with each answer appended as soon as it is complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tunewright.config import Quantization
from tunewright.core.io import digest
from tunewright.core.log import read_journal

ENGINE = "decoding-2"
"""Part of every key with peft: increment it when a change to the decoding loop changes answers."""
VLLM = "vllm-1"
"""Part of every key with vLLM: increment it when a change to the vLLM requests changes answers."""


@dataclass(frozen=True)
class Answer:
    """The text of an answer. The token ids are in the decoding loop's `Completion`, not in the journal."""

    text: str
    truncated: bool
    """The answer reached the token limit."""
    prompt: tuple[int, ...]
    tokens: int
    """Token count of the answer, including its end token, which a truncated answer lacks."""


@dataclass(frozen=True)
class Decoding:
    """Everything that decides an answer apart from its prompt.

    The batch size is left out. Resumed runs batch rows differently anyway, and that changes an answer only where two
    tokens nearly tie.
    """

    base: str
    template: str
    adapter: str | None
    """Digests of each."""
    dtype: str
    quantization: Quantization
    device: str
    """cpu or cuda: their kernels add in different orders."""
    max_new_tokens: int
    stop: tuple[str, ...]
    grammar: str | None
    packages: Mapping[str, str]
    """Versions of the libraries that produce logits and text."""
    engine: str = ENGINE
    """The engine that computes, and its settings."""

    @property
    def key(self) -> str:
        """SHA-256 over all fields."""
        return digest(asdict(self))


def read_answers(journal: Path) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield the digest of each prompt with its answer."""
    return ((row["prompt"], (row["text"], row["truncated"])) for row in read_journal(journal))
