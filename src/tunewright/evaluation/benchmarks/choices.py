"""Multiple-choice questions as a suite, with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.config.general import FileSuite
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.evaluation.benchmarks.bench import (
    CONTROL_ITEMS,
    Bench,
    Floats,
    above_chance,
    above_floor,
    dealt,
    draw,
    expected_text,
    file_identity,
    fitting,
    suite_of,
)
from tunewright.evaluation.choices import Question, likeliest, likelihoods, read_questions, tokens
from tunewright.evidence.benchmarks import Control, Suite
from tunewright.models.loading import context_length

_ENGINE = "choices-1"
_KEPT_AT_ONCE = 32  # questions
_TOLD_ITEMS = 50
_TOLD_AT_LEAST = 0.9


class ChoicesSuite:
    """A file of questions; an item scores 1 if the likeliest choice per character is right (acc_norm).

    Raises:
        UserError: the file cannot be read, or has fewer than two questions.
    """

    def __init__(self, settings: FileSuite, root: Path, margin: float, seed: int) -> None:
        path = root / settings.file
        everything = read_questions(path)
        if len(everything) < 2:
            raise UserError(f"{len(everything)} questions make no suite", where=str(path))
        self.name = Path(settings.file).stem
        self.questions = draw(everything, settings.limit, seed)
        self.margin = margin
        self.identity: dict[str, Any] = file_identity(_ENGINE, path, settings, margin)

    def expected(self) -> str:
        """Return a message on the number of items that the margin requires."""
        return expected_text(self.name, len(self.questions), self.margin)

    def measure(self, bench: Bench) -> Suite:
        """Measure the questions and the controls with the adapter off, then the questions with it on.

        Raises:
            UserError: no two questions fit the base's context.
        """
        asked, left_out = self._fitting(bench)
        clusters = bench.clusters(self.name, [q.text for q in asked], [q.group for q in asked])
        base = self._scores(bench, asked, None, "adapter off")
        controls = self._controls(bench, asked, base, clusters)
        tuned = self._scores(bench, asked, bench.adapter, "adapter on")
        return suite_of(
            name=self.name,
            kind="choices",
            metric="acc_norm",
            base=base,
            tuned=tuned,
            clusters=clusters,
            margin=self.margin,
            controls=controls,
            seed=bench.seed,
            left_out=left_out,
        )

    def _fitting(self, bench: Bench) -> tuple[list[Question], list[str]]:
        limit, tokenizer = context_length(bench.generator.base), bench.generator.chat.tokenizer
        long = f"questions are longer than the base's context of {limit:,} tokens"
        # The control that reveals the answer makes the longest rows.
        asked, left_out = fitting(
            self.name, self.questions, lambda q: tokens(tokenizer, _told(q)) <= limit, long, bench
        )
        if len(asked) < 2:
            raise UserError(f"no two questions fit the base's context of {limit:,} tokens", where=self.name)
        return asked, left_out

    def _controls(
        self, bench: Bench, asked: Sequence[Question], base: Floats, clusters: Sequence[str]
    ) -> list[Control]:
        chance = float(np.mean([1 / len(q.choices) for q in asked]))
        some = asked[:CONTROL_ITEMS]
        others = [
            replace(q, text=some[other].text) for q, other in zip(some, dealt(len(some), bench.seed), strict=True)
        ]
        mixed_up = self._scores(bench, others, None, "questions dealt to other choices")
        scores = self._scores(bench, [_told(q) for q in some[:_TOLD_ITEMS]], None, "answers given")
        return [
            Control(
                name="the right answer given before the question",
                score=float(scores.mean()),
                items=len(scores),
                wanted=f"at least {_TOLD_AT_LEAST:.0%}",
                passed=bool(scores.mean() >= _TOLD_AT_LEAST),
            ),
            above_chance(base, clusters, chance, self.margin),
            above_floor(
                "choices under another question",
                base[: len(some)],
                mixed_up,
                clusters[: len(some)],
                self.margin,
                bench.seed,
            ),
        ]

    def _scores(self, bench: Bench, asked: Sequence[Question], adapter: Adapter | None, what: str) -> Floats:
        """Return 1 where the likeliest choice is the right one, [items]; known results are not computed again."""
        kept = bench.kept(_ENGINE, adapter)
        names = [digest([q.text, list(q.choices)]) for q in asked]
        missing = list(dict(pair for pair in zip(names, asked, strict=True) if pair[0] not in kept.known).items())
        if missing:
            with (
                bench.reporter.task(f"{self.name}, {what}", len(missing), "questions") as task,
                bench.generator.answering(adapter) as model,
            ):
                for start in range(0, len(missing), _KEPT_AT_ONCE):
                    part = missing[start : start + _KEPT_AT_ONCE]
                    found = likelihoods(model, bench.generator.chat.tokenizer, [q for _, q in part], task)
                    kept.add(dict(zip([name for name, _ in part], found, strict=True)))
        right = [likeliest(kept.known[name]) == q.gold for name, q in zip(names, asked, strict=True)]
        return np.array(right, dtype=np.float64)


def _told(question: Question) -> Question:
    return replace(question, text=f"The right answer is: {question.choices[question.gold]}\n{question.text}")
