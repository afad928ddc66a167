"""Known causes of a *don't ship* or *can't tell*.

A pure function of the evidence and of other facts about the project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Any

from tunewright.config.train import BUNDLED_TRAINING, PRESETS
from tunewright.evidence.learning_curve import Curve, more_data
from tunewright.evidence.schema import Arm, Evidence
from tunewright.evidence.verdict import CAUTION_SHARE, ENFORCEABLE, FORM_LEARNT, NO_MODEL, Reason, Verdict, verdict
from tunewright.metrics import points_text, score_text

FEW_ROWS = 500
"""Below this number of rows, of which `data add` warns, more rows are the first remedy."""
NOISY = 0.05
"""Share of wrong or contradicting rows from which scores suffer; `data review` accepts a lower share."""
FEWEST_REVIEWED = 20

_FALLING = 0.02
"""A relative fall of the dev loss at the last evaluation that shows unfinished training."""
_LEARNT = 0.01
"""A dev loss, in nats per token, below which a further fall shows nothing: the answers' tokens have 99%."""
_FALLING_STEPS = 0.1
"""The same fall for the noisier training loss, from the second third of the steps to the last."""
_LAST_GAIN = 0.1
"""Alternatively, the last third's part of the total fall since the first third, if it exceeds the noise.

Under a cosine schedule the last third has 6% of the summed rate, so a converged loss falls very little there."""
_FEW_STEPS = 20
"""Optimizer steps under which a run with one evaluation counts as too short."""
_NEAR_BASE = 0.005
"""Nats per token under which an adapter answers like its base (docs/benchmarks/training.md)."""
_USELESS = 0.1
"""Share of a metric's range below which an arm does not solve the task."""
_FEWEST_STEPS = 8
_MOST_DOUBLINGS = 5


@dataclass(frozen=True)
class Labels:
    """Counts of rows that are wrong or in conflict."""

    rows: int
    """Rows of the dataset version."""
    conflicts: int
    """Inputs with more than one output."""
    checked: int = 0
    """Rows that reviewers have checked."""
    wrong: int = 0
    """Checked rows that are wrong."""


@dataclass(frozen=True)
class ProjectFacts:
    """Facts about the project beyond the evidence; each may be missing."""

    history: Sequence[Mapping[str, Any]] = ()
    """The training run's ``metrics.jsonl``: a row for each step and evaluation."""
    curve: Curve | None = None
    """A learning curve on the same data and base."""
    labels: Labels | None = None
    cost: str | None = None
    """Cost of calls with the prompting arm and tuned, if advice measured it."""


def decided(evidence: Evidence, known: ProjectFacts | None = None) -> Verdict:
    """Return the verdict, with its causes unless it is *ship*."""
    found = verdict(evidence)
    reasons = causes(evidence, found, known or ProjectFacts())
    if not reasons:
        return found
    step = reasons[0].next_command
    if found.reasons[0].startswith(NO_MODEL):
        step = f"{NO_MODEL}. If you still want an adapter: {step}"
    return replace(found, causes=reasons, next_step=step)


def causes(evidence: Evidence, found: Verdict, known: ProjectFacts) -> tuple[Reason, ...]:
    """Return the likely causes of a *don't ship*, likeliest first; empty for a *ship*.

    A *can't tell* only gets causes that training can remove. Causes that cannot change the outcome are left out:

    - the token limit, if even correct answers instead of the cut ones would not suffice;
    - more epochs, if the loss has stopped falling;
    - more rows, if the learning curve is flat.

    More test items are never a remedy for a *don't ship*, since the interval is on the wrong side
    already. There are also no causes if the gain suffices and benchmarks or people prevent a *ship*.
    """
    first = evidence.contrasts[0]
    if found.decision == "ship" or first.interval.low > evidence.margin:
        return ()
    tuned = evidence.arm(first.treatment)
    limit = _token_limit(evidence, tuned)
    suites = evidence.regressions.suites if evidence.regressions else ()
    divergence = next((suite.divergence for suite in suites if suite.divergence is not None), None)
    short = undertrained(evidence.lineage.get("adapter", {}).get("lineage", {}), known.history, divergence)
    early = [short] if short else []
    form = _form(evidence, tuned, undertrained=bool(early))
    mendable = [*early, *form, *limit]
    if found.decision == "can't tell":
        return tuple(mendable)
    return (
        *mendable,
        *_label_noise(evidence, known),
        *_few_rows(evidence, known, settled=not mendable),
        *_enough(evidence, mendable, known),
    )


# Training


def undertrained(
    lineage: Mapping[str, Any], history: Sequence[Mapping[str, Any]], divergence: float | None = None
) -> Reason | None:
    """Return the reason if a training run was too short to learn its data; else None.

    ``divergence``, if measured, is from the base on its own answers to the adapter, in nats per token.
    """
    epochs = lineage.get("training", {}).get("epochs", [])
    if not epochs:
        return None  # cross-validated or imported: there is no single training run
    last, config = epochs[-1], lineage.get("config", {}).get("train", {})
    falling, steps = _still_falling(epochs, history), last["step"]
    near = divergence is not None and divergence < _NEAR_BASE
    # One evaluation shows no trend. An adapter that starts from another adapter has already learned.
    few = steps < _FEW_STEPS and (falling or len(epochs) == 1) and "parent" not in lineage
    if not (falling or near or few):
        return None
    text = falling or f"dev loss {last['dev_loss']:.3f} at its last evaluation"
    text += f"; {divergence:.4f} nats per token from the base" if near else ""
    what = "Undertrained: the loss was still falling when training ended"
    if near or few:
        what = f"Hardly trained: {steps:,} optimizer steps"
        what += ", and the answers are nearly the base's" if near else ""
    planned = config.get("epochs", last["epoch"])
    wanted = max(2 * planned, 3, math.ceil(_FEW_STEPS * planned / steps))
    settings = _bundled_settings(lineage, last)
    fix = f"Set {settings}train.epochs: {wanted:g} (now {planned:g})"
    fix += " or raise train.learning_rate" if (near or few) and not settings else ""
    then = "then `tunewright train` and `tunewright evaluate --dev`; `tunewright train --sweep` searches for a rate"
    return Reason(what, text, f"{fix}, {then}")


def _bundled_settings(lineage: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Return the bundled base's settings to set, if it learned nearly nothing with others; else an empty string."""
    train, metric = lineage.get("config", {}).get("train", {}), last.get("dev_metric")
    bundled = str(lineage.get("base", {}).get("spec", "")).startswith("bundled:") and train.get("method") == "sft"
    weak = train.get("preset") == "classic" or train.get("learning_rate") == PRESETS["classic"]["learning_rate"]
    if not bundled or not weak or metric is None or metric > _USELESS:
        return ""
    return "".join(f"train.{key}: {value}, " for key, value in BUNDLED_TRAINING.items()) + "and "


def _still_falling(epochs: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the losses that show unfinished training, or None. The last evaluation must be the best one."""
    losses = [epoch["dev_loss"] for epoch in epochs]
    if len(losses) > 1:
        fall = 1 - losses[-1] / losses[-2] if losses[-2] else 0.0
        # Near 0, a loss halves without any effect on the answers.
        if losses[-1] > min(losses) or fall < _FALLING or losses[-2] < _LEARNT:
            return None
        return f"dev loss {' → '.join(f'{loss:.3f}' for loss in losses[-3:])} at step {epochs[-1]['step']:,}, its last"
    # One evaluation shows no trend, so the steps' losses are used, except in preference tuning (no likelihoods).
    steps = [float(row["loss"]) for row in history if "loss" in row and "rewards/chosen" not in row]
    if len(steps) < _FEWEST_STEPS:
        return None
    third = len(steps) // 3
    first, middle, last = steps[:third], steps[-2 * third : -third], steps[-third:]
    before, after = fmean(middle), fmean(last)
    fall, gain = before - after, fmean(first) - after
    noise = 2 * ((variance(middle) + variance(last)) / third) ** 0.5  # two standard errors of the fall
    lasting = fall >= _LAST_GAIN * gain and fall >= _FALLING * before and fall > noise
    if fall <= 0 or not (lasting or fall >= _FALLING_STEPS * before):
        return None
    return f"training loss {steps[0]:.3f} at first; {before:.3f}, then {after:.3f} in the last two thirds of its steps"


def _form(evidence: Evidence, tuned: Arm, *, undertrained: bool) -> list[Reason]:
    form = evidence.form
    if form is None or tuned.name not in form.answers:
        return []
    right = form.answers[tuned.name]
    lacking = form.references - right
    if right >= FORM_LEARNT * form.references or not _could_change(evidence, lacking):
        return []
    text = f"{right:,} of {form.items:,} tuned answers are {form.what} ({right / form.items:.0%})"
    text += f"; of the references {form.references:,}"
    endless = tuned.truncated - form.longer
    if endless > CAUTION_SHARE * tuned.items:
        text += f"; {endless:,} reached the token limit although their references do not"
    step = "`tunewright train --sweep` searches for a rate and preset that learn it"
    if undertrained:
        step = "Train longer first (above)"
    elif evidence.arm(evidence.contrasts[0].control).constrained or form.what.startswith(ENFORCEABLE):
        step = "Set evaluate.structured_outputs to enforce the form, then `tunewright evaluate --dev`"
    return [Reason("The adapter has not learned the form of the answers", text, step)]


def _token_limit(evidence: Evidence, tuned: Arm) -> list[Reason]:
    # The limit explains at most as many cut answers as there are longer references.
    cut = tuned.truncated if evidence.form is None else min(tuned.truncated, evidence.form.longer)
    if cut <= CAUTION_SHARE * tuned.items or not _could_change(evidence, cut):
        return []
    limit = evidence.lineage.get("decoding", {}).get("max_new_tokens")
    text = f"{tuned.truncated:,} of {tuned.items:,} tuned answers were cut at the limit"
    text += "" if limit is None else f" of {limit:,} tokens"
    text += "" if evidence.form is None else f"; {evidence.form.longer:,} references are longer"
    step = "Raise evaluate.max_new_tokens" if limit is None else f"Set evaluate.max_new_tokens: {2 * limit}"
    return [Reason("The token limit cuts answers", text, f"{step}, then `tunewright evaluate --dev`")]


def _could_change(evidence: Evidence, answers: int) -> bool:
    """Return whether the difference could pass the margin if this many more answers were right."""
    first = evidence.contrasts[0]
    return first.difference + answers / max(first.scored, 1) > evidence.margin


# Data


def _label_noise(evidence: Evidence, known: ProjectFacts) -> list[Reason]:
    labels = known.labels
    if labels is None or not labels.rows:
        return []
    text = []
    if labels.checked >= FEWEST_REVIEWED and labels.wrong >= NOISY * labels.checked:
        share = labels.wrong / labels.checked
        text.append(f"{labels.wrong:,} of {labels.checked:,} reviewed rows are wrong ({share:.0%})")
    # A graded metric gives partial credit for the other output; exact match gives none.
    graded = evidence.metrics[evidence.metric].kind != "right or wrong"
    if not graded and labels.conflicts >= NOISY * labels.rows:
        text.append(
            f"{labels.conflicts:,} inputs have more than one output ({labels.rows:,} rows), so no answer matches all"
        )
    if not text:
        return []
    return [Reason("Labels are noisy", "; ".join(text), "`tunewright data suspects`, then `tunewright data review`")]


def _few_rows(evidence: Evidence, known: ProjectFacts, *, settled: bool) -> list[Reason]:
    """Return *too few rows* if the learning curve rises; without one, if rows are few and nothing else is wrong."""
    curve, first = known.curve, evidence.contrasts[0]
    if curve is not None:
        if more_data(curve).answer != "yes":
            return []
        lacking = max(evidence.margin - first.difference, 0.0)
        doublings = lacking / curve.slope if curve.slope > 0 else float("inf")
        text = f"each doubling of the training rows brought {points_text(curve.slope)} points on dev"
        if doublings > _MOST_DOUBLINGS:
            return []  # 32 times the rows is not realistic advice
        needed = evidence.train_items * 2**doublings
        text += f"; about {needed:,.0f} rows would pass the margin if that continues"
        return [Reason("Too few rows", text, "`tunewright data add FILE` with more, then `tunewright run`")]
    if evidence.train_items >= FEW_ROWS or not settled:
        return []
    text = f"{evidence.train_items:,} training rows, fewer than {FEW_ROWS}; the effect of more rows was not measured"
    return [Reason("Perhaps too few rows", text, "`tunewright train --curve`")]


# Prompting


def _enough(evidence: Evidence, mendable: Sequence[Reason], known: ProjectFacts) -> list[Reason]:
    """Return *prompting is enough* if nothing was found that training could improve."""
    first = evidence.contrasts[0]
    control, tuned = evidence.arm(first.control), evidence.arm(first.treatment)
    if mendable or control.kind not in {"retrieved", "static"}:
        return []
    score = score_text(evidence.metric, control.score(evidence.metric).value)
    ours = score_text(evidence.metric, tuned.score(evidence.metric).value)
    text = (
        f"{control.name} has {score}, tuned {ours}; a call takes "
        f"{control.prompt_tokens:.0f} prompt tokens ({control.shared_tokens} of them the same in every call) "
        f"against {tuned.prompt_tokens:.0f}"
    )
    if max(control.score(evidence.metric).value, tuned.score(evidence.metric).value) < _USELESS:
        step = "Read answers in `tunewright report`; then try another base, or `tunewright train --sweep`"
        return [Reason("Neither prompting nor training works", f"{control.name} has {score}, tuned {ours}", step)]
    what = "Retrieval is enough" if control.kind == "retrieved" else "A prompt with demonstrations is enough"
    step = "`tunewright advise` measures how many calls it takes for shorter prompts to pay for training"
    if known.cost is not None:
        text, step = f"{text}; {known.cost}", f"Use the base with {control.name}; `tunewright report` has its cost"
    return [Reason(what, text, step)]
