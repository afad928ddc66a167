"""``estimate-memory``: whether training fits into memory, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from tunewright.cli.app import TRAIN, app, command
from tunewright.cli.console import MEASURED_NO, Session
from tunewright.training.memory_options import MemoryOptions

if TYPE_CHECKING:
    from tunewright.models.memory.plan import Plan

_PARTS = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "attention": "attention",
    "head": "output layer",
    "working": "working space",
    "allocator": "allocator",
    "runtime": "runtime",
}


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
        _parts_table(result),
        _fits_table(result),
        _summary(result),
    )
    return 0 if answer.fits else MEASURED_NO


def _heads(plan: Plan) -> list[str]:
    return [f"{p.setup.name}{', checkpointed' if p.setup.checkpointing else ''}" for p in plan.setups]


def _parts_table(plan: Plan) -> Table:

    from tunewright.models.memory.plan import gigabytes

    load = plan.asked
    sharing = f", the first {load.shared:,} shared" if load.shared else ""
    table = Table(
        title=f"Memory for {load.rows} x {plan.length:,} tokens{sharing}, {load.trained:,} of each row trained",
        title_justify="left",
    )
    table.add_column("part", no_wrap=True)
    for head in _heads(plan):
        table.add_column(head, justify="right")
    for part, name in _PARTS.items():
        table.add_row(name, *(gigabytes(getattr(p.asked, part)) for p in plan.setups))
    table.add_section()
    table.add_row("together", *(gigabytes(p.asked.total) for p in plan.setups))
    table.add_row("fits", *("yes" if p.asked.total <= plan.memory.bytes else "no" for p in plan.setups))
    return table


def _fits_table(plan: Plan) -> Table:

    from tunewright.models.memory.plan import MOST_ROWS

    table = Table(title="Largest micro-batch, in rows, by the tokens of each row", title_justify="left")
    table.add_column("", no_wrap=True)
    for length in plan.setups[0].largest:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    for head, planned in zip(_heads(plan), plan.setups, strict=True):
        cells = (
            f"{rows:,}+" if rows == MOST_ROWS else f"{rows:,}" if rows else "-" for rows in planned.largest.values()
        )
        table.add_row(head, *cells)
    return table


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
