"""What a sweep and a learning curve came to, as people read it and as ``--json`` prints it."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table

from tunewright.core.progress import duration
from tunewright.evidence.learning_curve import Curve, more_data
from tunewright.metrics import score_text
from tunewright.training.sweep.ledger import Entry
from tunewright.training.sweep.successive_halving import measured_text
from tunewright.training.sweep.sweep import SweepResult


def sweep_tables(result: SweepResult, written: dict[str, Any]) -> list[RenderableType]:
    """Each trial at each rung, what became of it, and the winner."""
    head, ledger = result.ledger.head, result.ledger
    table = Table(title=f"Sweep {head.sweep}, compared on the dev split; test was not looked at", title_justify="left")
    table.add_column("trial", no_wrap=True)
    for number, step in enumerate(head.rungs, start=1):
        table.add_column(f"rung {number}: step {step:,}", justify="right", no_wrap=True)
    table.add_column("what became of it")
    for name in head.trials:
        entries = [ledger.result(name, number) for number in range(1, len(head.rungs) + 1)]
        table.add_row(
            name, *("" if e is None else measured_text(e, head.metric) for e in entries), _fate(ledger.fate(name))
        )
    told: list[RenderableType] = [table, f"Ledger: {ledger.path} ({duration(ledger.seconds)} in all)"]
    if result.winner is None or result.adapter is None:
        left_out = any(entry.event == "left out" for entry in ledger.entries)
        what_to_do = "A larger --minutes goes on from here." if left_out else "Name lower rates with --rate."
        return [*told, f"There is no winner: no trial got to its end. {what_to_do}"]
    told.append(f"Winner: {result.winner.name}, trained to its end: {result.adapter.folder}")
    if result.at_the_edge:
        told.append(result.at_the_edge)
    if written:
        values = ", ".join(f"train.{key}: {_plain(value)}" for key, value in written.items())
        told.append(f"Written to tunewright.yaml: {values}")
    told.append(
        f"Its dev score is the best of {len(head.trials)}, so somewhat flattered: "
        "`tunewright evaluate` measures on test."
    )
    return told


def _fate(entry: Entry | None) -> str:
    if entry is None:
        return "not reached"
    if entry.event in {"out", "left out", "diverged"}:
        return f"{entry.event} at rung {entry.rung}" + (f": {entry.why}" if entry.why else "")
    return "the winner" if entry.event == "winner" else entry.event


def _plain(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else f"{value}"


def sweep_document(result: SweepResult, written: dict[str, Any]) -> dict[str, Any]:
    """The sweep as JSON."""
    head, ledger = result.ledger.head, result.ledger
    trials = []
    for name, about in head.trials.items():
        results = [ledger.result(name, number) for number in range(1, len(head.rungs) + 1)]
        rungs = [e.model_dump(mode="json", exclude_none=True) for e in results if e is not None]
        trials.append({"name": name, **about, "rungs": rungs, "fate": _fate(ledger.fate(name))})
    return {
        **head.model_dump(mode="json", exclude={"trials"}),
        "ledger": str(ledger.path),
        "seconds": round(ledger.seconds, 1),
        "trials": trials,
        "winner": None if result.winner is None else result.winner.name,
        "adapter": None if result.adapter is None else result.adapter.name,
        "at_the_edge": result.at_the_edge,
        "written": {key: list(value) if isinstance(value, tuple) else value for key, value in written.items()},
    }


def curve_tables(curve: Curve) -> list[RenderableType]:
    """Scores and losses by share and seed, and the answer."""
    table = Table(
        title=f"{curve.items} dev items in {curve.clusters} clusters, answered after training on nested parts",
        title_justify="left",
    )
    table.add_column("share", justify="right")
    table.add_column("training rows", justify="right", no_wrap=True)
    for seed in curve.seeds:
        table.add_column(f"seed {seed}", justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("dev loss", justify="right", no_wrap=True)
    for share in curve.shares:
        points = [p for p in curve.points if p.share == share]
        rows = sorted({p.rows for p in points})
        counted = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
        scores = [score_text(curve.metric, p.score) for p in points]
        mean = score_text(curve.metric, sum(p.score for p in points) / len(points))
        loss = f"{sum(p.dev_loss for p in points) / len(points):.3f}"
        table.add_row(f"{share:.0%}", counted, *scores, mean, loss)
    return [table, *more_data(curve).reasons]
