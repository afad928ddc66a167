"""Ship, don't ship or can't tell: a pure function of the evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tunewright.config import MetricName
from tunewright.data.dedup.output_leakage import HIGH
from tunewright.evidence.power import ALPHA
from tunewright.evidence.preferences import opinions
from tunewright.evidence.regression_rule import standing
from tunewright.evidence.sample_size import items_to_settle
from tunewright.evidence.schema import Arm, Contrast, Evidence
from tunewright.evidence.test_set_access import openings_text
from tunewright.metrics import p_text, points_text, score_text

Decision = Literal["ship", "don't ship", "can't tell"]

SIGNIFICANT = ALPHA

_EXIT_CODES: dict[Decision, int] = {"ship": 0, "don't ship": 3, "can't tell": 4}
TOLD_SHARE = 0.05
"""Of answers: above this, a low score may be the token limit's or the format's doing."""


@dataclass(frozen=True)
class Reason:
    """A cause of a *don't ship* or *can't tell* that can be mended, and how."""

    what: str
    """The cause, in a few words."""
    evidence: str
    """What was measured that shows it."""
    next_command: str
    """What to change, if anything, and the command to run then."""


@dataclass(frozen=True)
class Verdict:
    """What to do, and why in plain sentences; the first reason is the measurement itself."""

    decision: Decision
    reasons: tuple[str, ...]
    split: Literal["test", "dev"] = "test"
    """Whose items it rests on. On dev it is no licence to ship: nothing is released on it."""
    causes: tuple[Reason, ...] = ()
    """Why not to ship or why it can't be told, where that can be known; see `tunewright.evidence.causes`."""

    @property
    def exit_code(self) -> int:
        """0 to ship, 3 not to (a measured no), 4 where it can't be told."""
        return _EXIT_CODES[self.decision]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as ``--json`` prints it."""
        causes = [{"what": c.what, "evidence": c.evidence, "next": c.next_command} for c in self.causes]
        return {"decision": self.decision, "split": self.split, "reasons": list(self.reasons), "causes": causes}


def verdict(evidence: Evidence) -> Verdict:
    """Decide by the first contrast: the tuned arm against the best prompting arm.

    Ship when the whole 95% interval lies above the margin and the test is significant too (resampling a handful of
    items proves nothing), with its p-value adjusted for all declared contrasts. Don't ship when the whole interval
    lies at or below the margin, or when tuned is significantly worse. Otherwise, and always with fewer clusters than
    can be significant, it can't be told.

    Whatever the gain, don't ship what is worse at a suite of general ability that may decide; and where such a suite
    cannot tell, neither can the verdict, unless it is a "don't ship" already. Nor is shipped what people prefer less,
    blind; and where a judge that passed its controls does, and nobody else was asked, it can't be told.
    """
    contrast = evidence.contrasts[0]
    decision, why = _decide(evidence, contrast)
    decision, general = _with_general(evidence, decision)
    decision, said = _with_opinions(evidence, decision)
    reasons = (
        _arm_runner(evidence, contrast),
        *why,
        *_left_out(contrast),
        *general,
        *said,
        *_scope(evidence),
        *_cautions(evidence, contrast),
    )
    return Verdict(decision, reasons, evidence.split)


def _with_general(evidence: Evidence, decision: Decision) -> tuple[Decision, list[str]]:
    """Return what is left of a decision by the gain, after what the base could do before was looked at; and why."""
    if evidence.general is None:
        return decision, []
    found = standing(evidence.general)
    if found.result == "worse":
        head = "The adapter is worse at what the base could do before, by more than the margin: whatever it gains."
        return "don't ship", [head, *found.reasons]
    if found.result == "can't tell" and found.decides and decision == "ship":
        head = "The gain would do, but whether the adapter has lost what the base could do before cannot be told."
        return "can't tell", [head, *found.reasons]
    return decision, list(found.reasons)


def _with_opinions(evidence: Evidence, decision: Decision) -> tuple[Decision, list[str]]:
    """Return what is left of a decision after people and a judge were heard, who can only make it stricter; and why."""
    found = opinions(evidence)
    if found.against == "people":
        decision = "don't ship"
    elif found.against == "judge" and decision == "ship":
        decision = "can't tell"
    return decision, list(found.reasons)


def _decide(evidence: Evidence, contrast: Contrast) -> tuple[Decision, list[str]]:
    margin = _points(evidence.margin)
    fewest = fewest_clusters(len(evidence.deciding))
    if contrast.clusters < fewest:
        return "can't tell", [
            f"The {evidence.items_text}s form {_count(contrast.clusters, 'independent cluster')}; below {fewest} no "
            f"difference can be significant. {_more_items(evidence)}"
        ]
    p_value = contrast.p_value if contrast.p_adjusted is None else contrast.p_adjusted
    if contrast.difference < 0 and p_value < SIGNIFICANT:
        return "don't ship", [f"Tuned is significantly worse than {contrast.control}."]
    if contrast.interval.high <= evidence.margin:
        return "don't ship", [f"The whole interval lies at or below the margin of {margin}: no gain worth shipping."]
    if contrast.interval.low <= evidence.margin:
        return "can't tell", [
            f"The interval holds values on both sides of the margin of {margin}.",
            _power(evidence, contrast),
            _what_would_settle_it(evidence, contrast),
        ]
    if p_value >= SIGNIFICANT:
        return "can't tell", [
            f"The interval lies above the margin of {margin}, but the test, which guards small samples, does not "
            f"confirm it. {_more_items(evidence)}",
        ]
    return "ship", [f"The whole interval lies above the margin of {margin}, and the test agrees."]


def fewest_clusters(contrasts: int) -> int:
    """Fewer independent clusters than this cannot be significant, with p adjusted for so many contrasts."""
    return math.floor(math.log2(2 * contrasts / SIGNIFICANT)) + 1


def _left_out(contrast: Contrast) -> list[str]:
    """Return the items that the contrast is not of."""
    if not contrast.left_out:
        return []
    why = "; ".join(f"{reason} ({count:,})" for reason, count in contrast.left_out.items())
    return [
        f"Left out, as they cannot be scored in both arms: {_count(sum(contrast.left_out.values()), 'item')}: {why}."
    ]


def _more_items(evidence: Evidence) -> str:
    if evidence.design == "cross-fitted":
        return "Add more unlike pairs."
    return f"Put more unlike items into the {evidence.split} split."


def _scope(evidence: Evidence) -> list[str]:
    """Return what a cross-fitted verdict speaks of, and what it costs; a held-out one speaks of its adapter."""
    if evidence.design == "held-out":
        return []
    return [
        f"This speaks of the config on about {evidence.train_items:,} training pairs, the mean of "
        f"{len(evidence.folds)} adapters that each saw a part of the rows, and not of one adapter: `tunewright train` "
        "makes the one to ship.",
        "The rows of the dev and test splits are among these items: for whatever you change after reading this, the "
        "test split is no longer untouched evidence. Only new rows are.",
    ]


def _arm_runner(evidence: Evidence, contrast: Contrast) -> str:
    treatment, control = evidence.arm(contrast.treatment), evidence.arm(contrast.control)
    interval = contrast.interval
    better, worse = changed_words(evidence, contrast.metric)
    how = "" if evidence.design == "held-out" else f", cross-fitted in {len(evidence.folds)} folds"
    return (
        f"{_scored(evidence, treatment)} against {_scored(evidence, control)} "
        f"on {_count(contrast.scored, evidence.items_text)} "
        f"({_count(contrast.clusters, 'cluster')}{evidence.inputs_text}){how}: "
        f"{points_text(contrast.difference)} points, 95% interval {points_text(interval.low)} to "
        f"{points_text(interval.high)}, {_tested(evidence, contrast)}; {contrast.fixed} {better}, "
        f"{contrast.broken} {worse}."
    )


def changed_words(evidence: Evidence, metric: MetricName) -> tuple[str, str]:
    """Return what items are called that the treatment changed for the better and for the worse."""
    return ("fixed", "broken") if evidence.metrics[metric].kind == "right or wrong" else ("better", "worse")


def _tested(evidence: Evidence, contrast: Contrast) -> str:
    if contrast.p_adjusted is None or len(evidence.deciding) == 1:
        return f"{p_text(contrast.p_value)} ({contrast.test})"
    return (
        f"{p_text(contrast.p_value)} ({contrast.test}), {p_text(contrast.p_adjusted)} adjusted for "
        f"{len(evidence.deciding)} contrasts"
    )


def _power(evidence: Evidence, contrast: Contrast) -> str:
    if contrast.minimum_detectable_effect >= 1.0:
        return f"With this many items no difference can be shown (80% power); the margin is {_points(evidence.margin)}."
    return (
        f"This many items would show a true difference of {100 * contrast.minimum_detectable_effect:.1f} points or "
        f"more (80% power); the margin is {_points(evidence.margin)}."
    )


def _what_would_settle_it(evidence: Evidence, contrast: Contrast) -> str:
    """Return how many test items would bring the interval off the margin, if the difference stays what it is."""
    unit = f"{evidence.items_text}s" if evidence.design == "held-out" else "pairs"
    needed = items_to_settle(contrast.difference, contrast.interval, evidence.margin, contrast.scored)
    if needed is None:
        return f"The difference is so close to the margin that even 20 times as many {unit} would hardly settle it."
    side = "above" if contrast.difference > evidence.margin else "below"
    return (
        f"About {needed:,} {unit} in all ({needed - contrast.scored:,} more) would settle it, "
        f"if the true difference is {points_text(contrast.difference)} points ({side} the margin)."
    )


def _cautions(evidence: Evidence, contrast: Contrast) -> list[str]:
    arms = [evidence.arm(contrast.treatment), evidence.arm(contrast.control)]
    outside = [(arm, arm.score(evidence.metric).outside) for arm in arms]
    opened = [f"Caution: {openings_text(evidence.openings, evidence.items)}"] if evidence.openings else []
    truncated = [f"Caution: {_cut(evidence, arm)}" for arm in arms if arm.truncated > TOLD_SHARE * arm.items]
    none_of_the_choices = [
        f"Caution: {count} of {arm.items} answers of {arm.name} are none of the declared choices, and count as wrong."
        for arm, count in outside
        if count > TOLD_SHARE * arm.items
    ]
    return [
        *_on_dev(evidence),
        *_trimmed(evidence),
        *opened,
        *_unknown_training(evidence),
        *_known_templates(evidence),
        *truncated,
        *none_of_the_choices,
    ]


def _cut(evidence: Evidence, arm: Arm) -> str:
    """Answers at the token limit; a longer limit helps only where right answers are longer than it."""
    told = f"{arm.truncated} of {arm.items} answers of {arm.name} ran into the token limit"
    if evidence.form is not None and not evidence.form.longer:
        return f"{told}, though every right answer is shorter than it: they do not end where they should."
    return f"{told}; raise evaluate.max_new_tokens to see whether that is why they score low."


def _on_dev(evidence: Evidence) -> list[str]:
    if evidence.split == "test":
        return []
    return [
        "Caution: these are dev items, which chose the adapter's step and the best prompt: both look better here than "
        "they are. This is no licence to ship, and `tunewright deploy` does not take it: `tunewright evaluate` "
        "measures on the test split."
    ]


def _trimmed(evidence: Evidence) -> list[str]:
    """That a budget made the prompting arms weaker."""
    caution = evidence.budget.caution if evidence.budget else None
    return [f"Caution: {caution}"] if caution else []


def _known_templates(evidence: Evidence) -> list[str]:
    """Say how much of the score comes from outputs whose template was trained on."""
    found = evidence.output_templates
    seen = found.seen.items if found is not None and found.seen is not None else 0
    if found is None or seen < HIGH * evidence.items:
        return []
    if found.new is None:
        return [
            f"Caution: every {evidence.split} item has an output template seen in training, so the score does not "
            "show what happens with a new one. data.split_by: output_template, in a new dataset, keeps templates apart."
        ]
    scores = [
        f"{name} {score_text(evidence.metric, score.value)}"
        for name in (found.treatment, found.control)
        if (score := found.new.scores.get(name)) is not None
    ]
    told = " and ".join(scores) if scores else "nothing is scored"
    return [
        f"Caution: {seen / evidence.items:.0%} of the {evidence.split} items have an output template seen in "
        f"training; on the {_count(found.new.items, 'item')} with a new template: {told}."
    ]


def _unknown_training(evidence: Evidence) -> list[str]:
    """Whether somebody else trained the adapter, so that the test rows may have been among what it was trained on."""
    adapter = evidence.lineage.get("adapter", {})
    imported = adapter.get("imported")
    if imported is None or imported["signed"]:
        return []
    told = "only claimed" if "dataset" in adapter["lineage"] else "not known"
    return [
        f"Caution: the adapter was imported, and what it was trained on is {told}: these test items may be among it."
    ]


def _scored(evidence: Evidence, arm: Arm) -> str:
    return f"{arm.name} {score_text(evidence.metric, arm.score(evidence.metric).value)}"


def _points(share: float) -> str:
    return f"{100 * share:g} points"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
