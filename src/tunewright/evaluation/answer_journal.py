"""The journal of answers: one file for each way of answering, a line for each answer as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import Quantize
from tunewright.core.io import digest

ENGINE = "decoding-2"
"""Part of every key with peft: to be counted up when a change of the decoding loop changes answers."""
VLLM = "vllm-1"
"""Part of every key with vLLM: to be counted up when a change of what vLLM is asked changes answers."""


@dataclass(frozen=True)
class Answer:
    """A prompt's answer as text. The token ids are in the decoding loop's `Completion`, not in the journal."""

    text: str
    truncated: bool
    """It reached the token limit."""
    prompt: tuple[int, ...]
    tokens: int
    """Tokens of the answer, with its end token, which a truncated answer lacks."""


@dataclass(frozen=True)
class Decoding:
    """All that decides an answer beside its prompt.

    Not the batch size: which rows share a batch differs from run to run anyway, as stopped ones go on, and moves an
    answer only where two tokens all but tie.
    """

    base: str
    template: str
    adapter: str | None
    """Digests of each."""
    dtype: str
    quantize: Quantize
    device: str
    """cpu or cuda: their kernels add up in different orders."""
    max_new_tokens: int
    stop: tuple[str, ...]
    grammar: str | None
    packages: Mapping[str, str]
    """Versions of those that make logits and text."""
    engine: str = ENGINE
    """Which one computes, and how it is asked."""

    @property
    def key(self) -> str:
        """SHA-256 over all of it."""
        return digest(asdict(self))


def read_answers(journal: Path) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield the digest of each prompt, and its answer: the text, and whether it was truncated."""
    if not journal.exists():
        return
    for line in journal.read_text(encoding="utf-8").split("\n"):
        try:
            row: Mapping[str, Any] = json.loads(line)
            yield row["prompt"], (row["text"], row["truncated"])
        except json.JSONDecodeError:
            # The last line of a run that was killed while writing it: that answer is made again.
            continue


@contextmanager
def appending(journal: Path) -> Iterator[TextIO]:
    """Open the journal for further lines."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        # Ends a half-written line, if there is one.
        file.write("\n")
        yield file
