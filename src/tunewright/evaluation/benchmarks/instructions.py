"""Prompts whose answers are checked by rules, as a suite with its controls.

The file is in this project's own format, or in Google's for IFEval.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from tunewright.config.evaluate import InstructionsSuite as Settings
from tunewright.core.errors import UserError, first_fault
from tunewright.data.examples import Message
from tunewright.evaluation.benchmarks.bench import (
    Bench,
    above_floor,
    derangement,
    draw,
    expected_text,
    file_identity,
    item_lines,
    items_that_fit,
    suite_of,
)
from tunewright.evaluation.benchmarks.checks import Check
from tunewright.evaluation.generations import ArmAnswer, Prompt
from tunewright.evidence.benchmarks import Control, Suite
from tunewright.models.loading import context_length

_ENGINE = "instructions-1"
_TRUNCATED_SHARE = 0.05  # above this, the token limit may explain failed checks
_CHECK: TypeAdapter[Check] = TypeAdapter(Check)
_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

Values = Mapping[str, Any]


class InstructionsSuite:
    """A file of instructions; an item scores 1 if the greedy answer passes all of its checks."""

    def __init__(self, settings: Settings, root: Path, margin: float, seed: int) -> None:
        path = root / settings.file
        everything, unsupported = read_instructions(path)
        named = ", ".join(f"{name} ({count})" for name, count in unsupported.items())
        # A prompt may have two of them, so the counts by check do not add up to the prompts.
        count = len(item_lines(path)) - len(everything)
        self.left_out = [f"{count} prompts have a check that is not supported: {named}"] if unsupported else []
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
        """Measure the answers with the adapter off and on, and the controls."""
        asked, prompts, left_out = self._fitting(bench)
        clusters = bench.clusters(self.name, [i.prompt for i in asked], [i.group for i in asked])
        generator = bench.generator
        off = generator.answer(f"{self.name}, adapter off", prompts, self.limit)
        on = generator.answer(f"{self.name}, adapter on", prompts, self.limit, bench.adapter)
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

    def _truncated(self, bench: Bench, off: Sequence[ArmAnswer], on: Sequence[ArmAnswer]) -> tuple[int, int]:
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
        [Instruction("", (check,)).followed(text) for text in check.examples()] == [True, False] for check in checks
    ]
    return Control(
        name="texts made to pass and to fail each check",
        score=float(np.mean(right)),
        items=len(right),
        wanted="all distinguished",
        passed=all(right),
    )


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

    A line is ``{"prompt": …, "checks": [{"check": "words", "at_least": 300}, …]}``, or a line of
    Google's file, with ``instruction_id_list`` and ``kwargs``. A prompt with an unsupported check
    is left out as a whole. A ``group`` marks prompts that belong together.
    """
    found: list[Instruction] = []
    unsupported: Counter[str] = Counter()
    for where, line in item_lines(path):
        instruction, lacking = _read(line, where)
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
    "detectable_format:constrained_response": lambda _: {"check": "contains_one", "texts": _RESPONSES},
    "detectable_content:number_placeholders": lambda v: {"check": "placeholders", "at_least": v["num_placeholders"]},
    "detectable_content:postscript": lambda v: {"check": "postscript", "marker": v["postscript_marker"]},
    "combination:repeat_prompt": lambda v: {"check": "starts_with", "text": v["prompt_to_repeat"]},
    "startend:end_checker": lambda v: {"check": "ends_with", "text": v["end_phrase"]},
    "startend:quotation": lambda _: {"check": "quoted"},
    # Google's checks also ask a model whether the text is English; this is left out.
    "change_case:english_lowercase": lambda _: {"check": "case", "letters": "lower"},
    "change_case:english_capital": lambda _: {"check": "case", "letters": "upper"},
}
