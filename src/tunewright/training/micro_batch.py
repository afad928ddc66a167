"""Micro-batch size: chosen by one real pass, and halved if memory runs out later.

The data loader yields micro-batches of the config's size. A step that needs smaller chunks splits them itself. The loss
of every chunk is divided by the trained tokens of the whole step, so the chunks' gradients add up to the step's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.training import distributed

_FILE = "micro_batch.json"


@dataclass(frozen=True)
class RawRows:
    """A micro-batch's rows as the dataset has them, carried with the packed batch so that it can be split."""

    rows: tuple[Mapping[str, Any], ...]

    def pieces(self, size: int, as_of: int = 0) -> list[tuple[Mapping[str, Any], ...]]:
        """Split the rows into chunks of at most ``size``, as even as possible.

        Fewer rows than ``as_of`` make as many chunks as ``as_of`` rows would; some are then empty.
        """
        # No rows make one empty chunk: this process makes its pass with the others.
        count = max(1, -(-max(len(self.rows), as_of) // size))
        ends = [len(self.rows) * place // count for place in range(count + 1)]
        return [self.rows[start:end] for start, end in pairwise(ends)]


class MicroBatch:
    """The number of rows that go through the model at once.

    Args:
        asked: the config's.
        work: the run's working folder, which keeps the number: a resumed run uses the same one, and so adds up
            gradients in the same order.
        reporter: reports the choice and its reason.
    """

    def __init__(self, asked: int, work: Path, reporter: Reporter) -> None:
        self.asked = asked
        self.file = work / _FILE
        self.reporter = reporter
        self.rows: int | None = None
        """None until it is chosen."""
        if self.file.exists():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept["asked"] == asked:
                self.rows = kept["rows"]

    def choose(self, rows: int, tokens: int) -> None:
        """Record that the longest batch, of ``tokens`` tokens, fits in chunks of ``rows`` rows."""
        fewer = "" if rows == self.asked else f" of the {self.asked} requested"
        self.reporter.say(f"Micro-batch: {rows} rows{fewer}; the longest batch, {tokens:,} tokens, fits.")
        self._keep(rows)

    def halve(self, rows: int, step: int) -> int:
        """Return half of ``rows`` after memory ran out in ``step`` (0: before the first)."""
        if rows == 1:
            raise too_little_memory("one row does not fit")
        if step:
            self.reporter.warn(
                f"Memory ran out in step {step} with {rows} rows at once. This step is repeated with {rows // 2} rows, "
                "and later steps use as many. The batch size is unchanged."
            )
            self._keep(rows // 2)
        return rows // 2

    def _keep(self, rows: int) -> None:
        self.rows = rows
        if distributed.is_main_process():
            write_json(self.file, {"asked": self.asked, "rows": rows})


def too_little_memory(why: str) -> UserError:
    """Return the error for a shortage that no smaller micro-batch solves."""
    return UserError(
        f"Not enough memory for a training step: {why}",
        where="train.micro_batch_size",
        fix="Run `tunewright estimate-memory` to see what fits. Set train.quantization: nf4, lower train.max_length "
        "or use a smaller base.",
    )
