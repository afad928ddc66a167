"""Why not to ship or why it can't be told, where that can be known.

A pure function of the evidence and of what the project knows besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Any

from tunewright.evidence.learning_curve import Curve, more_data
from tunewright.evidence.schema import Arm, Evidence
from tunewright.evidence.verdict import TOLD_SHARE, Reason, Verdict, verdict
from tunewright.metrics import points_text, score_text

FEW_ROWS = 500
"""As `data add` warns of: with fewer, more rows are the first thing to try."""
NOISY = 0.05
"""A share of wrong or contradicting rows that holds a score down; what `data review` accepts is below it."""
FEWEST_REVIEWED = 20

_FALLING = 0.02
"""A relative fall of the dev loss over the last evaluation that says that training was not done."""
_FALLING_STEPS = 0.1
"""The same of the training loss, from the second third of the steps to the last: it is noisier."""
_LAST_GAIN = 0.1
"""Or the last third's part of all that the loss fell from the first third on, if that is no noise. Where the rate
decays as a cosine, the last third has 6% of its sum: a loss that is done falling gains next to nothing there."""
_USELESS = 0.1
"""Of a metric's range: an arm that scores less is no solution, whatever the others have."""
_FEWEST_STEPS = 8
_FORM_LEARNT = 0.9
"""Of the share of references with the form."""
_MOST_DOUBLINGS = 5


@dataclass(frozen=True)
class Labels:
    """What is known of how many rows are wrong."""

    rows: int
    """Of the dataset version."""
    conflicts: int
    """Inputs with more than one output."""
    checked: int = 0
    """Rows that reviewers have checked."""
    wrong: int = 0
    """Of them, wrong ones."""


@dataclass(frozen=True)
class Known:
    """What is known besides the evidence; each may be missing."""

    history: Sequence[Mapping[str, Any]] = ()
    """The training run's rows (``metrics.jsonl``): of each step and each evaluation."""
    curve: Curve | None = None
    """A learning curve on the same data and base."""
    labels: Labels | None = None
    cost: str | None = None
    """What calls cost with the prompting arm and tuned, where advice has measured it."""


def decided(evidence: Evidence, known: Known | None = None) -> Verdict:
    """Return the verdict, with its causes where it is not to ship."""
    found = verdict(evidence)
    return replace(found, causes=causes(evidence, found, known or Known()))


def causes(evidence: Evidence, found: Verdict, known: Known) -> tuple[Reason, ...]:
    """Return what may have brought a *don't ship* about, the likeliest first; empty for a *ship*.

    For a *can't tell* only what training can mend is given: there, more test items are no better advice.

    A cause that cannot change the outcome is not given: the token limit where not even right answers in place of the
    cut ones would do, more epochs where the loss has stopped falling, more rows where the learning curve is flat. More
    test items never are: the interval lies on the wrong side already.

    Where the gain would do and something else forbids to ship (general ability, people), there is none either.
    """
    first = evidence.contrasts[0]
    if found.decision == "ship" or first.interval.low > evidence.margin:
        return ()
    tuned = evidence.arm(first.treatment)
    limit = _token_limit(evidence, tuned)
    early = _undertrained(evidence, known)
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


def _undertrained(evidence: Evidence, known: Known) -> list[Reason]:
    lineage = evidence.lineage.get("adapter", {}).get("lineage", {})
    epochs = lineage.get("training", {}).get("epochs", [])
    if not epochs:
        return []  # cross-fitted or imported: there is no one training run to look at
    last, config = epochs[-1], lineage.get("config", {}).get("train", {})
    told = _still_falling(epochs, known.history)
    if told is None:
        return []
    planned = config.get("epochs", last["epoch"])
    wanted = max(2 * planned, 3)
    return [
        Reason(
            "Undertrained: the loss was still falling when training ended",
            told,
            f"Set train.epochs: {wanted:g} (now {planned:g}), then `tunewright train` and `tunewright evaluate --dev`",
        )
    ]


def _still_falling(epochs: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the losses that show it; None where they do not. The last evaluation has to be the best one."""
    losses = [epoch["dev_loss"] for epoch in epochs]
    if len(losses) > 1:
        fall = 1 - losses[-1] / losses[-2] if losses[-2] else 0.0
        if losses[-1] > min(losses) or fall < _FALLING:
            return None
        return f"dev loss {' → '.join(f'{loss:.3f}' for loss in losses[-3:])} at step {epochs[-1]['step']:,}, its last"
    # One evaluation says nothing of where it was going; the steps' own losses do.
    steps = [float(row["loss"]) for row in history if "loss" in row]
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
    if right >= _FORM_LEARNT * form.references or not _could_change(evidence, lacking):
        return []
    told = f"{right:,} of {form.items:,} tuned answers are {form.what} ({right / form.items:.0%})"
    told += f"; of the references {form.references:,}"
    endless = tuned.truncated - form.longer
    if endless > TOLD_SHARE * tuned.items:
        told += f"; {endless:,} ran on to the token limit, where their references do not"
    step = "`tunewright train --sweep` looks for a rate and a preset that learn it"
    if undertrained:
        step = "Train longer first (above)"
    elif evidence.arm(evidence.contrasts[0].control).constrained or form.what.startswith(("JSON", "one of")):
        step = "Set evaluate.constrain to hold answers to the form, then `tunewright evaluate --dev`"
    return [Reason("The form of the answer is not learnt", told, step)]


def _token_limit(evidence: Evidence, tuned: Arm) -> list[Reason]:
    # Of the cut answers only as many as there are longer references can be cut for the limit's sake.
    cut = tuned.truncated if evidence.form is None else min(tuned.truncated, evidence.form.longer)
    if cut <= TOLD_SHARE * tuned.items or not _could_change(evidence, cut):
        return []
    limit = evidence.lineage.get("decoding", {}).get("max_new_tokens")
    longer = "" if evidence.form is None else f"; {evidence.form.longer:,} right answers are longer than it"
    told = f"{tuned.truncated:,} of {tuned.items:,} tuned answers were cut at the limit"
    if limit is None:
        return [
            Reason(
                "The token limit cuts answers",
                f"{told}{longer}",
                "Raise evaluate.max_new_tokens, then `tunewright evaluate --dev`",
            )
        ]
    return [
        Reason(
            "The token limit cuts answers",
            f"{told} of {limit:,} tokens{longer}",
            f"Set evaluate.max_new_tokens: {2 * limit:,}".replace(",", "") + ", then `tunewright evaluate --dev`",
        )
    ]


def _could_change(evidence: Evidence, answers: int) -> bool:
    """Return whether the difference could pass the margin if these answers more were right."""
    first = evidence.contrasts[0]
    return first.difference + answers / max(first.scored, 1) > evidence.margin


# Data


def _label_noise(evidence: Evidence, known: Known) -> list[Reason]:
    labels = known.labels
    if labels is None or not labels.rows:
        return []
    told = []
    if labels.checked >= FEWEST_REVIEWED and labels.wrong >= NOISY * labels.checked:
        told.append(
            f"{labels.wrong:,} of {labels.checked:,} reviewed rows are wrong ({labels.wrong / labels.checked:.0%})"
        )
    # A graded metric gives part of the score for another right output; right or wrong gives nothing.
    graded = evidence.metrics[evidence.metric].kind != "right or wrong"
    if not graded and labels.conflicts >= NOISY * labels.rows:
        told.append(
            f"{labels.conflicts:,} inputs have more than one output ({labels.rows:,} rows), and no answer can match all"
        )
    if not told:
        return []
    return [Reason("Labels are noisy", "; ".join(told), "`tunewright data suspects`, then `tunewright data review`")]


def _few_rows(evidence: Evidence, known: Known, *, settled: bool) -> list[Reason]:
    """That more rows would help, by the learning curve; without one where rows are few and nothing else is wrong."""
    curve, first = known.curve, evidence.contrasts[0]
    if curve is not None:
        if more_data(curve).answer != "yes":
            return []
        lacking = max(evidence.margin - first.difference, 0.0)
        doublings = lacking / curve.slope if curve.slope > 0 else float("inf")
        told = f"each doubling of the training rows brought {points_text(curve.slope)} points on dev"
        if doublings > _MOST_DOUBLINGS:
            return []  # nobody has 32 times the rows
        needed = evidence.train_items * 2**doublings
        told += f"; about {needed:,.0f} would pass the margin if that holds"
        return [Reason("Too few rows", told, "`tunewright data add FILE` with more, then `tunewright run`")]
    if evidence.train_items >= FEW_ROWS or not settled:
        return []
    return [
        Reason(
            "Perhaps too few rows",
            f"{evidence.train_items:,} training rows, fewer than {FEW_ROWS}; whether more would help is not measured",
            "`tunewright train --curve`",
        )
    ]


# Prompting


def _enough(evidence: Evidence, mendable: Sequence[Reason], known: Known) -> list[Reason]:
    """That prompting does as well: said where nothing was found that training could mend."""
    first = evidence.contrasts[0]
    control, tuned = evidence.arm(first.control), evidence.arm(first.treatment)
    if mendable or control.kind not in {"retrieved", "static"}:
        return []
    score = score_text(evidence.metric, control.score(evidence.metric).value)
    ours = score_text(evidence.metric, tuned.score(evidence.metric).value)
    told = (
        f"{control.name} has {score}, tuned {ours}; a call takes "
        f"{control.prompt_tokens:.0f} prompt tokens ({control.shared_tokens} of them the same in every call) "
        f"against {tuned.prompt_tokens:.0f}"
    )
    if max(control.score(evidence.metric).value, tuned.score(evidence.metric).value) < _USELESS:
        return [
            Reason(
                "Neither prompting nor training works",
                f"{control.name} has {score}, tuned {ours}",
                "Read answers in `tunewright report`; then try another base, or `tunewright train --sweep`",
            )
        ]
    what = "Retrieval is enough" if control.kind == "retrieved" else "A prompt with demonstrations is enough"
    if known.cost is not None:
        return [
            Reason(what, f"{told}; {known.cost}", f"Use the base with {control.name}; `tunewright report` has its cost")
        ]
    return [Reason(what, told, "`tunewright advise` measures from how many calls on shorter prompts pay for training")]
