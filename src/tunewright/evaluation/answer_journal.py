"""The answer journal: one file per decoding setup, with each answer appended as soon as it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tunewright.config import Quantization
from tunewright.core.io import digest
from tunewright.model_io.replies import Journal

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


def answer_journal(folder: Path, decoding: Decoding) -> Journal[tuple[str, bool]]:
    """Return the journal of answers so decoded: text and truncation by the digest of the prompt."""
    return Journal(
        folder / f"{decoding.key[:16]}.jsonl",
        lambda row: (row["prompt"], (row["text"], row["truncated"])),
        lambda prompt, answer: {"prompt": prompt, "text": answer[0], "truncated": answer[1]},
    )
