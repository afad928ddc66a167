"""``estimate-memory``: whether training fits into memory, before anything is loaded."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from tunewright.cli.app import TRAIN, app, command
from tunewright.cli.console import MEASURED_NO, Session
from tunewright.render.blocks import Block, Lead, table
from tunewright.training.options import MemoryOptions

if TYPE_CHECKING:
    from tunewright.models.memory.plan import Plan

_TITLES = {"head": "output layer", "working": "working space"}
"""Titles of parts that have other names in the code."""


@command(
    app,
    "estimate-memory",
    panel=TRAIN,
    example="tunewright estimate-memory --gpu 'RTX 4090'",
    status=False,
    options=MemoryOptions,
)
def estimate_memory(
    run: Session,
    options: MemoryOptions = MemoryOptions(),
) -> int:
    """Estimate whether training fits into memory (exit code 0) or not (3), by part, with the largest micro-batches.

    Computed from the base's config.json; no weights are downloaded or loaded. Your longest row is measured if the
    project has a dataset and the base's tokenizer is on this machine.
    """
    from tunewright.models.memory.plan import gigabytes

    result, answer = run.unopened.estimate_memory(options)
    setup = result.setups[0].setup
    run.show(
        {"answer": answer, **result.as_dict()},
        answer.text,
        f"{result.base}: {result.shape.parameters:,} parameters; LoRA of rank {setup.rank} on "
        f"{', '.join(setup.targets)}: {result.shape.adapter_parameters(setup.targets, setup.rank):,}\n"
        f"Memory: {gigabytes(result.memory.bytes)} ({result.memory.source})",
        *_parts_blocks(result),
        *_fits_blocks(result),
        _summary(result),
    )
    return 0 if answer.fits else MEASURED_NO


def _heads(plan: Plan) -> list[str]:
    return [f"{p.setup.name}{', checkpointed' if p.setup.checkpointing else ''}" for p in plan.setups]


def _parts_blocks(plan: Plan) -> tuple[Block, ...]:
    from tunewright.models.memory.plan import gigabytes

    load, setups = plan.asked, plan.setups
    sharing = f", the first {load.shared:,} shared" if load.shared else ""
    title = f"Memory for {load.rows} x {plan.length:,} tokens{sharing}, {load.trained:,} of each row trained"
    parts = (part.name for part in fields(setups[0].asked))
    rows = [(_TITLES.get(part, part), *(gigabytes(getattr(each.asked, part)) for each in setups)) for part in parts]
    rows.append(("together", *(gigabytes(each.asked.total) for each in setups)))
    rows.append(("fits", *("yes" if each.asked.total <= plan.memory.bytes else "no" for each in setups)))
    return (Lead(title), table(title, ("Part", *_heads(plan)), rows))


def _fits_blocks(plan: Plan) -> tuple[Block, ...]:
    from tunewright.models.memory.plan import MOST_ROWS

    def text(rows: int) -> str:
        return f"{rows:,}+" if rows == MOST_ROWS else f"{rows:,}" if rows else "-"

    title = "Largest micro-batch, in rows, by the tokens of each row"
    lengths = (f"{length:,}" for length in plan.setups[0].largest)
    rows = ((head, *map(text, each.largest.values())) for head, each in zip(_heads(plan), plan.setups, strict=True))
    return (Lead(title), table(title, ("Tokens", *lengths), rows))


def _summary(plan: Plan) -> str:
    lines = []
    for head, planned in zip(_heads(plan), plan.setups, strict=True):
        if not planned.longest:
            lines.append(f"{head}: does not fit, not even one row of one token.")
            continue
        at_length = [(length, rows) for length, rows in planned.largest.items() if rows]
        most = (
            "no listed length fits" if not at_length else f"at most {at_length[-1][1]:,} x {at_length[-1][0]:,} tokens"
        )
        lines.append(f"{head}: {most}; the longest single row is {planned.longest:,} tokens.")
    return "\n".join(lines)
