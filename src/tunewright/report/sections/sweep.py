"""Section on a sweep: its trials at each rung, and their outcomes."""

from __future__ import annotations

from tunewright.render.blocks import Column, Lead, Row, Section, Table, cells, columns
from tunewright.training.sweep.ledger import Ledger, measured_text


def section(ledger: Ledger) -> Section:
    """Return each trial's dev result at each rung, and its outcome."""
    head = ledger.head
    lead = (
        f"Sweep {head.sweep}: {len(head.trials)} trials of at most {head.steps:,} steps, compared on the dev split; "
        "the test split stays closed."
    )
    rungs = (f"Rung {number}: step {step:,}" for number, step in enumerate(head.rungs, start=1))
    names = columns("Trial", *rungs, Column("Outcome", words=True))
    rows = tuple(_row(ledger, trial) for trial in head.trials)
    return Section("trials", "Trials", (Lead(lead), Table("Table of trials", names, rows)))


def _row(ledger: Ledger, trial: str) -> Row:
    found = (ledger.result(trial, number) for number in range(1, len(ledger.head.rungs) + 1))
    results = ("" if entry is None else measured_text(entry, ledger.head.metric) for entry in found)
    return Row(cells(trial, *results, ledger.outcome(trial)))
