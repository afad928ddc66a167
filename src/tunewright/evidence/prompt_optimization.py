"""The schema of ``prompts/ID.json``: an optimized prompt with its history; also the evidence's section on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.config import MetricName
from tunewright.evidence.common import Part
from tunewright.render.blocks import Block, Lead, Notes, Section, Table, table, words


class PromptCandidate(Part):
    """An instruction that the optimizer accepted."""

    instruction: str
    digest: Annotated[str, Field(description="12 hex digits of the instruction's SHA-256.")]
    parents: Annotated[tuple[int, ...], Field(description="Places of the instructions from which it was made.")]
    validation: Annotated[float, Field(description="Mean score on the validation rows, which are training rows.")]
    dev: Annotated[float | None, Field(description="Score on dev; null: not among the finalists.")] = None


class ReflectionUsage(Part):
    """The reflection model, and the cost of its replies."""

    model: str
    url: str
    parameters: dict[str, Any]
    calls: Annotated[int, Field(description="Replies that the optimization used, from this run or an earlier one.")]
    prompt_tokens: int
    completion_tokens: int
    estimated: Annotated[int, Field(description="Replies without token counts, whose tokens are guessed.")]
    cost: Annotated[float | None, Field(description="In the prices' currency; null: no prices.")]


class OptimizedPrompt(Part):
    """One optimization: the candidates with their scores, and the instruction that won on dev."""

    schema_version: Literal[1] = 1
    id: Annotated[str, Field(description="12 hex digits of a digest of everything that decides the optimization.")]
    created: Annotated[str, Field(description="UTC, ISO 8601.")]
    optimizer: Annotated[str, Field(description="Name and version of the optimizer.")]
    metric: MetricName
    place: Annotated[
        Literal["system", "beginning", "none"],
        Field(
            description="Place of the instruction: the system turn, the beginning of the user turns, or none, where a "
            "system turn is added."
        ),
    ]
    own: Annotated[str, Field(description="The pairs' own instruction, which is candidate 0; empty: none.")]
    candidates: tuple[PromptCandidate, ...]
    chosen: Annotated[int, Field(description="Place of the candidate with the best dev score; 0: the pairs' own.")]
    feedback_rows: Annotated[int, Field(description="Training rows that the reflection model could see.")]
    validation_rows: Annotated[int, Field(description="Training rows that scored the candidates.")]
    dev_items: int
    metric_calls: Annotated[int, Field(description="Scored answers of the base on training rows.")]
    proposals: Annotated[int, Field(description="Instructions that the reflection model proposed.")]
    reflection: ReflectionUsage
    stopped: Annotated[str, Field(description="Reason for the end of the search.")]
    notes: Annotated[tuple[str, ...], Field(description="Counted gaps, such as replies without an instruction.")]
    lineage: Annotated[dict[str, Any], Field(description="Digests of the dataset, base, template and other inputs.")]

    @property
    def best(self) -> PromptCandidate:
        """The chosen candidate."""
        return self.candidates[self.chosen]

    @property
    def instruction(self) -> str | None:
        """The optimized instruction; None if no candidate beats the pairs' own on dev."""
        return self.best.instruction if self.chosen else None

    @property
    def digest(self) -> str | None:
        """The optimized instruction's digest; None if there is none."""
        return self.best.digest if self.chosen else None

    @property
    def summary(self) -> str:
        """The optimization in a sentence or two."""
        usage = self.reflection
        cost = "" if usage.cost is None else f", cost {usage.cost:.4f}"
        search = (
            f"{self.optimizer} tried {self.proposals:,} instructions on {self.validation_rows:,} validation and "
            f"{self.feedback_rows:,} feedback rows of the training split, with {usage.model} as reflection model "
            f"({usage.calls:,} replies{cost}). It ended because {self.stopped}."
        )
        own, best = self.candidates[0].dev, self.best.dev
        assert own is not None
        assert best is not None
        if not self.chosen:
            return f"{search} No candidate beats the pairs' own instruction on dev ({100 * own:.1f})."
        return f"{search} The chosen one scores {100 * best:.1f} on dev, zero-shot, and the pairs' own {100 * own:.1f}."


NOT_RUN = (
    "No prompt optimizer was run: the search covers the pairs' own instruction and those of evaluate.instructions. "
    "`tunewright optimize-prompt` searches for a better one with a reflection model."
)


def optimization_section(prompt: OptimizedPrompt) -> Section:
    """Return the optimization's summary, its candidates and the chosen instruction."""
    blocks: list[Block] = [Lead(prompt.summary), _candidates(prompt)]
    notes = [f"The chosen instruction ({prompt.digest}): {prompt.instruction}"] if prompt.instruction else []
    notes += [f"Optimization: {note}." for note in prompt.notes]
    if notes:
        blocks.append(Notes(tuple(notes)))
    return Section("optimized-prompt", "The optimized prompt", tuple(blocks))


def _candidates(prompt: OptimizedPrompt) -> Table:
    head = ("Instruction", *words("Made from"), "Validation", "Dev", *words("Result"))
    rows = []
    for place, each in enumerate(prompt.candidates):
        parents = ", ".join(prompt.candidates[parent].digest if parent else "own" for parent in each.parents)
        scores = (f"{100 * each.validation:.1f}", "" if each.dev is None else f"{100 * each.dev:.1f}")
        name, result = each.digest if place else "the pairs' own", "chosen" if place == prompt.chosen else ""
        rows.append((name, parents, *scores, result))
    return table("Table of optimized instructions", head, rows)
