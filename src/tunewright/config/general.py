"""The config's general section: what the base could do before, and must not lose."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from tunewright.config.section import Section

Margin = Annotated[
    float | None,
    Field(gt=0, lt=1, description="The drop that is still no loss, as a share (null: general.margin)."),
]


class FileSuite(Section):
    """A suite whose items are in a file."""

    file: Annotated[str, Field(min_length=1, description="JSON Lines, relative to this file.")]
    items: Annotated[int | None, Field(ge=1, description="So many of them, drawn by the seed (null: all).")] = None
    margin: Margin = None


class InstructionsSuite(FileSuite):
    """Prompts whose answers are checked by rules."""

    max_new_tokens: Annotated[
        int, Field(ge=1, description="Longest answer in tokens (1280: lm-eval's for IFEval; less is quicker).")
    ] = 1280


class LmEvalSuite(Section):
    """A task of EleutherAI's lm-evaluation-harness, which you install."""

    task: Annotated[str, Field(min_length=1, description="Its name in lm-eval.")]
    folder: Annotated[
        str | None, Field(min_length=1, description="A folder with task files of your own, relative to this file.")
    ] = None
    metric: Annotated[
        str | None, Field(min_length=1, description="One of the task's metrics (null: acc_norm, else its first).")
    ] = None
    items: Annotated[int | None, Field(ge=1, description="The first so many of the task (null: all).")] = None
    shots: Annotated[int, Field(ge=0, description="Worked examples before each question (0: lm-eval's default).")] = 0
    margin: Margin = None


def _named(key: str) -> BeforeValidator:
    """Return a suite may be given by its name alone."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class GeneralConfig(Section):
    """What the base could do before, measured with the adapter off and on: `evaluate` and `general` do it."""

    samples: Annotated[
        int,
        Field(
            ge=0,
            description="Conversations that the base writes itself, whose likelihood under the adapter is measured; 0: "
            "none (32: about 200 seconds of one core for a base of 135M parameters, most of them once for a base).",
        ),
    ] = 32
    samples_margin: Annotated[
        float | None,
        Field(
            gt=0,
            description="How much less likely these may become, in nats per token (null: told, and decides nothing: "
            "how many nats matter is known of no base beforehand).",
        ),
    ] = None
    choices: Annotated[
        tuple[Annotated[FileSuite, _named("file")], ...],
        Field(
            description="Files of questions with choices: objects with query, choices and gold, and a group where "
            "several belong together. Each a name, or {file: NAME, items: 500, margin: 0.02}."
        ),
    ] = ()
    instructions: Annotated[
        tuple[Annotated[InstructionsSuite, _named("file")], ...],
        Field(
            description="Files of prompts with checks of the answer's form, or of Google's IFEval; as above, with "
            "max_new_tokens besides."
        ),
    ] = ()
    lm_eval: Annotated[
        tuple[Annotated[LmEvalSuite, _named("task")], ...],
        Field(
            description="Tasks of lm-eval (pip install 'lm-eval[hf]'), such as hellaswag or "
            "{task: hellaswag, items: 500}."
        ),
    ] = ()
    margin: Annotated[
        float,
        Field(gt=0, lt=1, description="The drop of a suite that is still no loss: 0.02 is 2 points."),
    ] = 0.02

    @property
    def measures(self) -> bool:
        """True if there is any suite."""
        return bool(self.samples or self.choices or self.instructions or self.lm_eval)
