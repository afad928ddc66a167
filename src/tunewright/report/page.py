"""The report for decision-makers: the evidence as one HTML file that works offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.advisor.signals import Signals
from tunewright.core.io import digest
from tunewright.evidence.benchmarks import benchmarks_section
from tunewright.evidence.blocks import (
    arms_section,
    contrasts_section,
    folds_section,
    human_eval_sections,
    metric_order,
    prompting_section,
)
from tunewright.evidence.causes import ProjectFacts, decided
from tunewright.evidence.judge import judge_section
from tunewright.evidence.learning_curve import Curve, curve_section
from tunewright.evidence.logged_access import openings_section
from tunewright.evidence.replacement import incumbents_section
from tunewright.evidence.schema import Evidence, Item
from tunewright.evidence.verdict import Decision, changed_words, verdict
from tunewright.metrics import metric_label, points_text, score_text
from tunewright.render.blocks import Block, Lead, Notes, Section, Table, row
from tunewright.render.html import page_templates
from tunewright.report.items import item_sections, similarity_section, templates_section
from tunewright.report.training import cost_section, training_section


def render_report(
    evidence: Evidence,
    test_items: Sequence[Item],
    history: Sequence[dict[str, Any]],
    curve: Curve | None = None,
    advice: Signals | None = None,
    known: ProjectFacts | None = None,
) -> str:
    """Return the report as HTML text; equal input gives equal bytes.

    ``history`` has the training run's rows, one per step and evaluation. A curve and advice are on
    the same data; causes of a *don't ship* are also found in the ``known`` facts.
    """
    page = page_templates("tunewright.report").get_template("page.html.j2")
    return page.render(
        project=evidence.project,
        id=evidence.id,
        summary=summary(evidence, known),
        sections=page_sections(evidence, test_items, history, curve, advice),
    )


def page_sections(
    evidence: Evidence,
    test_items: Sequence[Item],
    history: Sequence[dict[str, Any]],
    curve: Curve | None,
    advice: Signals | None,
) -> list[Section]:
    """Return the page's sections in order, without sections that were not measured."""
    found = (
        contrasts_section(evidence),
        incumbents_section(evidence.incumbents, verdict(evidence).replacements) if evidence.incumbents else None,
        arms_section(evidence),
        similarity_section(evidence),
        templates_section(evidence),
        *item_sections(evidence, test_items),
        benchmarks_section(evidence.regressions) if evidence.regressions else None,
        *human_eval_sections(evidence),
        judge_section(evidence.judge) if evidence.judge else None,
        cost_section(evidence, advice),
        folds_section(evidence),
        prompting_section(evidence),
        training_section(evidence, history),
        curve_section(curve) if curve else None,
        openings_section(evidence.opening, evidence.openings, evidence.items) if evidence.opening else None,
        method_section(evidence),
        lineage_section(evidence),
    )
    return [section for section in found if section is not None]


_TONES: dict[Decision, str] = {"ship": "ship", "don't ship": "dont", "can't tell": "open"}


@dataclass(frozen=True)
class Number:
    """A number in large print with its label."""

    value: str
    what: str
    tone: str = ""


@dataclass(frozen=True)
class Summary:
    """The verdict at a glance."""

    headline: str
    answer: str
    """The decision with both scores, in one short sentence."""
    tone: str
    bars: tuple[tuple[float, str], ...]
    """Both scores in percent with their colours, if they are shares of right answers."""
    measured: str
    """The measurement in plain words."""
    made: str
    """Date, author, base and data set of the measurement."""
    cautions: tuple[str, ...]
    """The reasons to doubt the measurement."""
    reasons: tuple[Block, ...]
    """The reasons, and likely causes."""
    numbers: tuple[Number, ...]
    meaning: str


def summary(evidence: Evidence, known: ProjectFacts | None = None, version: str = "") -> Summary:
    """Return the verdict with its causes, and the deciding contrast; ``version`` names the dataset version."""
    result, first = decided(evidence, known), evidence.contrasts[0]
    treatment, control = evidence.arm(first.treatment), evidence.arm(first.control)
    better, worse = changed_words(evidence, first.metric)
    values = [arm.score(evidence.metric).value for arm in (treatment, control)]
    ours, theirs = (score_text(evidence.metric, value) for value in values)
    tone = "" if control.kind == "zero-shot" else "prompting"
    return Summary(
        headline=result.headline,
        answer=_answer(evidence, result.headline, (ours, theirs)),
        bars=tuple((round(100 * value, 1), tone) for value, tone in zip(values, ("tuned", "prompting"), strict=True))
        if evidence.metrics[first.metric].kind == "right or wrong"
        else (),
        tone=_TONES[result.decision],
        measured=result.summary,
        made=_made(evidence, version),
        cautions=tuple(each for each in result.reasons if each.startswith("Caution: ")),
        reasons=result.blocks(result.reasons),
        numbers=(
            Number(ours, treatment.name, "tuned"),
            Number(theirs, f"{control.name}, the best prompting", tone),
            Number(points_text(first.difference), "points between them"),
            Number(f"{first.fixed} / {first.broken}", f"items {better} / {worse}"),
        ),
        meaning=_meaning(evidence),
    )


def _answer(evidence: Evidence, headline: str, scores: Sequence[str]) -> str:
    first = evidence.contrasts[0]
    if evidence.metrics[first.metric].kind != "right or wrong":
        return f"{headline}: the adapter scores {scores[0]}; the best prompt scores {scores[1]}"
    shares = (evidence.arm(name).score(first.metric).value for name in (first.treatment, first.control))
    ours, theirs = (round(share * first.scored) for share in shares)
    return f"{headline}: {ours:,} of {first.scored:,} right; the best prompt gets {theirs:,}"


def _made(evidence: Evidence, version: str) -> str:
    lineage = evidence.lineage
    facts = {
        "on": str(lineage.get("created", ""))[:10],
        "by": evidence.opening.author if evidence.opening else None,
        "with the base": lineage.get("base", {}).get("spec"),
        "on data set": f"{evidence.project} ({version or 'version ' + str(lineage.get('dataset', 'unknown'))[:12]})",
    }
    return f"Measured {', '.join(f'{word} {fact}' for word, fact in facts.items() if fact)}."


def _meaning(evidence: Evidence) -> str:
    """Explain the deciding contrast in terms of a hundred requests."""
    first = evidence.contrasts[0]
    if evidence.metrics[first.metric].kind == "right or wrong":
        ours, theirs = (evidence.arm(name).score(first.metric).value for name in (first.treatment, first.control))
        better, worse = 100 * first.fixed / first.scored, 100 * first.broken / first.scored
        return (
            f"What it means: of 100 requests like these, {first.treatment} would get about {100 * ours:.0f} right and "
            f"{first.control} about {100 * theirs:.0f}. About {better:.0f} would become right by tuning, and about "
            f"{worse:.0f} wrong."
        )
    same = first.scored - first.fixed - first.broken
    # Rows of one input count as several items but one request.
    inputs = f" ({evidence.references.text})" if evidence.references else ""
    return (
        f"What it means: of these {first.scored:,} items{inputs}, {first.fixed:,} were answered better by "
        f"{first.treatment} than by {first.control}, {first.broken:,} worse, and {same:,} as well."
    )


def method_section(evidence: Evidence) -> Section:
    """Return sentences about metrics, margin, intervals and tests."""
    first = evidence.contrasts[0]
    deciding, *others = metric_order(evidence)
    paragraphs = [
        f"Deciding metric: {metric_label(deciding)}, {evidence.metrics[deciding].definition}. The margin, the smallest "
        f"gain worth shipping, is {100 * evidence.margin:g} points.",
        "Items of one cluster are alike, so they count together: intervals and tests treat whole clusters.",
    ]
    if evidence.design == "cross-fitted":
        paragraphs.append(
            "Clusters are treated as independent, although items of a fold share an adapter and folds share training "
            "rows. For another set of pairs the intervals are somewhat too narrow (Bengio & Grandvalet 2004)."
        )
    paragraphs += [
        f"Intervals: {evidence.arm(first.treatment).score(deciding).method} for an arm; {first.interval_method} for "
        "the difference.",
        f"Only the first contrast decides. Its p-value is adjusted (Holm 1979) for the {len(evidence.deciding)} that "
        "were declared; those by other metrics are also measured, but not adjusted.",
        *(f"Also measured: {metric_label(name)}, {evidence.metrics[name].definition}." for name in others),
    ]
    return Section("method", "How this was measured", (Notes(tuple(paragraphs)),))


_LISTED = 20
"""Longer lists, such as the keys of preference pairs, are shown as length and digest."""


def lineage_section(evidence: Evidence) -> Section:
    """Return the lineage recorded in the evidence."""
    rows = tuple(row(name, value) for name, value in _flat(evidence.lineage))
    table = Table("Table of lineage", (), rows, "lineage")
    return Section("lineage", "Lineage", (Lead("Inputs of these figures, by digest."), table))


def _flat(lineage: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested lineage as dotted names with their values."""
    rows = []
    for key, value in lineage.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows.extend(_flat(value, f"{name}."))
        elif isinstance(value, list) and len(value) > _LISTED:
            rows.append((name, f"{len(value):,} values, SHA-256 {digest(value)[:12]}"))
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
