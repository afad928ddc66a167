"""Sections on a training run by step, on a sweep, and on what training and a call cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

from tunewright.advisor.advice import amount, break_even_text
from tunewright.advisor.signals import BreakEven, Signals
from tunewright.config import MetricName
from tunewright.core.progress import downsample
from tunewright.core.text import count_of
from tunewright.evidence.schema import Arm, Evidence
from tunewright.metrics import axis_label, metric_label, score_text
from tunewright.render.blocks import SERIES, Block, Cell, Column, Lead, Line, Lines, Notes, Row, Section, row, table
from tunewright.training.history import REPLAY_KL, REPLAY_LOSS, best_evaluation, evaluations, pairs_loss
from tunewright.training.sweep.ledger import Ledger, measured_text


def training_section(evidence: Evidence, history: Sequence[dict[str, Any]]) -> Section | None:
    """Return losses and the dev metric; None for a cross-validation, whose folds have their own runs."""
    if evidence.design == "cross-fitted":
        return None
    trained = f"{evidence.train_items:,} training examples."
    if not history:
        return Section("training", "Training", (Lead(f"{trained} This adapter has no loss history."),))
    # The metric that selected the checkpoint, where the lineage names it.
    training = evidence.lineage.get("adapter", {}).get("lineage", {}).get("training", {})
    metric: MetricName = training.get("metric") or evidence.metric
    caption = f"{trained} {_loss_words(history, metric)}"
    return Section("training", "Training", (replace(run_lines(history, metric), caption=caption),))


_REPLAY = {REPLAY_KL: "replay KL", REPLAY_LOSS: "loss of replay"}


def run_lines(history: Sequence[Mapping[str, Any]], metric: MetricName | None) -> Lines:
    """Return a run by step: train and dev loss, the dev metric below, and the selected step.

    For a step with ``pair_loss``, that loss is drawn instead of ``loss``. ``metric`` names ``eval_metric``.
    """
    train = downsample([(row["step"], loss) for row in history if (loss := pairs_loss(row)) is not None])
    replay = {key: downsample([(row["step"], row[key]) for row in history if key in row]) for key in _REPLAY}
    evaluated = evaluations(history)
    dev = tuple((each.step, each.dev_loss) for each in evaluated)
    scores = tuple((each.step, 100 * each.dev_metric) for each in evaluated if each.dev_metric is not None)
    unit = ", %" if metric is not None and axis_label(metric).endswith("%") else ""
    score = Lines("loss-score", "", (Line("dev score", scores, "tuned", dots=True),), f"dev score{unit}")
    return Lines(
        "loss",
        "Training and dev loss, and the score on dev, by optimizer step",
        (
            Line("train", tuple(train)),
            Line("dev", dev, "tuned", dots=True),
            *(Line(_REPLAY[key], tuple(points), "prompting") for key, points in replay.items() if points),
        ),
        "loss (nats per token)",
        below="optimizer step",
        mark=(best_evaluation(evaluated).step, "kept") if evaluated else None,
        lower=score if scores else None,
        from_zero=False,
    )


def _loss_words(history: Sequence[dict[str, Any]], metric: MetricName) -> str:
    evaluated = evaluations(history)
    if not evaluated:
        return "No dev loss was measured during training."
    lowest, kept = min(evaluated, key=lambda e: e.dev_loss), best_evaluation(evaluated)
    words = f"Dev loss was lowest at step {lowest.step:,} ({lowest.dev_loss:.3f}) and "
    words += f"{evaluated[-1].dev_loss:.3f} at the end. The adapter of step {kept.step:,} was kept"
    if kept.dev_metric is None:
        return f"{words}, by the dev loss."
    return f"{words}, by its {metric_label(metric)} on dev: {score_text(metric, kept.dev_metric)}."


def sweep_section(ledger: Ledger) -> Section:
    """Return each trial's dev result at each rung, and its outcome."""
    head = ledger.head
    lead = (
        f"Sweep {head.sweep}: {len(head.trials)} trials of at most {head.steps:,} steps, compared on the dev split; "
        "the test split stays closed."
    )
    rungs = (f"Rung {number}: step {step:,}" for number, step in enumerate(head.rungs, start=1))
    names: tuple[str | Column, ...] = ("Trial", *rungs, Column("Outcome", words=True))
    trials = table("Table of trials", names, (_trial_row(ledger, trial) for trial in head.trials))
    return Section("trials", "Trials", (Lead(lead), trials, sweep_lines(ledger)))


def _trial_row(ledger: Ledger, trial: str) -> Row:
    found = (ledger.result(trial, number) for number in range(1, len(ledger.head.rungs) + 1))
    results = ("" if entry is None else measured_text(entry, ledger.head.metric) for entry in found)
    return row(trial, *results, ledger.outcome(trial))


def sweep_lines(ledger: Ledger) -> Lines:
    """Return the dev score of each trial at each rung, or dev loss if no dev rows were answered."""
    head = ledger.head
    found = []
    for name, tone in zip(head.trials, cycle(SERIES), strict=False):
        results = [ledger.result(name, number) for number in range(1, len(head.rungs) + 1)]
        values = [(each.step, each.dev_loss if head.metric is None else each.dev_metric) for each in results if each]
        scale = 1 if head.metric is None else 100
        points = tuple((step, scale * value) for step, value in values if value is not None)
        found.append(Line(name, points, tone, dots=True))
    axis = "Dev loss" if head.metric is None else f"Dev: {axis_label(head.metric)}"
    return Lines("trials", f"{axis} of each trial by step", tuple(found), axis, from_zero=head.metric is not None)


_UNMEASURED = "No break-even was measured on these data and this base: `tunewright advise` measures it."


def cost_section(evidence: Evidence, advice: Signals | None) -> Section:
    """Return the average tokens sent and received per call, and their cost from advice on the same data."""
    first = evidence.contrasts[0]
    ours, theirs = evidence.arm(first.treatment), evidence.arm(first.control)
    head = ("Arm", "Prompt tokens", "The same in every prompt", "New in each", "Answer tokens")
    tokens = table("Table of tokens", head, (_tokens_row(arm) for arm in evidence.arms if arm.kind != "free"))
    return Section("cost", "Cost of a call, and break-even", (Lead(_lead(ours, theirs)), tokens, *_pays(advice)))


def _lead(ours: Arm, theirs: Arm) -> str:
    more = theirs.prompt_tokens - ours.prompt_tokens
    times = f"{theirs.prompt_tokens / ours.prompt_tokens:.1f} times as many" if round(more) > 0 else "no more"
    return (
        f"Mean tokens of a call. A call of {theirs.name} sends {theirs.prompt_tokens:.0f} tokens, one of {ours.name} "
        f"{ours.prompt_tokens:.0f}: {times}. A server computes the shared beginning of the prompts once (prefix "
        "caching), so a call costs the tokens that are new in each prompt and those of the answer."
    )


def _tokens_row(arm: Arm) -> Row:
    share = arm.shared_tokens / arm.prompt_tokens
    return row(
        arm.name,
        f"{arm.prompt_tokens:.0f}",
        Cell(f"{arm.shared_tokens:,}", f"{share:.0%} of the prompt"),
        f"{arm.prompt_tokens - arm.shared_tokens:.0f}",
        "not counted" if arm.answer_tokens is None else f"{arm.answer_tokens:.1f}",
    )


def _pays(advice: Signals | None) -> tuple[Block, ...]:
    """Return the break-even with its components and sources, or else the way to measure it."""
    if advice is None:
        return (Lead(_UNMEASURED),)
    even = advice.break_even
    if even is None:
        why = f"advice {advice.id} has none, as {advice.left_out['break_even']}"
        return (Lead(f"No break-even was measured: {why}. `tunewright advise` with a pilot measures it."),)
    unit = "" if even.unit == "money" else ", machine time"
    head = ("A call of", "Input tokens", "Of them in a prefix cache", "Output tokens", f"Costs{unit}")
    rows = []
    for call in (even.prompting, even.tuned):
        tokens = (f"{call.input_tokens:.0f}", f"{call.cached_tokens:.0f}", f"{call.output_tokens:.1f}")
        rows.append((call.arm, *tokens, amount(even, call.cost)))
    calls = table("Table of calls", head, rows)
    other = {
        "training on all rows": even.once.training,
        "evaluation": even.once.evaluation,
        "labelling": even.once.labelling,
        f"hosting, {count_of(even.months, 'month')}": even.once.hosting,
        "in all": even.once.total,
    }
    costs = ((name, amount(even, value)) for name, value in other.items())
    once = table("Table of what training costs", ("Costs other than calls", f"Costs{unit}"), costs)
    return (Lead(break_even_text(advice)), *break_even_lines(even), calls, once, Notes(_grounds(advice, even)))


def break_even_lines(even: BreakEven) -> tuple[Lines, ...]:
    """Return both total costs by number of calls, or nothing if the lines never cross."""
    if even.calls is None or even.calls_low is None:
        return ()
    end, once = 2 * even.calls, even.once.total
    return (
        Lines(
            "break-even",
            f"Costs of {even.prompting.arm} and of training by the number of calls",
            (
                Line(even.prompting.arm, ((0, 0), (end, end * even.prompting.cost)), "prompting"),
                Line("training, then tuned", ((0, once), (end, once + end * even.tuned.cost)), "tuned"),
            ),
            "cost" if even.unit == "money" else "machine time, hours",
            below="calls",
            mark=(even.calls, f"{even.calls:,.0f}"),
            band=(even.calls_low, min(even.calls_high or end, end)),
            caption="The band is the 95% interval of the number of calls from which on training pays.",
        ),
    )


def _grounds(advice: Signals, even: BreakEven) -> tuple[str, ...]:
    """Return the sources of the numbers, and the uncertainties that the interval excludes."""
    low, high = amount(even, even.saving_interval.low), amount(even, even.saving_interval.high)
    measured = (
        f"Advice {advice.id}: calls on {count_of(advice.items, 'dev item')}, the tuned ones by a pilot adapter. A call "
        f"saves {amount(even, even.saving)}, 95% interval {low} to {high}. It covers the token counts only: prices, "
        "speeds and the cost of training are treated as exact."
    )
    if not even.speed:
        return (measured,)
    speeds = "; ".join(
        f"{name} {speed.prefill:,.0f} prompt and {speed.decode:,.0f} answer tokens a second in a batch of {speed.rows}"
        for name, speed in even.speed.items()
    )
    return (measured, f"“This machine” is where the advice was measured: {speeds}.")
