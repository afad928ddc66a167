"""Section on the differences between arms, and on the margin that the deciding one must exceed."""

from __future__ import annotations

from markupsafe import Markup

from tunewright.evidence.schema import Contrast, Evidence
from tunewright.evidence.verdict import changed_words, fewest_clusters
from tunewright.metrics import metric_label, p_text, points_text
from tunewright.report.blocks import Block, Cell, Figure, Lead, Notes, Row, Section, Table, cells
from tunewright.report.plots import TUNED, Bar, forest_plot
from tunewright.report.text import capitalised, noise_line, points_interval


def section(evidence: Evidence) -> Section:
    """Return every contrast, the deciding one first, with raw and adjusted p-values."""
    figure = forest_plot(
        "contrasts",
        "Differences between arms in points, with 95% intervals, against the margin",
        [_bar(contrast) for contrast in evidence.deciding],
        axis="difference, points",
        margin=100 * evidence.margin,
    )
    blocks: list[Block] = [
        Lead(
            "Each line is a 95% interval of tuned minus the arm that it names, or of the two that it names. To ship, "
            "the first one has to lie entirely to the right of the margin."
        ),
        Figure(Markup(figure)),
        _table(evidence),
    ]
    if evidence.noise_floor is not None:
        blocks.append(Notes((noise_line(evidence.noise_floor),)))
    return Section("contrasts", "The difference and the margin", tuple(blocks))


def _bar(contrast: Contrast) -> Bar:
    low, high = 100 * contrast.interval.low, 100 * contrast.interval.high
    name = contrast.control if contrast.treatment == "tuned" else f"{contrast.treatment}\n− {contrast.control}"
    return Bar(name, 100 * contrast.difference, low, high, points_text(contrast.difference), TUNED)


def _table(evidence: Evidence) -> Table:
    better, worse = changed_words(evidence, evidence.metric)
    head = (
        "Contrast",
        "Difference, points",
        "95% interval",
        "p",
        "p adjusted (Holm)",
        capitalised(better),
        capitalised(worse),
        "Smallest difference these items can show",
    )
    return Table("Table of contrasts", head, tuple(_row(evidence, contrast) for contrast in evidence.contrasts))


def _row(evidence: Evidence, contrast: Contrast) -> Row:
    decides = contrast is evidence.contrasts[0]
    note = "decides" if decides else "" if contrast.metric == evidence.metric else metric_label(contrast.metric)
    return Row(
        cells(
            Cell(f"{contrast.treatment} − {contrast.control}", note),
            points_text(contrast.difference),
            Cell(points_interval(contrast.interval), f"{contrast.scored:,} items"),
            Cell(p_text(contrast.p_value), contrast.test),
            "not deciding" if contrast.p_adjusted is None else p_text(contrast.p_adjusted),
            f"{contrast.fixed:,}",
            f"{contrast.broken:,}",
            Cell(
                f"{100 * contrast.minimum_detectable_effect:.1f}",
                _worth(contrast),
            ),
        ),
        decides,
    )


def _worth(contrast: Contrast) -> str:
    """Return the effective number of independent items, which cannot be estimated from few clusters."""
    if contrast.effective_items is None:
        return ""
    if contrast.clusters < fewest_clusters(1):
        clusters = f"{contrast.clusters:,} cluster{'' if contrast.clusters == 1 else 's'}"
        return f"{clusters}: too few to estimate how many independent items these are worth"
    return f"worth {contrast.effective_items:.0f} independent items"
