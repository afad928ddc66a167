"""The report for decision-makers: the evidence as one HTML file that works offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.advisor.signals import Signals
from tunewright.evidence.causes import ProjectFacts
from tunewright.evidence.learning_curve import Curve
from tunewright.evidence.schema import Evidence, Item
from tunewright.render.blocks import Section
from tunewright.render.html import page_templates
from tunewright.report.sections import (
    arms,
    benchmarks,
    contrasts,
    cost,
    human_eval,
    incumbents,
    items,
    judge,
    method,
    prompting,
    summary,
    train_similarity,
    training,
)


def render_report(
    evidence: Evidence,
    test_items: Sequence[Item],
    history: Sequence[dict[str, Any]],
    curve: Curve | None = None,
    advice: Signals | None = None,
    known: ProjectFacts | None = None,
) -> str:
    """Return the report as HTML text; equal input gives equal bytes.

    Args:
        evidence: the evaluation's evidence.
        test_items: the test items with every arm's answer.
        history: the training run's rows from the adapter, one per step and evaluation; may be empty.
        curve: a learning curve on the same data, if there is one.
        advice: advice on the same data, if there is any, for its break-even.
        known: further facts in which the causes of a *don't ship* are found.
    """
    page = page_templates("tunewright.report").get_template("page.html.j2")
    return page.render(
        project=evidence.project,
        id=evidence.id,
        summary=summary.summary(evidence, known),
        sections=page_sections(evidence, test_items, history, curve, advice),
    )


def page_sections(
    evidence: Evidence,
    test_items: Sequence[Item],
    history: Sequence[dict[str, Any]],
    curve: Curve | None,
    advice: Signals | None,
) -> list[Section]:
    """Return the page's sections in order, without those that were not measured."""
    found = (
        contrasts.section(evidence),
        incumbents.section(evidence),
        arms.section(evidence),
        train_similarity.section(evidence),
        train_similarity.templates_section(evidence),
        *items.sections(evidence, test_items),
        benchmarks.section(evidence.regressions) if evidence.regressions else None,
        *human_eval.sections(evidence),
        judge.section(evidence.judge) if evidence.judge else None,
        cost.section(evidence, advice),
        prompting.folds_section(evidence),
        prompting.section(evidence),
        training.section(evidence, history),
        training.curve_section(curve) if curve else None,
        method.openings_section(evidence),
        method.section(evidence),
        method.lineage(evidence),
    )
    return [section for section in found if section is not None]
