"""Advice: the verb ``advise``, its result, and what was measured and would change it in plain sentences.

Readable without torch or the model.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tunewright.advisor.signals import (
    BreakEven,
    Decision,
    Grounds,
    ShotCurve,
    Signals,
    TuningGain,
    decide,
    doublings_left,
    find_advice,
    last_gain,
    load_signals,
)
from tunewright.data.splits import FEW_TRAINING_PAIRS
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.verbs import open_arm_runner, open_trainings, refuse_up_front, require_minutes
from tunewright.evidence.common import Interval
from tunewright.evidence.power import items_to_settle
from tunewright.evidence.schema import FreeArms
from tunewright.metrics import p_text, points_text, score_text
from tunewright.open_project import OpenProject

_RISING = {"yes": "still rising", "no": "flat", "unclear": "not shown to be rising, nor flat"}


def advise(
    project: OpenProject, stored: str | Path | None = None, *, pilot: bool = True, minutes: float | None = None
) -> AdviceResult:
    """Advise to prompt, retrieve, fine-tune or use no model, or can't tell, from signals on dev.

    Args:
        stored: earlier advice (ID or file) to decide from again, without measuring.
        pilot: train a pilot adapter on a part of the training rows. Without it the gain of training is unknown.
        minutes: time limit for answers; prompting arms that do not fit are left out by name (None: no limit).

    Raises:
        UserError: no such advice, too few minutes, or arms that cannot be measured.
    """
    if stored is not None:
        file = find_advice(project.folder.advice, stored)
        if project.folder.advice.absolute() in file.absolute().parents:
            AccessLog(project.folder.evaluations).require(file)
        return AdviceResult(file, load_signals(file), measured=False)
    require_minutes(minutes)
    if pilot:
        refuse_up_front(project, "A pilot")
    from tunewright.advisor.adviser import Adviser

    with open_trainings(project) if pilot else nullcontext() as pilots:
        return AdviceResult(*Adviser(partial(open_arm_runner, project), pilots=pilots, minutes=minutes).advise())


@dataclass(frozen=True)
class AdviceResult:
    """Signals that `advise` measured or loaded, with the decision that follows."""

    file: Path
    signals: Signals
    measured: bool
    """False if the signals were stored before."""

    @cached_property
    def decision(self) -> Decision:
        """The recommended approach."""
        return decide(self.signals)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        decision = self.decision
        return {
            "file": str(self.file),
            "measured": self.measured,
            "answer": decision.answer,
            "arm": decision.arm,
            "why": decision.why,
            "signals": measured(self.signals),
            "changes": changes(self.signals, decision),
            "expect": expectations(self.signals),
            "advice": self.signals.model_dump(mode="json"),
        }


# What was measured


def measured(signals: Signals) -> dict[str, str]:
    """Return a sentence or two for each signal by name."""
    return {
        **({"free arms": _free(signals, free)} if (free := signals.prompting.free) else {}),
        "context budget": _context(signals),
        "break-even": break_even_text(signals),
        "gain": _gain(signals),
    }


def _free(signals: Signals, free: FreeArms) -> str:
    text = [f"{free.best} has {score_text(signals.metric, free.best_on_dev.score(signals.metric).value)}"]
    for name, drop in ((signals.prompting.best, free.prompting), ("the pilot", free.tuned)):
        text += [] if drop is None else [f"{name} minus it: {_points(drop.value, drop.interval)}"]
    return f"Without a model, {'; '.join(text)}."


def _context(signals: Signals) -> str:
    budget = signals.context
    if not budget.curves:
        return "No arm with demonstrations was measured."
    text = " ".join(_curve(signals, curve) for curve in budget.curves)
    return text if budget.items == signals.items else f"On {budget.items} of the {signals.items} dev items: {text}"


def _curve(signals: Signals, curve: ShotCurve) -> str:
    at_best = next(p for p in curve.points if p.shots == curve.best)
    text = f"{curve.name}: best with k = {curve.best} ({score_text(signals.metric, at_best.score.value)})"
    if curve.enough != curve.best:
        text += f", k = {curve.enough} is less than the margin below"
    each, context = curve.tokens_per_example, signals.context.context
    text += f"; {curve.most:,} demonstrations of {each:.0f} tokens fit the context of {context:,}"
    if curve.last is None:
        return f"{text}."
    brought_by_it = _points(curve.last.difference, curve.last.interval)
    step = f"from {curve.last.before} to {curve.last.after}, by doubling: {brought_by_it}"
    limit = "" if curve.room else "; twice as many do not fit"
    return f"{text}; {step}, {_RISING[curve.rising]}{limit}."


def break_even_text(signals: Signals) -> str:
    """Return the number of calls from which training pays, or the reason why it is unknown."""
    even = signals.break_even
    if even is None:
        return f"Not measured: {signals.left_out['break_even']}."
    calls = calls_cost(even)
    if even.calls is None:
        return f"Cheaper calls alone never pay for training: {calls}."
    high = f"{even.calls_high:,.0f}" if even.calls_high is not None else "never"
    interval = f"{even.calls_low or 0:,.0f} to {high}"
    text = f"Cheaper calls alone pay for training from {even.calls:,.0f} calls on ({interval}): {calls}"
    if even.calls_per_month is None:
        return f"{text}; set advise.calls_per_month to see when."
    # Hosting is paid monthly, so it lowers what a month saves; the other costs are paid at the beginning.
    monthly = even.calls_per_month * even.saving - even.once.hosting / even.months
    when = "never"
    if monthly > 0:
        months = (even.once.total - even.once.hosting) / monthly
        when = f"after {months:.1f} months" if months >= 2 else f"after {365.25 / 12 * months:.1f} days"
    return f"{text}; at {even.calls_per_month:,.0f} calls a month {when}."


def calls_cost(even: BreakEven) -> str:
    """Return the cost of a call with the best prompt and tuned."""
    return (
        f"a call costs {cost(even, even.prompting.cost)} with {even.prompting.arm}, {cost(even, even.tuned.cost)} tuned"
    )


def cost(even: BreakEven, value: float) -> str:
    """Return an amount with the unit of the break-even."""
    return amount(even, value) if even.unit == "money" else f"{amount(even, value)} of this machine"


def amount(even: BreakEven, value: float) -> str:
    """Return an amount of money or time: ``0.00213``, ``12.50``, ``7.2 s``, ``1,840 s``, ``3.1 h``."""
    if even.unit == "money":
        return f"{value:.4g}" if value < 1 else f"{value:,.2f}"
    seconds = 3600 * value
    if seconds >= 5400:
        return f"{value:,.1f} h"
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _gain(signals: Signals) -> str:
    gain = signals.gain
    if gain is None:
        return f"Not measured: {signals.left_out['gain']}."
    contrast, metric = gain.contrast, signals.metric
    pilot = f"A pilot on {gain.pilot.rows:,} of {gain.all_rows:,} rows {score_text(metric, gain.pilot.score.value)}"
    best = f"{contrast.control} {score_text(metric, Grounds(signals).best.score(metric).value)}"
    slope = ""
    if gain.slope is not None:
        per_doubling = _points(gain.slope.difference, gain.slope.interval)
        slope = f"; from {gain.slope.before:,} rows to {gain.slope.after:,}, by doubling: {per_doubling}"
    return (
        f"{pilot}, {best} on {signals.items} dev items ({signals.clusters} clusters): "
        f"{_points(contrast.difference, contrast.interval)}, {p_text(contrast.p_value)} ({contrast.test}){slope}."
    )


# What would change the answer


def changes(signals: Signals, decision: Decision) -> list[str]:
    """Return changes that would alter the recommendation, with numbers."""
    grounds = Grounds(signals)
    text = {
        "fine-tune": _against_training(signals, grounds),
        "no model": ["Answers that a linear model cannot give, or a smaller evaluate.margin."],
        "prompt": [*_more_calls(signals, grounds), *_more_gain(signals, grounds)],
        "retrieve": [*_more_calls(signals, grounds), *_more_gain(signals, grounds)],
        "can't tell": [
            *([f"A pilot, which was skipped: {signals.left_out['gain']}."] if signals.gain is None else []),
            *_more_items(signals, grounds),
            *_more_rows(signals, grounds),
            *_more_shots(signals, grounds),
            *_more_calls(signals, grounds),
        ],
    }
    return text[decision.answer]


def _against_training(signals: Signals, grounds: Grounds) -> list[str]:
    gain, even = signals.gain, signals.break_even
    if not grounds.beats or gain is None:  # only cheaper calls speak for training
        if even is None or even.calls_high is None:
            return []
        return [f"With fewer than {even.calls_high:,.0f} calls in {even.months} months it may not pay."]
    lacking = gain.contrast.interval.low - signals.margin
    text = f"Prompting would have to be {100 * lacking:.1f} points better"
    rising = [c for c in signals.context.curves if c.last is not None and c.last.difference > 0 and c.room]
    if not rising:
        return [f"{text}; more demonstrations do not help."]
    curve = max(rising, key=grounds.lead)
    assert curve.last is not None
    doublings = (lacking - grounds.lead(curve)) / curve.last.difference
    # 2**40 is beyond any context, and larger powers overflow a float.
    needed = curve.last.after * 2 ** min(doublings, 40)
    fits = f"{curve.most:,} fit" if needed <= curve.most else f"only {curve.most:,} fit"
    return [
        f"{text}: at the rate of its last doubling that takes about k = {needed:,.0f} ({curve.name}), and {fits}. "
        f"Add {2 * curve.last.after} to `evaluate.num_fewshot` to measure the next step."
    ]


def _more_calls(signals: Signals, grounds: Grounds) -> list[str]:
    even = signals.break_even
    if even is None or even.calls_high is None or grounds.pays == "yes" or not grounds.as_good:
        return []
    volume = f"{even.calls_high:,.0f} calls in {even.months} months ({even.calls_high / even.months:,.0f} a month)"
    text = [f"From {volume} on, training pays with 95% confidence: then fine-tune, since the pilot is as good."]
    if even.expected_calls is not None:
        affordable = even.saving_interval.low * even.expected_calls
        text.append(
            f"At {even.expected_calls:,.0f} calls it would pay if training and hosting cost at most "
            f"{cost(even, affordable)} in total; now {cost(even, even.once.total)}."
        )
    return text


def _more_gain(signals: Signals, grounds: Grounds) -> list[str]:
    return [
        f"Training on all rows may gain at most {points_text(grounds.reach)} points, but the margin is "
        f"{100 * signals.margin:g}. Try another base or config (`tunewright train --sweep`), or lower evaluate.margin."
    ]


def _more_items(signals: Signals, grounds: Grounds) -> list[str]:
    gain = signals.gain
    if gain is None or gain.contrast.interval.high <= signals.margin:
        return []
    contrast, bar = gain.contrast, signals.margin + grounds.headroom
    power = (
        f"{signals.items} dev items show a true difference of {100 * contrast.minimum_detectable_effect:.1f} points or "
        f"more (80% power); the margin is {100 * signals.margin:g}."
    )
    needed = items_to_settle(contrast.difference, contrast.interval, bar, signals.items)
    if needed is None:
        return [f"{power} Even 20 times as many may not settle it: the difference is too close to that bar."]
    side = "above" if contrast.difference > bar else "below"
    return [
        f"{power} About {needed:,} ({needed - signals.items:,} more) would settle it, if the true difference is "
        f"{points_text(contrast.difference)} points ({side} the {100 * bar:.1f} needed)."
    ]


def _more_rows(signals: Signals, grounds: Grounds) -> list[str]:
    gain = signals.gain
    if gain is None:
        return []
    left = doublings_left(gain)
    if left == 0:
        return _more_pairs(gain, signals.margin + grounds.headroom)
    text = (
        f"The pilot had {gain.pilot.rows:,} of {gain.all_rows:,} rows: advise.pilot_fraction and pilot_max_samples "
        "set it"
    )
    if gain.slope is None:
        return [f"{text}. A larger pilot also trains on half of its rows, which shows the trend."]
    ahead = gain.contrast.difference + left * gain.slope.difference
    each, all_rows = points_text(gain.slope.difference), points_text(ahead)
    return [
        f"{text}. If each doubling continues to gain {each} points, all {gain.all_rows:,} rows reach {all_rows} "
        f"points over {gain.contrast.control}."
    ]


def _more_pairs(gain: TuningGain, bar: float) -> list[str]:
    """Return a sentence with the training rows needed to reach the bar, at the rate of the last doubling."""
    lacking = bar - gain.contrast.difference
    if gain.slope is None or gain.slope.difference <= 0 or lacking <= 0:
        return []
    # 2**40 times the rows is out of reach, and larger powers overflow a float.
    rows = gain.all_rows * 2 ** min(lacking / gain.slope.difference, 40)
    each = points_text(gain.slope.difference)
    return [
        f"More pairs: if each doubling continues to gain {each} points, about {rows:,.0f} training rows are enough."
    ]


def _more_shots(signals: Signals, grounds: Grounds) -> list[str]:
    if grounds.headroom <= 0:
        return []
    curve = max(signals.context.curves, key=lambda c: grounds.lead(c) + last_gain(c))
    shots = 2 * curve.points[-1].shots
    brings = points_text(grounds.headroom)
    return [f"Twice the demonstrations may gain {brings} points: add {shots} to evaluate.num_fewshot."]


# Few pairs


def expectations(signals: Signals) -> list[str]:
    """Return expectations if there are fewer pairs than `FEW_TRAINING_PAIRS`, else nothing."""
    if signals.pairs >= FEW_TRAINING_PAIRS:
        return []
    shown = "little"
    if signals.gain is not None:
        shown = f"differences of {100 * signals.gain.contrast.minimum_detectable_effect:.1f} points or more"
    return [
        f"{signals.pairs} pairs, fewer than {FEW_TRAINING_PAIRS}: expect that prompting is hard to beat.",
        f"{signals.items} dev items show {shown}, and so does a test split of that size: `tunewright crossval` uses "
        "each pair as a test item once.",
    ]


def _points(difference: float, interval: Interval) -> str:
    return (
        f"{points_text(difference)} points (95% interval {points_text(interval.low)} to {points_text(interval.high)})"
    )
