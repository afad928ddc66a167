"""Section on the benefit of more data."""

from __future__ import annotations

from statistics import fmean

from tunewright.evidence.learning_curve import Curve, more_data
from tunewright.metrics import axis_label, score_text
from tunewright.render.blocks import Column, Lead, Line, Lines, Notes, Row, Section, row, table


def section(curve: Curve) -> Section:
    """Return the answer, and the scores on dev by share of the training rows and seed."""
    seeds = (f"Seed {seed}" for seed in curve.seeds)
    head: tuple[str | Column, ...] = (Column("Share"), "Training rows", *seeds, "Mean", "Dev loss")
    return Section(
        "more-data",
        "Would more data help?",
        (
            Notes(more_data(curve).reasons),
            Lead(
                f"{curve.items:,} dev items in {curve.clusters:,} clusters, answered after training on nested parts of "
                "the rows."
            ),
            table("Table of scores by share and seed", head, (_row(curve, share) for share in curve.shares)),
            lines(curve),
        ),
    )


def lines(curve: Curve) -> Lines:
    """Return the mean score by training rows, and each training's."""
    means = tuple((fmean(p.rows for p in curve.points if p.share == s), 100 * curve.mean(s)) for s in curve.shares)
    measured = sorted((p.rows, 100 * p.score, p.seed) for p in curve.points)
    trainings = (
        Line(f"seed {seed}", tuple((rows, score) for rows, score, s in measured if s == seed), dots=True, joined=False)
        for seed in curve.seeds
    )
    return Lines(
        f"curve-{curve.id}",
        f"Score on {curve.items} dev items by training rows",
        (Line(f"mean of {len(curve.seeds)} seeds", means, "tuned"), *trainings),
        axis_label(curve.metric),
        below="training rows",
        bounds=(0, 100),
        doubling=True,
        caption=f"Each point is an adapter trained on a part of the rows; {curve.method}.",
    )


def _row(curve: Curve, share: float) -> Row:
    points = {point.seed: point for point in curve.points if point.share == share}
    rows = sorted({point.rows for point in points.values()})
    scores = (score_text(curve.metric, points[seed].score) if seed in points else "" for seed in curve.seeds)
    loss = sum(point.dev_loss for point in points.values()) / len(points)
    return row(
        f"{share:.0%}",
        " to ".join(f"{count:,}" for count in dict.fromkeys((rows[0], rows[-1]))),
        *scores,
        score_text(curve.metric, curve.mean(share)),
        f"{loss:.3f}",
    )
