"""Speed of the arms' answers on this machine, from two timed batches: short prompts and long ones."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import nnls

from tunewright.adapters.registry import Adapter
from tunewright.core.clock import now
from tunewright.core.io import digest, write_json
from tunewright.evaluation.generations import Generator, Prompt
from tunewright.training.packing.groups import common_prefix

_MOST_TOKENS = 8192
"""Prompt tokens of one timed batch: a few seconds on a CPU."""
_MOST_ROWS = 64
TIMED_TOKENS = 32
"""Longest timed answer in tokens."""

Prompts = Callable[[], Sequence[Prompt]]


class TimedBatch(BaseModel):
    """One timed batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    read: Annotated[float, Field(description="Prompt tokens that the rows do not share, over all rows.")]
    written: Annotated[float, Field(description="Answer tokens, over all rows.")]
    seconds: float
    cut: Annotated[int, Field(description="Answers that reached the token limit.")] = 0

    def answer(self, limit: int) -> float:
        """Return the token count of a mean answer; one that was cut for the timing counts up to the limit."""
        return (self.written + self.cut * max(limit - TIMED_TOKENS, 0)) / self.rows


class AnswerSpeed(BaseModel):
    """Seconds per prompt token and per answer token; kept in ``.tunewright/speeds``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measured: Annotated[str, Field(description="UTC, ISO 8601.")]
    batches: tuple[TimedBatch, ...]
    read: Annotated[float, Field(description="Seconds for each prompt token that is not shared with other prompts.")]
    write: Annotated[float, Field(description="Seconds for each answer token.")]

    def seconds(self, read: float, written: float) -> float:
        """Return the seconds of one answer in a batch as large as the timed one."""
        return read * self.read + written * self.write

    def answer_tokens(self, limit: int) -> tuple[float, float]:
        """Return the mean length of an answer without and with demonstrations."""
        return self.batches[0].answer(limit), self.batches[-1].answer(limit)

    @property
    def text(self) -> str:
        """The measurement in words."""
        return "; ".join(
            f"{b.rows} prompts of {b.read / b.rows:,.0f} tokens in {b.seconds:.1f} s" for b in self.batches
        )


def fitted(batches: Sequence[TimedBatch]) -> tuple[float, float]:
    """Return seconds per prompt token and per answer token: a non-negative least squares fit to timed batches."""
    rows = np.array([[b.read, b.written] for b in batches])
    scale = np.maximum(rows.max(axis=0), 1e-9)  # so that neither unit outweighs the other
    found, _ = nnls(rows / scale, np.array([b.seconds for b in batches]))
    read, write = found / scale
    return float(read), float(write)


def answer_speed(
    generator: Generator, limit: int, short: Prompts, long: Prompts, keyed: object, *, again: bool = False
) -> AnswerSpeed:
    """Return the base's speed on this machine: the kept one, or a new measurement.

    Args:
        generator: answers the prompts and journals the answers.
        limit: the longest answer in tokens.
        short: makes zero-shot prompts if no speed is kept.
        long: makes prompts with demonstrations; may return no prompts.
        keyed: other inputs of the speed, such as the rows' digest.
        again: measure it even if a speed is kept.
    """
    file = _file(generator, limit, None, keyed)
    if not again and (kept := _kept(file, AnswerSpeed)) is not None:
        return kept
    sides = [prompts for prompts in (short(), long()) if prompts]
    with generator.reporter.task("measuring the speed of answers", len(sides), "batches") as task:
        batches = []
        for prompts in sides:
            batches.append(_timed(generator, prompts, limit, None))
            task.advance()
    read, write = fitted(batches)
    speed = AnswerSpeed(measured=now(), batches=tuple(batches), read=read, write=write)
    write_json(file, speed.model_dump(mode="json"))
    return speed


def kept_speed(generator: Generator, limit: int, keyed: object) -> AnswerSpeed | None:
    """Return the base's earlier measurement, or None; the arguments are those of :func:`answer_speed`."""
    return _kept(_file(generator, limit, None, keyed), AnswerSpeed)


def kept_factor(generator: Generator, limit: int, adapter: Adapter, base: AnswerSpeed, keyed: object) -> float | None:
    """Return the adapter's earlier measurement, or None; the arguments are those of :func:`adapted_factor`."""
    batch = _kept(_file(generator, limit, adapter, keyed), TimedBatch)
    return None if batch is None else _factor(batch, base)


def adapted_factor(
    generator: Generator,
    limit: int,
    short: Prompts,
    adapter: Adapter,
    base: AnswerSpeed,
    keyed: object,
    *,
    again: bool = False,
) -> float:
    """Return the adapter's time per answer relative to the base: the kept ratio, or a new measurement.

    Args:
        again: measure it even if a ratio is kept.
        generator, limit, short, adapter, base, keyed: as in :func:`answer_speed`.
    """
    return _factor(adapted_batch(generator, limit, short, adapter, keyed, again=again), base)


def _factor(batch: TimedBatch, base: AnswerSpeed) -> float:
    expected = base.seconds(batch.read, batch.written)
    return batch.seconds / expected if expected else 1.0


def adapted_batch(
    generator: Generator, limit: int, short: Prompts, adapter: Adapter, keyed: object, *, again: bool = False
) -> TimedBatch:
    """Return a timed batch of the adapter's answers: the kept one, or a new measurement.

    Args:
        generator, limit, short, adapter, keyed, again: as in :func:`adapted_factor`.
    """
    file = _file(generator, limit, adapter, keyed)
    batch = None if again else _kept(file, TimedBatch)
    if batch is None:
        batch = _timed(generator, short(), limit, adapter)
        write_json(file, batch.model_dump(mode="json"))
    return batch


def latencies(generator: Generator, prompts: Sequence[Prompt], limit: int, adapter: Adapter) -> list[float]:
    """Return the seconds of each answer, one request at a time, after a short warm-up.

    Args:
        generator: its engine answers; its journal is neither read nor written.
        prompts: at least one.
        limit: the longest answer in tokens.
        adapter: the adapter that answers.
    """
    generator.generate(generator.requests(prompts[:1], 2, adapter), adapter=adapter)
    seconds = []
    with generator.reporter.task("measuring the latency of tuned", len(prompts), "answers") as task:
        for prompt in prompts:
            requests = generator.requests([prompt], limit, adapter)
            began = time.perf_counter()
            generator.generate(requests, adapter=adapter, at_once=1)
            seconds.append(time.perf_counter() - began)
            task.advance()
    return seconds


_Kept = TypeVar("_Kept", bound=BaseModel)


def _kept(file: Path, kind: type[_Kept]) -> _Kept | None:
    """Return the earlier measurement, or None if it is missing or unreadable."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _timed(generator: Generator, prompts: Sequence[Prompt], limit: int, adapter: Adapter | None) -> TimedBatch:
    kept = generator.kept(limit, adapter)
    # Uncached answers first, so that their time is not spent twice.
    chosen = sorted(dict.fromkeys(prompts), key=lambda prompt: digest(prompt) in kept)
    chosen = chosen[: min(generator.rows, _MOST_ROWS)]
    while len(chosen) > 1 and sum(map(len, chosen)) > _MOST_TOKENS:
        chosen.pop()
    chosen.sort()
    seconds, answers = generator.timed(chosen, limit, adapter)
    written = sum(answer.tokens for answer in answers)
    shared = common_prefix(chosen[0], chosen[-1]) if len(chosen) > 1 else 0
    read = sum(map(len, chosen)) - shared * (len(chosen) - 1)
    cut = sum(answer.truncated for answer in answers)
    return TimedBatch(rows=len(chosen), read=read, written=written, seconds=seconds, cut=cut)


def _file(generator: Generator, limit: int, adapter: Adapter | None, keyed: object) -> Path:
    decides = {
        **asdict(generator.decoding(limit, adapter)),
        "rows": generator.rows,
        "cores": os.cpu_count(),
        "keyed": keyed,
        **({} if generator.workers is None else {"worker": {"threads": generator.workers.threads}}),
    }
    return generator.folder.parent / "speeds" / f"{digest(decides)[:16]}.json"
