"""Files of instructions: prompts with checks, in this project's own format or Google's for IFEval."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tunewright.core.errors import UserError, first_fault
from tunewright.evaluation.benchmarks.checks import Check

_CHECK: TypeAdapter[Check] = TypeAdapter(Check)
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Instruction:
    """A prompt and the checks that its answer has to pass; at least one check."""

    prompt: str
    checks: tuple[Check, ...]
    group: str | None = None
    """A text or the like that the prompt shares with others; None if the file does not say."""

    def followed(self, answer: str) -> bool:
        """Return whether the answer passes all checks as written (IFEval's strict); an empty one never does."""
        return bool(answer.strip()) and all(check.passes(answer) for check in self.checks)


def read_instructions(path: Path) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a JSONL file, and the number of prompts for each unsupported check.

    A line is ``{"prompt": …, "checks": [{"check": "words", "at_least": 300}, …]}``, or one of Google's, with
    ``instruction_id_list`` and ``kwargs``. A prompt with an unsupported check is left out as a whole. A ``group`` marks
    prompts that belong together.

    Raises:
        UserError: the file cannot be read, or a line has neither format (the message names file and line).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"Cannot read the file: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8: {error.reason}", where=str(path)) from None
    found: list[Instruction] = []
    unsupported: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        instruction, lacking = _read(line, f"{path}:{number}")
        unsupported.update(lacking)
        if instruction is not None:
            found.append(instruction)
    return found, dict(unsupported.most_common())


def _read(line: str, where: str) -> tuple[Instruction | None, set[str]]:
    try:
        row = json.loads(line)
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("prompt must be text and not blank")
        if "instruction_id_list" in row:
            ids, values = row["instruction_id_list"], row["kwargs"]
            wanted = [_google(name, given) for name, given in zip(ids, values, strict=True)]
            lacking = {name for name, check in zip(ids, wanted, strict=True) if check is None}
        else:
            wanted, lacking = [dict(check) for check in row["checks"]], set()
        if lacking:
            return None, lacking
        if not wanted:
            raise ValueError("checks is empty")
        checks, group = tuple(_CHECK.validate_python(check) for check in wanted), row.get("group")
        return Instruction(prompt, checks, None if group is None else str(group)), set()
    except ValidationError as error:
        raise UserError(
            f"Invalid check: {first_fault(error)}",
            where=where,
            fix="See docs/how-to/regression-suites.md for the checks and their arguments.",
        ) from None
    except KeyError as error:
        raise UserError(f"Expected an object with prompt and checks: {error} is missing", where=where) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"Expected an object with prompt and checks: {error}", where=where) from None


def _google(name: str, given: Values) -> dict[str, Any] | None:
    """Return the equivalent of one of Google's checks, or None if there is no equivalent."""
    make = _GOOGLE.get(name)
    # Copies of the file name every keyword on every line, most of them with null.
    return None if make is None else make({key: value for key, value in given.items() if value is not None})


def _related(values: Values, number: str, relation: str = "relation") -> dict[str, int]:
    least = {"at least": True, "less than": False}[values[relation]]
    return {"at_least": values[number]} if least else {"at_most": values[number] - 1}


def _exactly(number: int) -> dict[str, int]:
    return {"at_least": number, "at_most": number}


_GOOGLE: Mapping[str, Callable[[Values], dict[str, Any]]] = {
    "punctuation:no_comma": lambda _: {"check": "occurrences", "of": ",", "at_most": 0},
    "length_constraints:number_words": lambda v: {"check": "words", **_related(v, "num_words")},
    "length_constraints:number_sentences": lambda v: {"check": "sentences", **_related(v, "num_sentences")},
    "length_constraints:number_paragraphs": lambda v: {
        "check": "paragraphs",
        "separator": "***",
        **_exactly(v["num_paragraphs"]),
    },
    "keywords:forbidden_words": lambda v: {"check": "forbids", "words": v["forbidden_words"]},
    "keywords:existence": lambda v: {"check": "contains", "texts": v["keywords"]},
    "keywords:frequency": lambda v: {"check": "occurrences", "of": v["keyword"], **_related(v, "frequency")},
    "keywords:letter_frequency": lambda v: {
        "check": "occurrences",
        "of": v["letter"],
        **_related(v, "let_frequency", "let_relation"),
    },
    "detectable_format:number_highlighted_sections": lambda v: {"check": "highlights", "at_least": v["num_highlights"]},
    "detectable_format:number_bullet_lists": lambda v: {"check": "bullets", **_exactly(v["num_bullets"])},
    "detectable_format:multiple_sections": lambda v: {
        "check": "sections",
        "marker": v["section_spliter"],
        "at_least": v["num_sections"],
    },
    "detectable_format:title": lambda _: {"check": "title"},
    "detectable_format:json_format": lambda _: {"check": "json"},
    "detectable_format:constrained_response": lambda _: {"check": "contains_one", "texts": _OPTIONS},
    "detectable_content:number_placeholders": lambda v: {"check": "placeholders", "at_least": v["num_placeholders"]},
    "detectable_content:postscript": lambda v: {"check": "postscript", "marker": v["postscript_marker"]},
    "combination:repeat_prompt": lambda v: {"check": "starts_with", "text": v["prompt_to_repeat"]},
    "startend:end_checker": lambda v: {"check": "ends_with", "text": v["end_phrase"]},
    "startend:quotation": lambda _: {"check": "quoted"},
    # Google's also ask a model whether the text is English; this is left out.
    "change_case:english_lowercase": lambda _: {"check": "case", "letters": "lower"},
    "change_case:english_capital": lambda _: {"check": "case", "letters": "upper"},
}


def unsupported_text(unsupported: Mapping[str, int], left_out: int) -> Sequence[str]:
    """Return a message on prompts that are left out for an unsupported check."""
    if not unsupported:
        return []
    named = ", ".join(f"{name} ({count})" for name, count in unsupported.items())
    return [f"{left_out} prompts have a check that is not supported: {named}"]
