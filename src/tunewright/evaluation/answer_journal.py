"""The answer journal: one file per decoding setup, with each answer appended as soon as it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import Quantization
from tunewright.core.io import digest

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
    if not journal.exists():
        return
    for line in journal.read_text(encoding="utf-8").split("\n"):
        try:
            row: Mapping[str, Any] = json.loads(line)
            yield row["prompt"], (row["text"], row["truncated"])
        except json.JSONDecodeError:
            # A run was killed while it wrote the last line: that answer is computed again.
            continue


@contextmanager
def appending(journal: Path) -> Iterator[TextIO]:
    """Open the journal for appending."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        # Terminates a half-written line, if there is one.
        file.write("\n")
        yield file
