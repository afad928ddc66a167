"""Section on the arms, with their scores by every metric."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.config import MetricName
from tunewright.evidence.common import ArmScore, Budget
from tunewright.evidence.schema import Advice, Arm, ArmKind, Evidence
from tunewright.metrics import axis_label
from tunewright.render.blocks import Bar, Block, Cell, Column, Figure, Lead, Notes, Row, Section, Table, Tone, row
from tunewright.report.text import capitalised, metric_order, percent_interval

TONES: dict[ArmKind, Tone] = {
    "tuned": "tuned",
    "tuned-retrieved": "tuned",
    "parent": "tuned",
    "static": "prompting",
    "retrieved": "prompting",
    "mixed": "prompting",
    "zero-shot": "plain",
    "incumbent": "plain",
}


def section(evidence: Evidence) -> Section:
    """Return the arms' scores on the held-out items, with a figure for each metric."""
    items = f"{evidence.items:,} held-out test items"
    if evidence.design == "cross-fitted":
        title, items = "Arms on all rows, cross-fitted", f"{evidence.items:,} items"
        how = (
            f"each answered once: by the one of {len(evidence.folds)} adapters that saw no row of its cluster, and "
            "with the prompt that was chosen without it"
        )
    elif evidence.split == "dev":
        title, items = "Arms on the dev split", f"{evidence.items:,} dev items"
        how = (
            "which chose the adapter's step and the best prompting arm: both look better here than they are. The test "
            "split stays closed"
        )
    else:
        title, how = "Arms on the test split", "kept apart from training and from the choice of a prompt"
    blocks: list[Block] = [Lead(f"{items} in {evidence.clusters:,} clusters{evidence.inputs_text}, {how}.")]
    blocks += [
        arms_figure(f"arms-{place}", f"Arms on the {evidence.items_text}s by {axis_label(name)}", evidence.arms, name)
        for place, name in enumerate(metric_order(evidence))
    ]
    blocks.append(arms_table("Table of arms", evidence, evidence.arms))
    notes = left_out(evidence.budget)
    if evidence.engine is not None:
        notes.append(f"All arms were answered by {evidence.engine.text}: {evidence.engine.why}.")
    return Section("arms", title, (*blocks, Notes(tuple(notes))) if notes else tuple(blocks))


def left_out(budget: Budget | None) -> list[str]:
    """Return the arms that a time budget left out, with the caution about the baseline."""
    if budget is None:
        return []
    text = f"Left out by --minutes {budget.minutes:g}: {', '.join(budget.left_out)}."
    return [text, *([f"Caution: {budget.caution}"] if budget.caution else [])]


def arms_figure(name: str, title: str, arms: Sequence[Arm], metric: MetricName) -> Figure:
    """Return the arms' scores by one metric, one arm per row."""
    bars = tuple(_bar(arm, arm.score(metric)) for arm in arms)
    return Figure(name, f"{title}, with 95% intervals", bars, axis_label(metric), limits=(0, 100))


def _bar(arm: Arm, score: ArmScore) -> Bar:
    value, low, high = 100 * score.value, 100 * score.interval.low, 100 * score.interval.high
    return Bar(arm.name, value, low, high, f"{value:.1f}", TONES[arm.kind])


def arms_table(
    label: str, measured: Evidence | Advice, arms: Sequence[Arm], notes: dict[str, str] | None = None
) -> Table:
    """Return a table of the arms by every metric; ``notes`` has remarks by arm name.

    ``Shared`` counts the tokens that all prompts of the arm begin with. Answers outside the choices, and items that
    could not be scored, have a column if there are any.
    """
    deciding, *others = metric_order(measured)
    counted = measured.metrics[deciding].kind == "right or wrong"
    outside = any(arm.score(deciding).outside for arm in arms)
    unscored = any(arm.score(deciding).unscored for arm in arms)

    def arm_row(arm: Arm) -> Row:
        score = arm.score(deciding)
        return row(
            Cell(arm.name, (notes or {}).get(arm.name, "")),
            *([f"{round(score.value * score.scored)} of {score.scored}"] if counted else []),
            *_scored(score),
            *(text for name in others for text in _scored(arm.score(name))),
            *([f"{score.outside:,}"] if outside else []),
            *([f"{sum(score.unscored.values()):,}"] if unscored else []),
            f"{arm.truncated:,}",
            f"{arm.prompt_tokens:.0f}",
            f"{arm.shared_tokens:,}",
        )

    head = [
        Column("Arm", words=True),
        *([Column("Right")] if counted else []),
        *_score_columns(deciding),
        *(column for name in others for column in _score_columns(name, detail=True)),
        *([Column("Outside choices")] if outside else []),
        *([Column("Unscored")] if unscored else []),
        Column("Cut by the token limit", detail=True),
        Column("Prompt tokens"),
        Column("Shared"),
    ]
    return Table(label, tuple(head), tuple(map(arm_row, arms)))


def _score_columns(metric: MetricName, *, detail: bool = False) -> tuple[Column, Column]:
    return Column(capitalised(axis_label(metric))), Column("95% interval", detail=detail)


def _scored(score: ArmScore) -> tuple[str, str]:
    return f"{100 * score.value:.1f}", percent_interval(score.interval)
