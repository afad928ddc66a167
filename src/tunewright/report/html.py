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
from tunewright.evaluation.verdict import changed_words, verdict
from tunewright.metrics import axis_label, metric_label, p_text, points_text, score_text
from tunewright.recipe import MetricName
from tunewright.report.plots import PLAIN, PROMPTING, TUNED, Bar, forest_plot, training_plot
from tunewright.training.choosing import best_of, evaluations

SHOWN_FIXED = 30
SHOWN_STILL_WRONG = 100

_ARM_COLOURS = {
    "tuned": TUNED,
    "tuned-retrieved": TUNED,
    "static": PROMPTING,
    "retrieved": PROMPTING,
    "mixed": PROMPTING,
    "zero-shot": PLAIN,
}
_HEADLINES = {"ship": "Ship", "don't ship": "Don’t ship", "can't tell": "Can’t tell"}


@dataclass(frozen=True)
class ShownAnswer:
    """An answer cut into pieces, each the same as in the reference, extra, or missing from the answer."""

    right: bool
    mark: str
    """``✓ right``, or of graded answers the score."""
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
    environment.filters |= {"points": points_text, "p": p_text, "percent": "{:.1f}%".format, "capfirst": _capitalised}
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
        axis=axis_label(evidence.metric),
        label=metric_label,
        words=changed_words(evidence, first.metric),
        graded=evidence.metrics[first.metric].kind != "right or wrong",
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
    axis = axis_label(evidence.metric)
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
            [_contrast_bar(contrast) for contrast in evidence.deciding],
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
    against_tuned = contrast.control == "tuned"
    name = f"{contrast.treatment} minus tuned" if against_tuned else contrast.control
    return Bar(name, 100 * contrast.difference, low, high, text, TUNED)


def _trained_by(evidence: Evidence) -> MetricName:
    """The metric by which the training chose what to keep; the evaluation's, where the adapter's lineage has none."""
    training = evidence.lineage.get("adapter", {}).get("lineage", {}).get("training", {})
    metric: MetricName = training.get("metric") or evidence.metric
    return metric


def _loss_words(history: Sequence[dict[str, Any]], metric: MetricName) -> str:
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
    """The items, numbered from 1 in their own order, by what the treatment did to their score."""
    groups: dict[str, list[Numbered]] = {
        name: [] for name in ("broken", "fixed", "still_wrong", "both_right", "unscored")
    }
    for number, item in enumerate(items, 1):
        scores = item.scores[contrast.metric]
        ours, theirs = scores.get(contrast.treatment), scores.get(contrast.control)
        groups[_group(ours, theirs)].append((number, item))
    return groups


def _group(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return "unscored"
    if ours != theirs:
        return "fixed" if ours > theirs else "broken"
    return "both_right" if ours == 1 else "still_wrong"


def _shown(numbered: Sequence[Numbered], contrast: Contrast) -> list[ShownItem]:
    return [
        ShownItem(
            number,
            item.input,
            item.reference,
            _answer(item, contrast.control, contrast.metric),
            _answer(item, contrast.treatment, contrast.metric),
        )
        for number, item in numbered
    ]


def _answer(item: Item, arm: str, metric: MetricName) -> ShownAnswer:
    """Cut the arm's answer where it differs from the reference, by words; it is right where it has the full score."""
    answer, reference = item.answers[arm], item.reference
    score = item.scores[metric].get(arm)
    right, mark = score == 1, _mark(score)
    if right or not answer:
        return ShownAnswer(right, mark, [("same", answer)])
    theirs, ours = (re.findall(r"\w+|\s+|.", text) for text in (reference, answer))
    shown = ShownAnswer(right, mark, [])
    for tag, a, b, c, d in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if c < d:
            shown.pieces.append(("same" if tag == "equal" else "extra", "".join(ours[c:d])))
        else:
            shown.pieces.append(("missing", "".join(theirs[a:b])))
    return shown


def _mark(score: float | None) -> str:
    if score is None:
        return "not scored"
    return {1.0: "✓ right", 0.0: "✗ wrong"}.get(score, f"score {score:.2f}")


def _capitalised(text: str) -> str:
    """With a capital first letter, and the others as they are."""
    return text[:1].upper() + text[1:]


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
