"""Multiple-choice questions, answered by the choice that the model finds likeliest: lm-eval's ``acc_norm``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.chat import Tokens
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.evaluation.losses import answer_losses


@dataclass(frozen=True)
class Question:
    """A question, its choices and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    gold: int
    group: str | None = None
    """A passage or the like that the question shares with others; None if the file does not say."""


def read_questions(path: Path) -> list[Question]:
    """Load the questions of a JSONL file of objects with ``query``, ``choices`` and ``gold``.

    The format is that of MosaicML's llm-foundry. A ``group`` marks questions that belong together.

    Raises:
        UserError: the file cannot be read, or a line is not such an object (the message names file and line).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            choices, group = tuple(map(str, row["choices"])), row.get("group")
            question = Question(str(row["query"]), choices, int(row["gold"]), None if group is None else str(group))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"not a question with query, choices and gold ({error})", where=f"{path}:{number}"
            ) from None
        if not 0 <= question.gold < len(question.choices) or not all(question.choices):
            raise UserError("gold is none of the choices, or one is empty", where=f"{path}:{number}")
        questions.append(question)
    return questions


def chosen(model: Any, tokenizer: Any, questions: Sequence[Question], task: Task) -> list[int]:
    """Return the index of the likeliest choice per character; arguments as in :func:`likelihoods`."""
    return [likeliest(each) for each in likelihoods(model, tokenizer, questions, task)]


def likeliest(by_character: Sequence[float]) -> int:
    """Return the index of the likeliest choice, the first of equals."""
    return max(range(len(by_character)), key=by_character.__getitem__)


def likelihoods(model: Any, tokenizer: Any, questions: Sequence[Question], task: Task) -> list[list[float]]:
    """Return each choice's log-likelihood after "…\nAnswer:" divided by its characters.

    Follows lm-eval's ``acc_norm``, without a chat template. The tokenizer decides whether BOS comes first.

    Args:
        model: a transformers causal language model or a PeftModel over one, in evaluation mode.
        tokenizer: the base model's tokenizer.
        questions: at least one question.
        task: progress task, advanced by each question.
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


def tokens(tokenizer: Any, question: Question) -> int:
    """Return the length of the longest row that the question makes."""
    return max(len(_row(tokenizer, question, choice).ids) for choice in question.choices)


def _row(tokenizer: Any, question: Question, choice: str) -> Tokens:
    before = f"{question.text}\nAnswer:"
    whole: list[int] = tokenizer(f"{before} {choice}")["input_ids"]
    start = len(tokenizer(before)["input_ids"])
    assert 0 < start < len(whole)
    return Tokens(tuple(whole), tuple(place >= start for place in range(len(whole))))
