"""Section on the differences between arms, and on the margin that the deciding one must exceed."""

from __future__ import annotations

from tunewright.evidence.schema import Contrast, Evidence
from tunewright.evidence.verdict import changed_words, fewest_clusters
from tunewright.metrics import metric_label, points_text
from tunewright.render.blocks import Bar, Block, Cell, Column, Figure, Lead, Notes, Row, Section, Table, row, table
from tunewright.report.text import capitalised, points_interval


def section(evidence: Evidence) -> Section:
    """Return every contrast, the deciding one first, with raw and adjusted p-values."""
    place = "all items" if evidence.design == "cross-fitted" else f"the {evidence.split} split"
    blocks: list[Block] = [
        Lead(
            f"Contrasts on {place}, in points. To ship, the whole interval of the first one has to lie above the "
            f"margin of {100 * evidence.margin:g}. Detectable is the smallest difference that this many items can show."
        ),
        Figure(
            "contrasts",
            "Differences between arms in points, with 95% intervals, against the margin",
            tuple(_bar(contrast) for contrast in evidence.deciding),
            "difference, points",
            margin=100 * evidence.margin,
            caption="Each line is a 95% interval of tuned minus the arm that it names, or of the two that it names.",
        ),
        _table(evidence),
    ]
    if evidence.noise_floor is not None:
        noise = evidence.noise_floor
        text = (
            f"Noise floor: {noise.changed:,} of {noise.items:,} answers changed when the base answered again "
            f"({noise.how}), and its score by {points_text(noise.score_difference)} points."
        )
        blocks.append(Notes((text,)))
    return Section("contrasts", "The difference and the margin", tuple(blocks))


def _bar(contrast: Contrast) -> Bar:
    low, high = 100 * contrast.interval.low, 100 * contrast.interval.high
    name = contrast.control if contrast.treatment == "tuned" else f"{contrast.treatment}\n− {contrast.control}"
    return Bar(name, 100 * contrast.difference, low, high, points_text(contrast.difference), "tuned")


def _table(evidence: Evidence) -> Table:
    several: list[str | Column] = [Column("Metric", words=True)] if len(evidence.metrics) > 1 else []
    better, worse = map(capitalised, changed_words(evidence, evidence.metric))
    head = (
        "Contrast", *several, "Difference", "95% interval", "p", "Adjusted p", better, worse, "Detectable"
    )  # fmt: skip
    rows = tuple(_row(contrast, contrast is evidence.contrasts[0], several) for contrast in evidence.contrasts)
    return table("Table of contrasts", head, rows)


def _row(contrast: Contrast, decides: bool, several: list[str | Column]) -> Row:
    return row(
        Cell(f"{contrast.treatment} − {contrast.control}", "decides" if decides else ""),
        *([metric_label(contrast.metric)] if several else []),
        points_text(contrast.difference),
        Cell(points_interval(contrast.interval), f"{contrast.scored:,} items"),
        Cell(_p(contrast.p_value), contrast.test),
        "none" if contrast.p_adjusted is None else _p(contrast.p_adjusted),
        f"{contrast.fixed:,}",
        f"{contrast.broken:,}",
        Cell(f"{100 * contrast.minimum_detectable_effect:.1f}", _worth(contrast)),
        decides=decides,
    )


def _p(p_value: float) -> str:
    """Return a p-value below a heading that names it: ``0.031``, ``5.5e-05``, ``<1e-15``."""
    return "<1e-15" if p_value < 1e-15 else f"{p_value:.2g}"


def _worth(contrast: Contrast) -> str:
    """Return the effective number of independent items, which cannot be estimated from few clusters."""
    if contrast.effective_items is None:
        return ""
    if contrast.clusters < fewest_clusters(1):
        clusters = f"{contrast.clusters:,} cluster{'' if contrast.clusters == 1 else 's'}"
        return f"{clusters}: too few to estimate how many independent items these are worth"
    return f"worth {contrast.effective_items:.0f} independent items"
