"""The format that all references share, and the answers that follow it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from tunewright.evidence.common import Part

ENOUGH = 0.95
"""Share of the references that must have a format for it to be the task's."""
_MOST_MASKS = 12
_FEWEST = 20
"""References needed to infer a format."""

Check = Callable[[str], bool]


class AnswerFormat(Part):
    """Counts of answers in the references' format."""

    what: Annotated[str, Field(description="The form, in words, such as: JSON with the fields name, date.")]
    items: int
    references: Annotated[int, Field(description="References of these items that have the form.")]
    answers: Annotated[dict[str, int], Field(description="Arm name to how many of its answers have the form.")]
    longer: Annotated[int, Field(description="References with more tokens than an answer may have.")] = 0


def answer_form(
    outputs: Sequence[str], references: Sequence[str], answers: Mapping[str, Sequence[str]], longer: int
) -> AnswerFormat | None:
    """Return the format of a task's outputs and how many answers follow it; None with too few outputs.

    The format is the first of these that 95% of the outputs have: JSON with the fields common to all; a label, if
    outputs are class-like; one of a dozen patterns of letters, digits and punctuation; a range of length and lines.

    Args:
        outputs: the outputs of all rows of the task.
        references: the references of the items answered.
        answers: arm name to its answers.
        longer: references with more tokens than an answer may have.
    """
    if len(outputs) < _FEWEST:
        return None
    what, check = _form(outputs)
    return AnswerFormat(
        what=what,
        items=len(references),
        references=sum(map(check, references)),
        answers={name: sum(map(check, given)) for name, given in answers.items()},
        longer=longer,
    )


def _form(outputs: Sequence[str]) -> tuple[str, Check]:
    for form in (_json, _label, _pattern):
        found = form(outputs)
        if found is not None and sum(map(found[1], outputs)) >= ENOUGH * len(outputs):
            return found
    return _length(outputs)


def _object(text: str) -> Any:
    """Return the JSON object or array in a text, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict | list) else None


def _json(outputs: Sequence[str]) -> tuple[str, Check] | None:
    values = [value for text in outputs if (value := _object(text)) is not None]
    if not values:
        return None
    objects = [value for value in values if isinstance(value, dict)]
    fields = Counter(key for value in objects for key in value)
    common = [key for key, count in fields.items() if count >= ENOUGH * len(outputs)]
    if not common:
        return "JSON", lambda text: _object(text) is not None
    return (
        f"JSON with the {'field' if len(common) == 1 else 'fields'} {', '.join(common)}",
        lambda text: isinstance(value := _object(text), dict) and all(key in value for key in common),
    )


def _label(outputs: Sequence[str]) -> tuple[str, Check] | None:
    from tunewright.data.examples import class_like

    stripped = [text.strip() for text in outputs]
    if not class_like(stripped):
        return None
    labels = set(stripped)
    return f"one of the {len(labels)} labels", lambda text: text.strip() in labels


def _mask(text: str) -> str:
    """Return a text with letters and digits masked and runs of them as one: ``2024-07-01`` is ``9-9-9``."""
    letters = re.sub(r"[^\W\d_]+", "a", text.strip())
    return re.sub(r"\d+", "9", letters)


def _pattern(outputs: Sequence[str]) -> tuple[str, Check] | None:
    masks = {mask for mask, _ in Counter(map(_mask, outputs)).most_common(_MOST_MASKS)}
    # Words without punctuation match any text.
    if all(re.fullmatch(r"a( a)*", mask) for mask in masks):
        return None
    example = Counter(map(_mask, outputs)).most_common(1)[0][0]
    sample = next(text.strip() for text in outputs if _mask(text) == example)
    return f"letters, digits and marks as in {sample!r}", lambda text: _mask(text) in masks


def _length(outputs: Sequence[str]) -> tuple[str, Check]:
    lengths = sorted(len(text.strip()) for text in outputs)
    low, high = lengths[len(lengths) // 100] // 2, 2 * lengths[-1 - len(lengths) // 100]
    lines = max(text.strip().count("\n") + 1 for text in outputs)
    counted = "1 line of" if lines == 1 else f"at most {lines:,} lines and"
    return (
        f"{counted} {low:,} to {high:,} characters",
        lambda text: low <= len(text.strip()) <= high and text.strip().count("\n") < lines,
    )
