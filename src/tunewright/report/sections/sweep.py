"""Section on a sweep: its trials at each rung, and their outcomes."""

from __future__ import annotations

from tunewright.metrics import axis_label
from tunewright.render.blocks import Column, Lead, Line, Lines, Row, Section, row, table
from tunewright.training.sweep.ledger import Ledger, measured_text


def section(ledger: Ledger) -> Section:
    """Return each trial's dev result at each rung, and its outcome."""
    head = ledger.head
    lead = (
        f"Sweep {head.sweep}: {len(head.trials)} trials of at most {head.steps:,} steps, compared on the dev split; "
        "the test split stays closed."
    )
    rungs = (f"Rung {number}: step {step:,}" for number, step in enumerate(head.rungs, start=1))
    names: tuple[str | Column, ...] = ("Trial", *rungs, Column("Outcome", words=True))
    trials = table("Table of trials", names, (_row(ledger, trial) for trial in head.trials))
    return Section("trials", "Trials", (Lead(lead), trials, lines(ledger)))


def _row(ledger: Ledger, trial: str) -> Row:
    found = (ledger.result(trial, number) for number in range(1, len(ledger.head.rungs) + 1))
    results = ("" if entry is None else measured_text(entry, ledger.head.metric) for entry in found)
    return row(trial, *results, ledger.outcome(trial))


def lines(ledger: Ledger) -> Lines:
    """Return the dev score of each trial at each rung, or the dev loss if no dev rows were answered."""
    head = ledger.head
    found = []
    for name in head.trials:
        results = [ledger.result(name, number) for number in range(1, len(head.rungs) + 1)]
        values = [(each.step, each.dev_loss if head.metric is None else each.dev_metric) for each in results if each]
        scale = 1 if head.metric is None else 100
        points = tuple((step, scale * value) for step, value in values if value is not None)
        found.append(Line(name, points, dots=True))
    axis = "Dev loss" if head.metric is None else f"Dev: {axis_label(head.metric)}"
    bounds = None if head.metric is None else (0.0, 100.0)
    return Lines("trials", f"{axis} of each trial by step", tuple(found), axis, bounds=bounds)
