"""The report: one HTML file that shows the evidence to whoever decides, and works without a network."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunewright.disk import write_text
from tunewright.evaluation.evidence import Arm, Contrast, Evidence, Item
from tunewright.evaluation.verdict import verdict
from tunewright.metrics import exact_matches, normalised, p_text, points_text, score_text
from tunewright.recipe import Metric
from tunewright.report.plots import PLAIN, PROMPTING, TUNED, Bar, forest_plot, training_plot
from tunewright.training.choosing import best_of, evaluations

SHOWN_FIXED = 30
SHOWN_STILL_WRONG = 100

_ARM_COLOURS = {"tuned": TUNED, "retrieved": PROMPTING, "mixed": PROMPTING, "zero-shot": PLAIN}
_HEADLINES = {"ship": "Ship", "don't ship": "Don’t ship", "can't tell": "Can’t tell"}


@dataclass(frozen=True)
class ShownAnswer:
    """An answer cut into pieces, each the same as in the reference, extra, or missing from the answer."""

    right: bool
    pieces: list[tuple[Literal["same", "extra", "missing"], str]]


@dataclass(frozen=True)
class ShownItem:
    """A test item as the page lays it out."""

    number: int
    input: str
    reference: str
    control: ShownAnswer
    treatment: ShownAnswer


def write_report(evidence: Evidence, items: Sequence[Item], history: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the report of ``evidence`` to ``out``, whole or not at all; equal input gives equal bytes.

    Args:
        evidence: what was measured.
        items: the test items with every arm's answer.
        history: the training run's rows, as an adapter has them: of each step and each evaluation. May be empty.
        out: the HTML file.
    """
    write_text(out, render_report(evidence, items, history))


def render_report(evidence: Evidence, items: Sequence[Item], history: Sequence[dict[str, Any]]) -> str:
    """The report as HTML text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"points": points_text, "p": p_text, "percent": "{:.1f}%".format}
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    first = evidence.contrasts[0]
    result = verdict(evidence)
    groups = _sorted_items(items, first)
    return template.render(
        evidence=evidence,
        verdict=result,
        headline=_HEADLINES[result.decision],
        first=first,
        treatment=evidence.arm(first.treatment),
        control=evidence.arm(first.control),
        score=score_text,
        figures=_figures(evidence, history),
        loss_words=_loss_words(history, _trained_by(evidence)),
        counts={name: len(group) for name, group in groups.items()},
        broken=_shown(groups["broken"], first),
        fixed=_shown(groups["fixed"][:SHOWN_FIXED], first),
        more_fixed=_shown(groups["fixed"][SHOWN_FIXED:], first),
        still_wrong=_shown(groups["still_wrong"][:SHOWN_STILL_WRONG], first),
        lineage=_flat(evidence.lineage),
    )


# Figures


def _figures(evidence: Evidence, history: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    axis = "exact match, %" if evidence.metric == "exact_match" else "corpus BLEU"
    drawn = {
        "arms": forest_plot(
            "arms",
            f"Arms on the test items by {axis}, with 95% intervals",
            [_arm_bar(evidence, arm) for arm in evidence.arms],
            axis=axis,
            limits=(0, 100),
        ),
        "contrasts": forest_plot(
            "contrasts",
            "Differences between arms in points, with 95% intervals, against the margin",
            [_contrast_bar(contrast) for contrast in evidence.contrasts],
            axis="tuned minus this arm, points",
            margin=100 * evidence.margin,
        ),
    }
    if evidence.dev_arms:
        drawn["dev"] = forest_plot(
            "dev",
            f"Prompting arms on the dev split by {axis}, with 95% intervals",
            [_arm_bar(evidence, arm) for arm in evidence.dev_arms],
            axis=axis,
            limits=(0, 100),
        )
    if history:
        title = "Training and dev loss, and the score on dev, by optimizer step"
        drawn["loss"] = training_plot("loss", title, history, _trained_by(evidence))
    return {name: Markup(svg) for name, svg in drawn.items()}


def _arm_bar(evidence: Evidence, arm: Arm) -> Bar:
    score = arm.score(evidence.metric)
    value, low, high = 100 * score.value, 100 * score.interval.low, 100 * score.interval.high
    return Bar(arm.name, value, low, high, f"{value:.1f}", _ARM_COLOURS[arm.kind])


def _contrast_bar(contrast: Contrast) -> Bar:
    low, high = 100 * contrast.interval.low, 100 * contrast.interval.high
    text = points_text(contrast.difference)
    return Bar(contrast.control, 100 * contrast.difference, low, high, text, TUNED)


def _trained_by(evidence: Evidence) -> Metric:
    """The metric by which the training chose what to keep; the evaluation's, where the adapter's lineage has none."""
    training = evidence.lineage.get("adapter", {}).get("lineage", {}).get("training", {})
    metric: Metric = training.get("metric") or evidence.metric
    return metric


def _loss_words(history: Sequence[dict[str, Any]], metric: Metric) -> str:
    evaluated = evaluations(history)
    if not evaluated:
        return "No dev loss was measured during training."
    lowest, kept = min(evaluated, key=lambda e: e.dev_loss), best_of(evaluated)
    words = f"Dev loss was lowest at step {lowest.step:,} ({lowest.dev_loss:.3f}) and "
    words += f"{evaluated[-1].dev_loss:.3f} at the end. The adapter of step {kept.step:,} was kept"
    if kept.dev_metric is None:
        return f"{words}, by the dev loss."
    name = "exact match" if metric == "exact_match" else "BLEU"
    return f"{words}, by its {name} on dev: {score_text(metric, kept.dev_metric)}."


# Items


Numbered = tuple[int, Item]


def _sorted_items(items: Sequence[Item], contrast: Contrast) -> dict[str, list[Numbered]]:
    """The items, numbered from 1 in their own order, by what the treatment did to them."""
    references = [item.reference for item in items]
    ours = exact_matches([item.answers[contrast.treatment] for item in items], references)
    theirs = exact_matches([item.answers[contrast.control] for item in items], references)
    groups: dict[str, list[Numbered]] = {"broken": [], "fixed": [], "still_wrong": [], "both_right": []}
    names = {(0, 1): "broken", (1, 0): "fixed", (0, 0): "still_wrong", (1, 1): "both_right"}
    for numbered, treatment, control in zip(enumerate(items, 1), ours, theirs, strict=True):
        groups[names[int(treatment), int(control)]].append(numbered)
    return groups


def _shown(numbered: Sequence[Numbered], contrast: Contrast) -> list[ShownItem]:
    return [
        ShownItem(
            number,
            item.input,
            item.reference,
            _answer(item.answers[contrast.control], item.reference),
            _answer(item.answers[contrast.treatment], item.reference),
        )
        for number, item in numbered
    ]


def _answer(answer: str, reference: str) -> ShownAnswer:
    """Cut ``answer`` where it differs from ``reference``, by words."""
    right = normalised(answer) == normalised(reference)
    if right or not answer:
        return ShownAnswer(right, [("same", answer)])
    theirs, ours = (re.findall(r"\w+|\s+|.", text) for text in (reference, answer))
    shown = ShownAnswer(right, [])
    for tag, a, b, c, d in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if c < d:
            shown.pieces.append(("same" if tag == "equal" else "extra", "".join(ours[c:d])))
        else:
            shown.pieces.append(("missing", "".join(theirs[a:b])))
    return shown


# Lineage


def _flat(lineage: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested lineage as dotted names with their values."""
    rows = []
    for key, value in lineage.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows.extend(_flat(value, f"{name}."))
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
