"""Ship, don't ship or can't tell: a pure function of the evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunewright.config import MetricName
from tunewright.core.text import count_of
from tunewright.data.dedup.output_leakage import HIGH
from tunewright.evidence.benchmarks import standing
from tunewright.evidence.common import Interval
from tunewright.evidence.human_eval import people_prefer
from tunewright.evidence.judge import judge_objects
from tunewright.evidence.logged_access import openings_text
from tunewright.evidence.power import ALPHA, items_to_settle
from tunewright.evidence.replacement import Replacement, replacements
from tunewright.evidence.schema import Arm, Contrast, Evidence
from tunewright.metrics import metric_label, p_text, points_text, score_text
from tunewright.render.blocks import Block, Lead, Notes

Decision = Literal["ship", "don't ship", "can't tell"]

SIGNIFICANT = ALPHA

_EXIT_CODES: dict[Decision, int] = {"ship": 0, "don't ship": 3, "can't tell": 4}
_HEADLINES: dict[Decision, str] = {"ship": "Ship", "don't ship": "Don’t ship", "can't tell": "Can’t tell"}
NO_MODEL = "No model is needed"
"""Beginning of the first reason if a free arm is enough."""
FORM_LEARNT = 0.9
"""Share of the answers with the form, relative to the references with it, at which the form counts as learnt."""
ENFORCEABLE = ("JSON", "one of")
"""Beginnings of the forms that evaluate.structured_outputs can enforce."""
CAUTION_SHARE = 0.05
"""Share of answers above which the token limit or the format may cause a low score."""


@dataclass(frozen=True)
class Reason:
    """A cause of a *don't ship* or *can't tell*, and its remedy."""

    what: str
    """The cause, in a few words."""
    evidence: str
    """The measurement that shows it."""
    next_command: str
    """The change to make, if any, and the next command."""

    @property
    def text(self) -> str:
        """The cause with its evidence and remedy."""
        return f"{self.what}: {self.evidence}. Next: {self.next_command}."


@dataclass(frozen=True)
class Verdict:
    """A decision with its reasons; the first reason is the measurement itself."""

    decision: Decision
    reasons: tuple[str, ...]
    split: Literal["test", "dev"] = "test"
    """The split of the items. Nothing is released on a verdict about dev."""
    causes: tuple[Reason, ...] = ()
    """Known causes of a *don't ship* or *can't tell*; see `tunewright.evidence.causes`."""
    replacements: tuple[Replacement, ...] = ()
    """Replace, keep or can't tell for each incumbent; they do not affect the decision."""
    summary: str = ""
    """The measurement in plain words."""
    next_step: str = ""
    """What to do next: the first cause's remedy, else what settles a *can't tell*; empty if neither is known."""

    @property
    def exit_code(self) -> int:
        """0: ship, 3: don't ship, 4: can't tell."""
        return _EXIT_CODES[self.decision]

    @property
    def headline(self) -> str:
        """The decision as a heading, with a mark if it is on the dev split."""
        return f"{_HEADLINES[self.decision]}{' (on dev)' if self.split == 'dev' else ''}"

    def blocks(self, reasons: Sequence[str]) -> tuple[Block, ...]:
        """Return these of its reasons, and the causes of a *don't ship*."""
        causes = tuple(cause.text for cause in self.causes)
        return (Notes(tuple(reasons)), *((Lead(self.causes_title), Notes(causes)) if causes else ()))

    @property
    def causes_title(self) -> str:
        """The line above the causes, which are no reason for an adapter if no model is needed."""
        unneeded = self.reasons[0].startswith(NO_MODEL)
        return "If you still want an adapter:" if unneeded else "Likely causes:"

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as ``--json`` prints it."""
        causes = [{"what": c.what, "evidence": c.evidence, "next": c.next_command} for c in self.causes]
        document = {"decision": self.decision, "split": self.split, "reasons": list(self.reasons), "causes": causes}
        if self.replacements:
            document["incumbents"] = [each.as_dict() for each in self.replacements]
        return document


def verdict(evidence: Evidence) -> Verdict:
    """Decide by the first contrast: the tuned arm against the best prompting arm.

    Ship if the whole 95% interval lies above the margin and the test is significant, with its p-value adjusted for all
    declared contrasts; the test guards against intervals from a handful of items. Don't ship if the whole interval lies
    at or below the margin, or if tuned is significantly worse. Otherwise, and always with too few clusters for any
    significance: can't tell.

    More checks can only make the decision stricter. Can't tell if the gain needs items near training rows, which
    data.on_overlap: keep left in the authors' test. Don't ship an adapter that is worse at a deciding benchmark;
    if that benchmark can't tell, neither can a *ship*. Don't ship answers that people prefer less in a blind review.
    Can't tell if only a judge that passed its controls prefers the other arm.

    Don't ship, and say so first, if an arm without a model is not worse than tuned and than the best prompting arm.

    Incumbents have outcomes of their own (:mod:`tunewright.evidence.replacement`) and do not change the decision.
    """
    contrast = evidence.contrasts[0]
    decision, why = _decide(evidence, contrast)
    undecided = decision == "can't tell"
    decision, whose = _with_authors_split(evidence, decision)
    decision, regressions = _with_benchmarks(evidence, decision)
    against, said = decisive_preferences(evidence)
    if against == "people":
        decision = "don't ship"
    elif against == "judge" and decision == "ship":
        decision = "can't tell"
    decision, plain, first, compared = _without_model(evidence, decision)
    measured, further = _measurement(evidence, contrast), _further(evidence, contrast)
    settled = (*first, measured, *why, *whose, *compared)
    reasons = (*settled, *further, *regressions, *said, *_cautions(evidence, contrast))
    replaced = replacements(evidence, decision)
    summary = " ".join([*plain, plain_measurement(evidence, contrast)])
    next_step = _next_step(evidence, decision, undecided=undecided)
    return Verdict(decision, reasons, evidence.split, replacements=replaced, summary=summary, next_step=next_step)


def _next_step(evidence: Evidence, decision: Decision, *, undecided: bool) -> str:
    """Return the next step without a known cause; ``undecided`` if the deciding contrast can't tell."""
    if evidence.split == "dev" and decision != "don't ship":
        return "tunewright evaluate"
    if decision != "can't tell" or not undecided:
        return ""
    if evidence.design == "cross-fitted":
        return "add more distinct pairs with `tunewright data add FILE`, then `tunewright crossval`"
    more = "add more distinct items to the test split with `tunewright data add FILE`"
    return f"{more}, or `tunewright crossval`, which measures on all rows"


def _with_authors_split(evidence: Evidence, decision: Decision) -> tuple[Decision, list[str]]:
    """Return the decision after a look at the items without a near training row, and whose split it is."""
    found = evidence.authors_split
    if found is None:
        return decision, []
    if not found.near:
        return decision, [found.whose(evidence.split)]
    far = found.far
    holds = (
        far is not None
        and far.clusters >= fewest_clusters(1)
        and far.interval.low > evidence.margin
        and far.p_value < SIGNIFICANT
    )
    said = [found.whose(evidence.split), found.near_text(holds=holds)]
    return "can't tell" if decision == "ship" and not holds else decision, said


def _with_benchmarks(evidence: Evidence, decision: Decision) -> tuple[Decision, list[str]]:
    """Return the decision after the benchmarks, and the reasons."""
    if evidence.regressions is None:
        return decision, []
    found = standing(evidence.regressions)
    if found.result == "worse":
        head = "The adapter loses more than the margin in general ability, which no gain outweighs."
        return "don't ship", [head, *found.reasons]
    if found.result == "can't tell" and found.decides and decision == "ship":
        head = "The gain is large enough, but the benchmarks cannot show if the adapter lost general ability."
        return "can't tell", [head, *found.reasons]
    return decision, list(found.reasons)


def _without_model(evidence: Evidence, decision: Decision) -> tuple[Decision, list[str], list[str], list[str]]:
    """Return the decision after the free arms; if no model is needed, that in plain words and as the first reason.

    Else the last list has a further reason.
    """
    free = evidence.free
    drop = None if free is None else free.tuned
    if free is None or drop is None:
        return decision, [], [], []
    ours, tuned = (_scored(evidence, evidence.arm(name)) for name in (free.best, evidence.contrasts[0].treatment))
    low, high = (points_text(-end) for end in (drop.interval.high, drop.interval.low))
    items = count_of(drop.items, evidence.items_text)
    measured = f"{points_text(-drop.value)} points, 95% interval {low} to {high}, on {items}."
    if not free.enough:
        unclear = " They cannot show whether a model is needed." if drop.interval.low <= evidence.margin else ""
        return decision, [], [], [f"{ours}, without a model, against {tuned}: {measured}{unclear}"]
    text = f"{NO_MODEL}: {ours} is not worse than {tuned} by the margin of {_points(evidence.margin)}"
    if drop.interval.high < 0:
        text = f"{NO_MODEL}: {ours} is better than {tuned}"
    return "don't ship", [f"{text}."], [f"{text}: {measured}"], []


def decisive_preferences(evidence: Evidence) -> tuple[Literal["people", "judge"] | None, list[str]]:
    """Return the objection to the tuned answers, which can only stop a *ship*, and what people and judge prefer.

    People who prefer the tuned answers overrule the judge.
    """
    first = evidence.contrasts[0]
    arms = (first.treatment, first.control)
    preferred, said = people_prefer(evidence.human_eval, *arms)
    objects, found = judge_objects(evidence.judge, *arms, overruled=preferred == "treatment")
    return "people" if preferred == "control" else "judge" if objects else None, [*said, *found]


def _decide(evidence: Evidence, contrast: Contrast) -> tuple[Decision, list[str]]:
    margin = _points(evidence.margin)
    fewest = fewest_clusters(len(evidence.deciding))
    if contrast.clusters < fewest:
        return "can't tell", [
            f"The {evidence.items_text}s form {count_of(contrast.clusters, 'independent cluster')}; below {fewest} no "
            f"difference can be significant. {_more_items(evidence)}"
        ]
    p_value = contrast.p_value if contrast.p_adjusted is None else contrast.p_adjusted
    if contrast.difference < 0 and p_value < SIGNIFICANT:
        return "don't ship", [f"Tuned is significantly worse than {contrast.control}."]
    if contrast.interval.high <= evidence.margin:
        return "don't ship", [f"The whole interval lies at or below the margin of {margin}: too small a gain to ship."]
    if contrast.interval.low <= evidence.margin:
        return "can't tell", [
            f"The interval includes values on both sides of the margin of {margin}.",
            f"{_detectable(contrast)}; the margin is {margin}.",
            _what_would_settle_it(evidence, contrast),
        ]
    if p_value >= SIGNIFICANT:
        return "can't tell", [
            f"The interval lies above the margin of {margin}, but the significance test does not "
            f"confirm it. {_more_items(evidence)}",
        ]
    return "ship", [f"The whole interval lies above the margin of {margin}, and the test is significant."]


def fewest_clusters(contrasts: int) -> int:
    """Return the fewest independent clusters that can be significant, with p adjusted for this many contrasts."""
    # If all c clusters agree, the exact p is 2 / 2**c; Holm multiplies the least by the contrasts.
    return math.floor(math.log2(2 * contrasts / SIGNIFICANT)) + 1


def _further(evidence: Evidence, contrast: Contrast) -> Iterator[str]:
    """Yield sentences about facts outside the contrast: the adapter's parent, generated rows; none decides."""
    if contrast.left_out:
        why = "; ".join(f"{reason} ({count:,})" for reason, count in contrast.left_out.items())
        yield f"Left out, not scored in both arms: {count_of(sum(contrast.left_out.values()), 'item')}: {why}."
    against_parent = next((c for c in evidence.deciding if c.control == "parent"), None)
    if against_parent is not None:
        yield _against_parent(evidence, against_parent)
    if evidence.generated_effect is not None:
        yield evidence.generated_effect.line
    elif evidence.generated_train_items:
        yield (
            f"{evidence.generated_train_items:,} of {evidence.train_items:,} training rows are generated, with unknown "
            "effect: `tunewright data generated-effect` measures it."
        )


def _against_parent(evidence: Evidence, found: Contrast) -> str:
    recorded = evidence.lineage.get("adapter", {}).get("lineage", {})
    method = recorded.get("config", {}).get("train", {}).get("method", "sft")
    tuning = "more supervised training" if method == "sft" else method.upper()
    low, high = found.interval.low, found.interval.high
    outcome = "shows no difference" if low <= 0 <= high else f"is {'better' if low > 0 else 'worse'}"
    better, worse = changed_words(evidence, found.metric)
    return (
        f"Against {recorded.get('parent', {}).get('name', 'its parent')}, from which it started, {tuning} {outcome}: "
        f"{points_text(found.difference)} points, 95% interval {found.interval.points}, "
        f"{_tested(evidence, found)}; {found.fixed} {better}, {found.broken} {worse}."
    )


def _more_items(evidence: Evidence) -> str:
    if evidence.design == "cross-fitted":
        return "Add more distinct pairs."
    return f"Add more distinct items to the {evidence.split} split."


def _measurement(evidence: Evidence, contrast: Contrast) -> str:
    treatment, control = evidence.arm(contrast.treatment), evidence.arm(contrast.control)
    better, worse = changed_words(evidence, contrast.metric)
    how = "" if evidence.design == "held-out" else f", cross-fitted in {len(evidence.folds)} folds"
    return (
        f"{_scored(evidence, treatment)} against {_scored(evidence, control)} "
        f"on {count_of(contrast.scored, evidence.items_text)} "
        f"({count_of(contrast.clusters, 'cluster')}{evidence.inputs_text}){how}: "
        f"{points_text(contrast.difference)} points, 95% interval {contrast.interval.points}, "
        f"{_tested(evidence, contrast)}; {contrast.fixed} {better}, {contrast.broken} {worse}."
    )


def changed_words(evidence: Evidence, metric: MetricName) -> tuple[str, str]:
    """Return the words for items that the treatment improved and worsened."""
    return ("fixed", "broken") if evidence.metrics[metric].kind == "right or wrong" else ("better", "worse")


def _tested(evidence: Evidence, contrast: Contrast) -> str:
    if contrast.p_adjusted is None or len(evidence.deciding) == 1:
        return f"{p_text(contrast.p_value)} ({contrast.test})"
    return (
        f"{p_text(contrast.p_value)} ({contrast.test}), {p_text(contrast.p_adjusted)} adjusted for "
        f"{len(evidence.deciding)} contrasts"
    )


def _detectable(contrast: Contrast) -> str:
    if contrast.minimum_detectable_effect >= 1.0:
        return "With this many items no difference can be shown (80% power)"
    shown = f"{100 * contrast.minimum_detectable_effect:.1f} points"
    return f"This many items would show a true difference of {shown} or more (80% power)"


def _what_would_settle_it(evidence: Evidence, contrast: Contrast) -> str:
    """Return a sentence with the number of test items that would settle the verdict at the same difference."""
    unit = f"{evidence.items_text}s" if evidence.design == "held-out" else "pairs"
    needed = items_to_settle(contrast.difference, contrast.interval, evidence.margin, contrast.scored)
    if needed is None:
        return f"The difference is so close to the margin that even 20 times as many {unit} may not settle it."
    side = "above" if contrast.difference > evidence.margin else "below"
    return (
        f"About {needed:,} {unit} in all ({needed - contrast.scored:,} more) would settle it, "
        f"if the true difference is {points_text(contrast.difference)} points ({side} the margin)."
    )


def _cautions(evidence: Evidence, contrast: Contrast) -> Iterator[str]:
    """Yield the scope of a cross-validated verdict, and what may make these scores misleading."""
    if evidence.design == "cross-fitted":
        yield (
            f"This verdict is about the config on about {evidence.train_items:,} training pairs: the mean of "
            f"{len(evidence.folds)} adapters, each trained on a part of the rows. `tunewright train` trains the "
            "adapter to ship."
        )
        yield (
            "These items include the rows of the dev and test splits. If you change anything after reading this, the "
            "test split is no longer untouched: only new rows are."
        )
    if evidence.split == "dev":
        yield (
            "Caution: these are dev items, which chose the adapter's step and the best prompt, so both look better "
            "than on new rows. `tunewright deploy` does not accept this verdict: `tunewright evaluate` measures on the "
            "test split."
        )
    if evidence.budget is not None and evidence.budget.caution is not None:
        yield f"Caution: {evidence.budget.caution}"
    if evidence.untried:
        yield (
            f"Caution: Prompting was not tried as hard as by default. The config has {'; '.join(evidence.untried)}. "
            "The best prompt may be better than the one compared here."
        )
    yield from _unformed_prompting(evidence, contrast)
    if evidence.openings:
        yield f"Caution: {openings_text(evidence.openings, evidence.items)}"
    yield from _unknown_training(evidence)
    yield from _known_templates(evidence)
    arms = [evidence.arm(contrast.treatment), evidence.arm(contrast.control)]
    for arm in arms:
        if arm.truncated > CAUTION_SHARE * arm.items:
            # A higher limit helps only if references are longer than it.
            why = "; raise evaluate.max_new_tokens to see if that is why they score low."
            if evidence.form is not None and not evidence.form.longer:
                why = ", although every reference is shorter: these answers do not end where they should."
            yield f"Caution: {arm.truncated} of {arm.items} answers of {arm.name} reached the token limit{why}"
    for arm in arms:
        outside = arm.score(evidence.metric).outside
        if outside > CAUTION_SHARE * arm.items:
            yield (
                f"Caution: {outside} of {arm.items} answers of {arm.name} are not a declared choice and count as wrong."
            )


def _unformed_prompting(evidence: Evidence, contrast: Contrast) -> Iterator[str]:
    """Yield a caution on the prompting arms that may only lack the form of the answers to be as good as tuned."""
    form, metric = evidence.form, evidence.metric
    tried = evidence.narrowing.arms if evidence.narrowing else evidence.dev_arms
    if form is None or any(arm.constrained for arm in tried):
        return
    tuned = evidence.arm(contrast.treatment).score(metric).value
    lacking = [
        f"{form.items - given:,} of {form.items:,} answers of {arm.name}"
        for arm in evidence.arms
        if arm.kind in {"zero-shot", "static", "retrieved", "mixed"}
        and (given := form.answers.get(arm.name, form.items)) < FORM_LEARNT * form.references
        and arm.score(metric).value
        < tuned
        <= evidence.margin + arm.score(metric).value + (form.references - given) / form.items
    ]
    if lacking:
        step = "evaluate.instructions can state the form"
        if form.what.startswith(ENFORCEABLE):
            step = "evaluate.structured_outputs measures prompting with the form enforced"
        yield (
            f"Caution: {' and '.join(lacking)} are not {form.what}, which may be the only reason for a low score: "
            f"{step}."
        )


def _known_templates(evidence: Evidence) -> list[str]:
    """Return a caution if many outputs have a template that training rows have."""
    found = evidence.output_templates
    seen = found.seen.items if found is not None and found.seen is not None else 0
    if found is None or seen < HIGH * evidence.items:
        return []
    if found.new is None:
        return [
            f"Caution: every {evidence.split} item has an output template seen in training, so the score says "
            "nothing about new templates. `tunewright data leakage` says what a split by template could measure."
        ]
    scores = [
        f"{name} {score_text(evidence.metric, score.value)}"
        for name in (found.treatment, found.control)
        if (score := found.new.scores.get(name)) is not None
    ]
    text = " and ".join(scores) if scores else "nothing is scored"
    return [
        f"Caution: {seen / evidence.items:.0%} of the {evidence.split} items have an output template seen in "
        f"training; on the {count_of(found.new.items, 'item')} with a new template: {text}."
    ]


def _unknown_training(evidence: Evidence) -> list[str]:
    """Return a caution if the adapter was imported: its training data may include test items."""
    adapter = evidence.lineage.get("adapter", {})
    imported = adapter.get("imported")
    if imported is None or imported["signed"]:
        return []
    text = "only claimed" if "dataset" in adapter["lineage"] else "unknown"
    return [f"Caution: the adapter was imported and its training data is {text}: it may include these test items."]


def _scored(evidence: Evidence, arm: Arm) -> str:
    return f"{arm.name} {score_text(evidence.metric, arm.score(evidence.metric).value)}"


def _points(share: float) -> str:
    return f"{100 * share:g} points"


_NONE = 0.05
"""Points below which a rounded difference is zero."""


def plain_measurement(evidence: Evidence, contrast: Contrast) -> str:
    """Return the tuned arm's comparison with another arm in plain words."""
    tuned, other = (
        score_text(contrast.metric, evidence.arm(name).score(contrast.metric).value)
        for name in (contrast.treatment, contrast.control)
    )
    rows = count_of(contrast.scored, f"{evidence.split} row")
    if evidence.design == "cross-fitted":
        rows = count_of(contrast.scored, "row")
    rival = f"the base with its best prompt ({contrast.control})"
    if evidence.metrics[contrast.metric].kind == "right or wrong":
        scored = f"The adapter answers {tuned} of {rows} right, and {rival} {other}"
    else:
        label = metric_label(contrast.metric)
        by = "" if label in tuned else f", by {label}"
        scored = f"On {rows} the adapter scores {tuned}, and {rival} {other}{by}"
    return f"{scored}: {_unsigned(100 * contrast.difference)}. {_certainty(contrast.interval)}"


def _certainty(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    if low < -_NONE and high > _NONE:
        chance = ", so it may be chance"
    elif low <= _NONE and high >= -_NONE:
        chance = ""
    else:
        nearer, farther = sorted((abs(low), abs(high)))
        word = "more" if low > 0 else "less"
        return f"With 95% confidence, the true difference is {nearer:.1f} to {farther:.1f} points {word}."
    return f"With 95% confidence, the true difference is between {_unsigned(low)} and {_unsigned(high)}{chance}."


def _unsigned(points: float) -> str:
    """Return a difference without a sign: ``8.2 points more``, ``no difference``."""
    if abs(points) < _NONE:
        return "no difference"
    return f"{abs(points):.1f} points {'more' if points > 0 else 'less'}"
