"""Another model's answers to the test prompts: from a file by pair key, or from an endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.evidence.schema import Item
from tunewright.model_io.client import Endpoint
from tunewright.model_io.replies import Conversation

REFERENCE_MODEL = "reference model"
"""Its name among the arms."""

_MISSING = "no answer of the reference model"


@dataclass(frozen=True)
class ReferenceAnswers:
    """The answers by pair key, and the reason for each item without one."""

    answers: Mapping[str, str]
    lacking: Mapping[str, str]


def asked_answers(
    endpoint: Endpoint, prompts: Sequence[Conversation], items: Sequence[Item], reporter: Reporter
) -> ReferenceAnswers:
    """Return the endpoint's answers to the prompts, which are in the items' order."""
    replies = endpoint.ask("Answers of the reference model", prompts)
    cut = sum(reply.finish == "length" for reply in replies)
    if cut:
        reporter.warn(
            f"{cut} of {len(replies)} answers of the reference model ran into its token limit and are judged as they "
            "are; raise max_tokens in judge.reference_model.parameters."
        )
    answered = list(zip(items, replies, strict=True))
    return ReferenceAnswers(
        {item.key: reply.text for item, reply in answered if reply.refused is None},
        {item.key: f"{_MISSING}: {reply.refused}" for item, reply in answered if reply.refused is not None},
    )


def read_answers(path: Path, items: Sequence[Item]) -> ReferenceAnswers:
    """Load the items' answers from a JSONL file of ``{"key": PAIR KEY, "answer": TEXT}``; other keys are ignored.

    Raises:
        UserError: the file cannot be read, a line has another form, a key is repeated, or an item has no answer.
    """
    where = "judge.reference_model.answers"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", where=where) from None
    answers: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, answer = row["key"], row["answer"]
        except (ValueError, KeyError, TypeError):
            key = answer = None
        if not isinstance(key, str) or not isinstance(answer, str):
            raise UserError('Expected {"key": PAIR KEY, "answer": TEXT}', where=f"{path}:{number}")
        if key in answers:
            raise UserError(f"Duplicate key {key[:12]}", where=f"{path}:{number}")
        answers[key] = answer
    missing = [item.key for item in items if item.key not in answers]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(items)} test items have no answer (first: {missing[0]})",
            where=str(path),
            fix="Use the pair keys of the evaluation's items.jsonl.",
        )
    return ReferenceAnswers({item.key: answers[item.key] for item in items}, {})
