"""Part of the prompting section: the optimized instruction and its history, or that no optimizer was run."""

from __future__ import annotations

from tunewright.evidence.prompt_optimization import NOT_RUN, OptimizedPrompt
from tunewright.evidence.schema import Evidence
from tunewright.report.blocks import Block, Lead, Notes, Row, Table, cells, columns


def blocks(evidence: Evidence) -> tuple[Block, ...]:
    """Return the optimization's summary, its candidates and the chosen instruction."""
    prompt = evidence.prompt_optimization
    if prompt is None:
        return (Notes((NOT_RUN,)),)
    notes = [f"The chosen instruction ({prompt.digest}): {prompt.instruction}"] if prompt.instruction else []
    notes += [f"Optimization: {note}." for note in prompt.notes]
    return (Lead(prompt.summary), _candidates(prompt), *((Notes(tuple(notes)),) if notes else ()))


def _candidates(prompt: OptimizedPrompt) -> Table:
    head = columns("Instruction", "Made from", "Validation rows", "Dev", "")
    rows = []
    for place, each in enumerate(prompt.candidates):
        parents = ", ".join(prompt.candidates[parent].digest if parent else "own" for parent in each.parents)
        rows.append(
            Row(
                cells(
                    "the pairs' own" if place == 0 else each.digest,
                    parents,
                    f"{100 * each.validation:.1f}",
                    "" if each.dev is None else f"{100 * each.dev:.1f}",
                    "chosen" if place == prompt.chosen else "",
                )
            )
        )
    return Table("Table of optimized instructions", head, tuple(rows))
