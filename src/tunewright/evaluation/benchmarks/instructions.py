"""Prompts whose answers are checked by rules, as a suite with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.config.regressions import InstructionsSuite as Settings
from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.evaluation.answer_journal import Answer
from tunewright.evaluation.benchmarks.bench import (
    Bench,
    above_floor,
    derangement,
    draw,
    expected_text,
    file_identity,
    items_that_fit,
    suite_of,
)
from tunewright.evaluation.benchmarks.ifeval import Instruction, read_instructions, unsupported_text
from tunewright.evaluation.generations import Prompt
from tunewright.evidence.benchmarks import Control, Suite
from tunewright.models.loading import context_length

_ENGINE = "instructions-1"
_TRUNCATED_SHARE = 0.05  # above this, the token limit may explain failed checks


class InstructionsSuite:
    """A file of instructions; an item scores 1 if the greedy answer passes all of its checks.

    Raises:
        UserError: the file cannot be read, or has fewer than two prompts whose checks are all supported.
    """

    def __init__(self, settings: Settings, root: Path, margin: float, seed: int) -> None:
        path = root / settings.file
        everything, unsupported = read_instructions(path)
        # A prompt may have two of them, so the counts by check do not add up to the prompts.
        lines = sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").split("\n"))
        self.left_out = [*unsupported_text(unsupported, lines - len(everything))]
        if len(everything) < 2:
            why = f": {self.left_out[0]}" if self.left_out else ""
            raise UserError(f"{len(everything)} prompts are too few for a suite (at least 2){why}", where=str(path))
        self.name = Path(settings.file).stem
        self.instructions = draw(everything, settings.limit, seed)
        self.limit = settings.max_new_tokens
        self.margin = margin
        self.identity: dict[str, Any] = file_identity(_ENGINE, path, settings, margin)

    def expected(self) -> str:
        """Return a message on the number of items that the margin requires, and on omitted prompts."""
        return "\n".join([expected_text(self.name, len(self.instructions), self.margin), *self.left_out])

    def measure(self, bench: Bench) -> Suite:
        """Measure the answers with the adapter off and on, and the controls.

        Raises:
            UserError: no two prompts fit the base's context with an answer.
        """
        asked, prompts, left_out = self._fitting(bench)
        clusters = bench.clusters(self.name, [i.prompt for i in asked], [i.group for i in asked])
        off = self._answers(bench, prompts, None, "adapter off")
        on = self._answers(bench, prompts, bench.adapter, "adapter on")
        base, tuned = (
            np.array([i.followed(a.text) for i, a in zip(asked, given, strict=True)], dtype=np.float64)
            for given in (off, on)
        )
        others = derangement(len(asked), bench.seed)
        mixed_up = [i.followed(off[other].text) for i, other in zip(asked, others, strict=True)]
        controls = [
            examples_control(asked),
            above_floor(
                "the base's answers to other prompts",
                base,
                np.array(mixed_up, dtype=np.float64),
                clusters,
                self.margin,
                bench.seed,
            ),
        ]
        return suite_of(
            name=self.name,
            kind="instructions",
            metric="all checks passed",
            base=base,
            tuned=tuned,
            clusters=clusters,
            margin=self.margin,
            controls=controls,
            seed=bench.seed,
            left_out=left_out,
            truncated=self._truncated(bench, off, on),
        )

    def _fitting(self, bench: Bench) -> tuple[list[Instruction], list[Prompt], list[str]]:
        limit = context_length(bench.generator.base) - self.limit
        rendered = [(i, bench.generator.chat.prompt([Message("user", i.prompt)])) for i in self.instructions]
        long = f"prompts do not fit the base's context with an answer of {self.limit:,} tokens"
        asked, left_out = items_that_fit(self.name, rendered, lambda pair: len(pair[1]) <= limit, long, bench)
        if len(asked) < 2:
            raise UserError(
                f"No two prompts fit the base's context with an answer of {self.limit:,} tokens",
                where=self.name,
                fix="Lower max_new_tokens of the suite.",
            )
        return [i for i, _ in asked], [p for _, p in asked], [*self.left_out, *left_out]

    def _answers(self, bench: Bench, prompts: Sequence[Prompt], adapter: Adapter | None, what: str) -> list[Answer]:
        return bench.generator.answer(f"{self.name}, {what}", prompts, self.limit, adapter)

    def _truncated(self, bench: Bench, off: Sequence[Answer], on: Sequence[Answer]) -> tuple[int, int]:
        cut = sum(a.truncated for a in off), sum(a.truncated for a in on)
        if max(cut) > _TRUNCATED_SHARE * len(off):
            bench.reporter.warn(
                f"{self.name}: {cut[0]} answers with the adapter off and {cut[1]} with it on, of {len(off)}, reached "
                f"the limit of {self.limit:,} tokens; checks may fail only because of it. Raise its max_new_tokens."
            )
        return cut


def examples_control(instructions: Sequence[Instruction]) -> Control:
    """Return the control that every check separates a passing text from a failing one, by the suite's scorer."""
    checks = [check for instruction in instructions for check in instruction.checks]
    right = [
        Instruction("", (check,)).followed(check.good()) and not Instruction("", (check,)).followed(check.bad())
        for check in checks
    ]
    return Control(
        name="texts made to pass and to fail each check",
        score=float(np.mean(right)),
        items=len(checks),
        wanted="all distinguished",
        passed=all(right),
    )
