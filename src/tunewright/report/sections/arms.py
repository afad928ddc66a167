"""Section on the arms, with their scores by every metric."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tunewright.config import MetricName
from tunewright.evidence.common import ArmScore
from tunewright.evidence.schema import Arm, ArmKind, Evidence
from tunewright.metrics import axis_label, metric_label
from tunewright.report.blocks import Cell, Figure, Lead, Row, Section, Table, cells
from tunewright.report.plots import PLAIN, PROMPTING, TUNED, Bar, forest_plot
from tunewright.report.text import capitalised, metric_order, percent_interval

COLOURS: dict[ArmKind, str] = {
    "tuned": TUNED,
    "tuned-retrieved": TUNED,
    "parent": TUNED,
    "static": PROMPTING,
    "retrieved": PROMPTING,
    "mixed": PROMPTING,
    "zero-shot": PLAIN,
    "incumbent": PLAIN,
}


def section(evidence: Evidence) -> Section:
    """Return the arms' scores on the held-out items, with a figure for each metric."""
    items, clusters = f"{evidence.items:,} items", f"{evidence.clusters:,} clusters{evidence.inputs_text}"
    if evidence.design == "cross-fitted":
        title = "Arms on all rows, cross-fitted"
        lead = (
            f"{items} in {clusters}, each answered once: by the one of {len(evidence.folds)} adapters that saw no row "
            "of its cluster, and with the prompt that was chosen without it."
        )
    else:
        title = f"Arms on the {evidence.split} split"
        apart = "kept apart from training and from the choice of a prompt"
        chose = "which chose the adapter's step and the prompt: both look better here than they are"
        lead = f"{items} in {clusters}, {apart if evidence.split == 'test' else chose}."
    figures = [
        arms_figure(f"arms-{place}", f"Arms on the {evidence.items_text}s by {axis_label(name)}", evidence.arms, name)
        for place, name in enumerate(metric_order(evidence))
    ]
    return Section("arms", title, (Lead(lead), *figures, arms_table("Table of arms", evidence, evidence.arms)))


def arms_figure(name: str, title: str, arms: Sequence[Arm], metric: MetricName) -> Figure:
    """Draw the arms' scores by one metric, one arm per row."""
    bars = [_bar(arm, arm.score(metric)) for arm in arms]
    drawn = forest_plot(name, f"{title}, with 95% intervals", bars, axis=axis_label(metric), limits=(0, 100))
    return Figure(Markup(drawn))


def _bar(arm: Arm, score: ArmScore) -> Bar:
    value, low, high = 100 * score.value, 100 * score.interval.low, 100 * score.interval.high
    return Bar(arm.name, value, low, high, f"{value:.1f}", COLOURS[arm.kind])


def arms_table(label: str, evidence: Evidence, arms: Sequence[Arm], notes: dict[str, str] | None = None) -> Table:
    """Return a table of the arms by every metric; ``notes`` has remarks by arm name."""
    head = ["Arm"]
    for name in metric_order(evidence):
        head += [capitalised(metric_label(name)), "95% interval"]
    head += ["Cut by the token limit", "Prompt tokens"]
    return Table(label, tuple(head), tuple(_row(evidence, arm, (notes or {}).get(arm.name, "")) for arm in arms))


def _row(evidence: Evidence, arm: Arm, note: str) -> Row:
    shown: list[str | Cell] = [Cell(arm.name, note)]
    for name in metric_order(evidence):
        score = arm.score(name)
        shown += [_score(arm, score, evidence.metrics[name].kind), percent_interval(score.interval)]
    return Row(cells(*shown, f"{arm.truncated:,}", f"{arm.prompt_tokens:.0f}"))


def _score(arm: Arm, score: ArmScore, kind: str) -> Cell:
    outside = f"{score.outside} outside the choices" if score.outside else ""
    if kind == "right or wrong":
        count = f"{round(score.value * score.scored)} of {score.scored}"
        return Cell(f"{100 * score.value:.1f}%", f"{count}; {outside}" if outside else count)
    return Cell(f"{100 * score.value:.1f}", f"of {score.scored}" if score.scored < arm.items else "")
