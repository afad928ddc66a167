"""Advice in plain sentences: what was measured, what would change the answer, and what to expect of few pairs."""

from __future__ import annotations

from tunewright.advisor.decision import Decision, Grounds, brought, doublings_left
from tunewright.advisor.signals import BreakEven, ShotCurve, Signals, TuningGain
from tunewright.data.notices import FEW_TRAINING_PAIRS
from tunewright.evidence.base import Interval
from tunewright.evidence.sample_size import items_to_settle
from tunewright.metrics import p_text, points_text, score_text

_RISING = {"yes": "still rising", "no": "flat", "unclear": "not shown to be rising, nor flat"}


# What was measured


def measured(signals: Signals) -> dict[str, str]:
    """Return one sentence or two for each signal, by its name."""
    return {
        "context budget": _context(signals),
        "specificity": _specificity(signals),
        "break-even": break_even_text(signals),
        "gain": _gain(signals),
    }


def _context(signals: Signals) -> str:
    budget = signals.context
    if not budget.curves:
        return "No arm with demonstrations was measured."
    told = " ".join(_curve(signals, curve) for curve in budget.curves)
    return told if budget.items == signals.items else f"On {budget.items} of the {signals.items} dev items: {told}"


def _curve(signals: Signals, curve: ShotCurve) -> str:
    at_best = next(p for p in curve.points if p.shots == curve.best)
    told = f"{curve.name}: best with k = {curve.best} ({score_text(signals.metric, at_best.score.value)})"
    if curve.enough != curve.best:
        told += f", k = {curve.enough} is less than the margin below"
    each, context = curve.tokens_per_example, signals.context.context
    told += f"; {curve.most:,} demonstrations of {each:.0f} tokens fit the context of {context:,}"
    if curve.last is None:
        return f"{told}."
    brought_by_it = _points(curve.last.difference, curve.last.interval)
    step = f"from {curve.last.before} to {curve.last.after}, by doubling: {brought_by_it}"
    limit = "" if curve.room else "; twice as many do not fit"
    return f"{told}; {step}, {_RISING[curve.rising]}{limit}."


def _specificity(signals: Signals) -> str:
    told = signals.specificity
    words = f"{told.fertility.domain:.1f} tokens a word"
    if told.fertility.ratio is not None and told.fertility.interval is not None:
        low, high = told.fertility.interval.low, told.fertility.interval.high
        words += (
            f" against {told.fertility.generic:.1f} in what the base writes ({told.fertility.ratio:.1f} times, "
            f"{low:.1f} to {high:.1f})"
        )
    bits = ", ".join(f"{s.bits_per_byte:.2f} after {s.arm}" for s in told.surprise)
    parts = [words, f"bits per byte of the right answers: {bits}"]
    if told.format is not None:
        held = "" if told.format.constrained is None else f", {told.format.constrained} when held to the grammar"
        parts.append(f"{told.format.what}: {told.format.valid} of {told.format.items} zero-shot answers{held}")
    return f"{'; '.join(parts)}. Evidence alone: it decides nothing."


def break_even_text(signals: Signals) -> str:
    """From how many calls on training pays, or why that is not known."""
    even = signals.break_even
    if even is None:
        return f"Not measured: {signals.left_out['break_even']}."
    calls = calls_cost(even)
    if even.calls is None:
        return f"By its calls alone training never pays: {calls}."
    high = f"{even.calls_high:,.0f}" if even.calls_high is not None else "never"
    interval = f"{even.calls_low or 0:,.0f} to {high}"
    told = f"By its calls alone training pays from {even.calls:,.0f} calls on ({interval}): {calls}"
    if even.calls_per_month is None:
        return f"{told}; advise.calls_per_month would say when."
    months = _months(even)
    when = "never" if months is None else f"after {_span(months)}"
    return f"{told}; at {even.calls_per_month:,.0f} calls a month {when}."


def calls_cost(even: BreakEven) -> str:
    """Return what a call costs with the best prompt and tuned."""
    return (
        f"a call costs {cost(even, even.prompting.cost)} with {even.prompting.arm}, {cost(even, even.tuned.cost)} tuned"
    )


def _months(even: BreakEven) -> float | None:
    """Until training has paid, hosting counted month by month; None: never."""
    assert even.calls_per_month is not None
    monthly = even.calls_per_month * even.saving - even.once.hosting / even.months
    return (even.once.total - even.once.hosting) / monthly if monthly > 0 else None


def _span(months: float) -> str:
    return f"{months:.1f} months" if months >= 2 else f"{365.25 / 12 * months:.1f} days"


def cost(even: BreakEven, value: float) -> str:
    """Return an amount in the unit of the break-even, and of what it is."""
    return amount(even, value) if even.unit == "money" else f"{amount(even, value)} of this machine"


def amount(even: BreakEven, value: float) -> str:
    """An amount of money, or of time, as people read it: ``0.00213``, ``12.50``, ``7.2 s``, ``1,840 s``, ``3.1 h``."""
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
    return (
        f"{pilot}, {best} on {signals.items} dev items ({signals.clusters} clusters): "
        f"{_points(contrast.difference, contrast.interval)}, {p_text(contrast.p_value)} ({contrast.test})"
        f"{_slope(gain)}."
    )


def _slope(gain: TuningGain) -> str:
    if gain.slope is None:
        return ""
    per_doubling = _points(gain.slope.difference, gain.slope.interval)
    return f"; from {gain.slope.before:,} rows to {gain.slope.after:,}, by doubling: {per_doubling}"


# What would change the answer


def changes(signals: Signals, decision: Decision) -> list[str]:
    """Return what would change the answer, each with the number that it would take."""
    grounds = Grounds(signals)
    told = {
        "fine-tune": [*_prompting_catches_up(signals, grounds), *_fewer_calls(signals, grounds)],
        "prompt": [*_more_calls(signals, grounds), *_more_gain(signals, grounds)],
        "retrieve": [*_more_calls(signals, grounds), *_more_gain(signals, grounds)],
        "can't tell": [
            *_a_pilot(signals),
            *_more_items(signals, grounds),
            *_more_rows(signals, grounds),
            *_more_shots(signals, grounds),
            *_more_calls(signals, grounds),
        ],
    }
    return told[decision.answer]


def _prompting_catches_up(signals: Signals, grounds: Grounds) -> list[str]:
    gain = signals.gain
    if not grounds.beats or gain is None:
        return []
    lacking = gain.contrast.interval.low - signals.margin
    told = f"Prompting would have to be {100 * lacking:.1f} points better"
    rising = [c for c in signals.context.curves if c.last is not None and c.last.difference > 0 and c.room]
    if not rising:
        return [f"{told}; more demonstrations show no sign of that."]
    curve = max(rising, key=grounds.lead)
    assert curve.last is not None
    doublings = (lacking - grounds.lead(curve)) / curve.last.difference
    # Beyond this nobody's context reaches, and the power would not fit a float.
    needed = curve.last.after * 2 ** min(doublings, 40)
    fits = f"{curve.most:,} fit" if needed <= curve.most else f"only {curve.most:,} fit"
    return [
        f"{told}: at the pace of its last doubling that takes about k = {needed:,.0f} ({curve.name}), and {fits}. "
        f"`evaluate.num_fewshot` with {2 * curve.last.after} in it would measure the next step."
    ]


def _fewer_calls(signals: Signals, grounds: Grounds) -> list[str]:
    even = signals.break_even
    if grounds.beats or even is None or even.calls_high is None:
        return []
    return [f"With fewer than {even.calls_high:,.0f} calls in {even.months} months it does not pay for sure."]


def _more_calls(signals: Signals, grounds: Grounds) -> list[str]:
    even = signals.break_even
    if even is None or even.calls_high is None or grounds.pays == "yes" or not grounds.as_good:
        return []
    volume = f"{even.calls_high:,.0f} calls in {even.months} months ({even.calls_high / even.months:,.0f} a month)"
    told = [f"From {volume} on, training pays for sure: then fine-tune, since the pilot is as good."]
    if even.expected_calls is not None:
        affordable = even.saving_interval.low * even.expected_calls
        told.append(
            f"At {even.expected_calls:,.0f} calls it would pay if training and the rest cost at most "
            f"{cost(even, affordable)} in all; now {cost(even, even.once.total)}."
        )
    return told


def _more_gain(signals: Signals, grounds: Grounds) -> list[str]:
    return [
        f"All rows may bring {points_text(grounds.reach)} points at the most, and it would take more than "
        f"{100 * signals.margin:g}: another base or config (`tunewright train --sweep`), or a smaller evaluate.margin."
    ]


def _a_pilot(signals: Signals) -> list[str]:
    if signals.gain is not None:
        return []
    return [f"A pilot, which was left out: {signals.left_out['gain']}."]


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
        return [f"{power} Even 20 times as many would hardly settle it: the difference is too close to what it takes."]
    side = "above" if contrast.difference > bar else "below"
    return [
        f"{power} About {needed:,} ({needed - signals.items:,} more) would settle it, if the true difference is "
        f"{points_text(contrast.difference)} points ({side} the {100 * bar:.1f} that it takes)."
    ]


def _more_rows(signals: Signals, grounds: Grounds) -> list[str]:
    gain = signals.gain
    if gain is None:
        return []
    left = doublings_left(gain)
    if left == 0:
        return _more_pairs(gain, signals.margin + grounds.headroom)
    told = (
        f"The pilot had {gain.pilot.rows:,} of {gain.all_rows:,} rows: advise.pilot_fraction and pilot_max_samples "
        "give it more"
    )
    if gain.slope is None:
        return [f"{told}; then half of them are trained on too, and it is seen where more lead."]
    ahead = gain.contrast.difference + left * gain.slope.difference
    each, all_rows = points_text(gain.slope.difference), points_text(ahead)
    return [
        f"{told}. If each doubling goes on to bring {each} points, all {gain.all_rows:,} rows come to {all_rows} "
        f"points against {gain.contrast.control}."
    ]


def _more_pairs(gain: TuningGain, bar: float) -> list[str]:
    """Return how many training rows would take the difference to the bar, at the pace of the last doubling."""
    lacking = bar - gain.contrast.difference
    if gain.slope is None or gain.slope.difference <= 0 or lacking <= 0:
        return []
    # Beyond this nobody has pairs, and the power would not fit a float.
    rows = gain.all_rows * 2 ** min(lacking / gain.slope.difference, 40)
    each = points_text(gain.slope.difference)
    return [f"More pairs: if each doubling goes on to bring {each} points, about {rows:,.0f} training rows would do."]


def _more_shots(signals: Signals, grounds: Grounds) -> list[str]:
    if grounds.headroom <= 0:
        return []
    curve = max(signals.context.curves, key=lambda c: grounds.lead(c) + brought(c))
    shots = 2 * curve.points[-1].shots
    brings = points_text(grounds.headroom)
    return [f"Twice the demonstrations may bring {brings} points: add {shots} to evaluate.num_fewshot."]


# Few pairs


def expectations(signals: Signals) -> list[str]:
    """Return what to expect of fewer pairs than `FEW_TRAINING_PAIRS`; nothing else."""
    if signals.pairs >= FEW_TRAINING_PAIRS:
        return []
    shown = "little"
    if signals.gain is not None:
        shown = f"differences of {100 * signals.gain.contrast.minimum_detectable_effect:.1f} points and nothing less"
    return [
        f"{signals.pairs} pairs, fewer than {FEW_TRAINING_PAIRS}: expect prompting to be hard to beat, and an adapter "
        "that learns its pairs by heart within a few epochs (the one that is best on dev is kept).",
        f"{signals.items} dev items show {shown}, and a test split of that size no more: `tunewright crossval` makes "
        "each pair a test item once.",
    ]


def _points(difference: float, interval: Interval) -> str:
    return (
        f"{points_text(difference)} points (95% interval {points_text(interval.low)} to {points_text(interval.high)})"
    )
