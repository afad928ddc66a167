"""The config's regressions section: suites that measure what the base could do before tuning."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from tunewright.config.section import Section

Margin = Annotated[
    float | None,
    Field(gt=0, lt=1, description="Largest acceptable drop, as a share (null: regressions.margin)."),
]


class FileSuite(Section):
    """A suite whose items are in a file."""

    file: Annotated[str, Field(min_length=1, description="JSON Lines, relative to this file.")]
    limit: Annotated[int | None, Field(ge=1, description="Number of items, drawn by the seed (null: all).")] = None
    margin: Margin = None


class InstructionsSuite(FileSuite):
    """Prompts whose answers rules can check."""

    max_new_tokens: Annotated[
        int, Field(ge=1, description="Longest answer in tokens (1280: lm-eval's setting for IFEval; fewer is faster).")
    ] = 1280


class LmEvalSuite(Section):
    """A task of EleutherAI's lm-evaluation-harness, which is an extra."""

    task: Annotated[str, Field(min_length=1, description="The task's name in lm-eval.")]
    include_path: Annotated[
        str | None, Field(min_length=1, description="A folder with your own task files, relative to this file.")
    ] = None
    metric: Annotated[
        str | None, Field(min_length=1, description="One of the task's metrics (null: acc_norm, else its first).")
    ] = None
    limit: Annotated[int | None, Field(ge=1, description="Number of items, from the task's beginning (null: all).")] = (
        None
    )
    num_fewshot: Annotated[
        int, Field(ge=0, description="Worked examples before each question (0: lm-eval's default).")
    ] = 0
    margin: Margin = None


def _named(key: str) -> BeforeValidator:
    """Return a validator that accepts a suite's name alone."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class RegressionsConfig(Section):
    """Suites of general capability, measured with the adapter off and on to show what tuning lost."""

    samples: Annotated[
        int,
        Field(
            ge=0,
            description="Conversations that the base writes, to measure their likelihood under the adapter; 0 turns "
            "this off (32: about 200 seconds of one core for a base of 135M parameters, most of them once per base).",
        ),
    ] = 32
    samples_margin: Annotated[
        float | None,
        Field(
            gt=0,
            description="Largest acceptable drop of that likelihood, in nats per token (null: reported, and not part "
            "of the verdict, because no general threshold is known).",
        ),
    ] = None
    multiple_choice: Annotated[
        tuple[Annotated[FileSuite, _named("file")], ...],
        Field(
            description="Files of multiple-choice questions: objects with query, choices and gold, and with group "
            "where several belong together. An entry is a file's name or {file: NAME, limit: 500, margin: 0.02}."
        ),
    ] = ()
    instruction_following: Annotated[
        tuple[Annotated[InstructionsSuite, _named("file")], ...],
        Field(
            description="Files of prompts with checks of the answer's form, such as Google's IFEval. Entries are as "
            "above, with max_new_tokens as a further setting."
        ),
    ] = ()
    lm_eval: Annotated[
        tuple[Annotated[LmEvalSuite, _named("task")], ...],
        Field(
            description="Tasks of lm-eval (pip install 'tunewright[lm-eval]'), such as hellaswag or "
            "{task: hellaswag, limit: 500}."
        ),
    ] = ()
    margin: Annotated[
        float,
        Field(gt=0, lt=1, description="Largest acceptable drop of a suite's score: 0.02 is 2 points."),
    ] = 0.02

    @property
    def measures(self) -> bool:
        """True if any suite is configured."""
        return bool(self.samples or self.multiple_choice or self.instruction_following or self.lm_eval)
