"""Section on the optimized instruction and its history."""

from __future__ import annotations

from tunewright.evidence.prompt_optimization import OptimizedPrompt
from tunewright.render.blocks import Block, Column, Lead, Notes, Section, Table, row, table


def section(prompt: OptimizedPrompt) -> Section:
    """Return the optimization's summary, its candidates and the chosen instruction."""
    blocks: list[Block] = [Lead(prompt.summary), _candidates(prompt)]
    notes = [f"The chosen instruction ({prompt.digest}): {prompt.instruction}"] if prompt.instruction else []
    notes += [f"Optimization: {note}." for note in prompt.notes]
    if notes:
        blocks.append(Notes(tuple(notes)))
    return Section("optimized-prompt", "The optimized prompt", tuple(blocks))


def _candidates(prompt: OptimizedPrompt) -> Table:
    head = ("Instruction", Column("Made from", words=True), "Validation", "Dev", Column("Result", words=True))
    rows = []
    for place, each in enumerate(prompt.candidates):
        parents = ", ".join(prompt.candidates[parent].digest if parent else "own" for parent in each.parents)
        rows.append(
            row(
                "the pairs' own" if place == 0 else each.digest,
                parents,
                f"{100 * each.validation:.1f}",
                "" if each.dev is None else f"{100 * each.dev:.1f}",
                "chosen" if place == prompt.chosen else "",
            )
        )
    return table("Table of optimized instructions", head, rows)
