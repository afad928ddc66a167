"""Answers to a few dev rows at each evaluation, kept in a run's working folder; read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tunewright.core.errors import UserError

DEV_ANSWERS = "dev_answers.jsonl"
SHOWN = 5
"""Rows whose answers are kept."""


def append_dev_answers(work: Path, step: int, answers: Mapping[str, str]) -> None:
    """Add the answers after a step, by the rows' pair keys."""
    with (work / DEV_ANSWERS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "answers": answers}, ensure_ascii=False) + "\n")


def read_dev_answers(work: Path) -> dict[int, dict[str, str]]:
    """Return the answers by step and pair key; empty before the first evaluation.

    A resumed run repeats evaluations after its checkpoint: the last line of a step counts. A last line without its end
    is still being written.

    Raises:
        UserError: a line is damaged.
    """
    file = work / DEV_ANSWERS
    if not file.exists():
        return {}
    found: dict[int, dict[str, str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            found[int(row["step"])] = {str(key): str(text) for key, text in row["answers"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError("Not a line of answers", where=f"{file}:{number}", fix="Remove the file.") from None
    return found
