"""Multiple-choice questions as a suite, with its controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.chat import Tokens
from tunewright.config.evaluate import FileSuite
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Task
from tunewright.evaluation.benchmarks.bench import (
    CONTROL_ITEMS,
    Bench,
    Floats,
    above_chance,
    above_floor,
    derangement,
    draw,
    expected_text,
    file_identity,
    item_lines,
    items_that_fit,
    suite_of,
)
from tunewright.evaluation.losses import answer_losses
from tunewright.evidence.benchmarks import Control, Suite
from tunewright.models.loading import context_length


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its choices and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    gold: int
    group: str | None = None
    """A passage or the like that the question shares with others; None if the file does not say."""

    @property
    def revealed(self) -> ChoiceQuestion:
        """The question after its right answer, for a control."""
        return replace(self, text=f"The right answer is: {self.choices[self.gold]}\n{self.text}")


def read_questions(path: Path) -> list[ChoiceQuestion]:
    """Load the questions of a JSONL file of objects with ``query``, ``choices`` and ``gold``.

    The format is that of MosaicML's llm-foundry. A ``group`` marks questions that belong together.
    """
    questions = []
    for where, line in item_lines(path):
        try:
            row = json.loads(line)
            choices, group = tuple(map(str, row["choices"])), row.get("group")
            question = ChoiceQuestion(
                str(row["query"]), choices, int(row["gold"]), None if group is None else str(group)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"Expected a question with query, choices and gold ({error})", where=where) from None
        if not 0 <= question.gold < len(question.choices) or not all(question.choices):
            raise UserError("gold must be the index of a choice, and no choice may be empty", where=where)
        questions.append(question)
    return questions


def likeliest(by_character: Sequence[float]) -> int:
    """Return the index of the likeliest choice, the first of equals."""
    return max(range(len(by_character)), key=by_character.__getitem__)


def likelihoods(model: Any, tokenizer: Any, questions: Sequence[ChoiceQuestion], task: Task) -> list[list[float]]:
    """Return each choice's log-likelihood after "…\nAnswer:" divided by its characters.

    Follows lm-eval's ``acc_norm``, without a chat template. The tokenizer decides whether BOS comes first.
    """
    rows = {
        (number, place): _row(tokenizer, question, choice)
        for number, question in enumerate(questions)
        for place, choice in enumerate(question.choices)
    }
    left = [len(question.choices) for question in questions]
    found = [[0.0] * len(question.choices) for question in questions]
    for part in answer_losses(model, rows, tokenizer.pad_token_id):
        for (number, place), loss in part.items():
            tokens = sum(rows[number, place].loss_mask)
            found[number][place] = -loss * tokens / len(questions[number].choices[place])
            left[number] -= 1
            task.advance(int(left[number] == 0))
    return found


def _row(tokenizer: Any, question: ChoiceQuestion, choice: str) -> Tokens:
    before = f"{question.text}\nAnswer:"
    whole: list[int] = tokenizer(f"{before} {choice}")["input_ids"]
    start = len(tokenizer(before)["input_ids"])
    assert 0 < start < len(whole)
    return Tokens(tuple(whole), tuple(place >= start for place in range(len(whole))))


_ENGINE = "choices-1"
_KEPT_AT_ONCE = 32  # questions
_TOLD_ITEMS = 50
_TOLD_AT_LEAST = 0.9


class ChoicesSuite:
    """A file of questions; an item scores 1 if the likeliest choice per character is right (acc_norm)."""

    def __init__(self, settings: FileSuite, root: Path, margin: float, seed: int) -> None:
        path = root / settings.file
        everything = read_questions(path)
        if len(everything) < 2:
            raise UserError(f"{len(everything)} questions are too few for a suite (at least 2)", where=str(path))
        self.name = Path(settings.file).stem
        self.questions = draw(everything, settings.limit, seed)
        self.margin = margin
        self.identity: dict[str, Any] = file_identity(_ENGINE, path, settings, margin)

    def expected(self) -> str:
        """Return a message on the number of items that the margin requires."""
        return expected_text(self.name, len(self.questions), self.margin)

    def measure(self, bench: Bench) -> Suite:
        """Measure the questions and the controls with the adapter off, then the questions with it on."""
        limit, tokenizer = context_length(bench.generator.base), bench.generator.chat.tokenizer

        def fits(question: ChoiceQuestion) -> bool:
            # The control that reveals the answer makes the longest rows.
            return all(len(_row(tokenizer, question.revealed, choice).ids) <= limit for choice in question.choices)

        long = f"questions are longer than the base's context of {limit:,} tokens"
        asked, left_out = items_that_fit(self.name, self.questions, fits, long, bench)
        if len(asked) < 2:
            raise UserError(f"No two questions fit the base's context of {limit:,} tokens", where=self.name)
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

    def _controls(
        self, bench: Bench, asked: Sequence[ChoiceQuestion], base: Floats, clusters: Sequence[str]
    ) -> list[Control]:
        chance = float(np.mean([1 / len(q.choices) for q in asked]))
        some = asked[:CONTROL_ITEMS]
        others = [
            replace(q, text=some[other].text) for q, other in zip(some, derangement(len(some), bench.seed), strict=True)
        ]
        mixed_up = self._scores(bench, others, None, "questions dealt to other choices")
        scores = self._scores(bench, [q.revealed for q in some[:_TOLD_ITEMS]], None, "answers given")
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

    def _scores(self, bench: Bench, asked: Sequence[ChoiceQuestion], adapter: Adapter | None, what: str) -> Floats:
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
