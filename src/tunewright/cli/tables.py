"""Results as people read them, and as ``--json`` prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunewright.api import RunResult
from tunewright.cli.general_tables import general_tables
from tunewright.config import MetricName
from tunewright.data.versions import Manifest
from tunewright.demo import ThreeAnswers
from tunewright.evidence.base import Score
from tunewright.evidence.budget import Budget
from tunewright.evidence.engine_used import EngineUsed
from tunewright.evidence.noise import NoiseFloor
from tunewright.evidence.schema import Advice, Arm, Evidence, Measured
from tunewright.evidence.test_set_access import TestSetAccess
from tunewright.evidence.verdict import Verdict, changed_words
from tunewright.metrics import axis_label, metric_label

if TYPE_CHECKING:
    from tunewright.evaluation.scaling import ScaleResult

DEV_NOTE = (
    "The dev split chose the adapter's step and the best prompting arm, so both look better here than they are. "
    "The test split stays closed."
)
_COLOURS = {"ship": "bold green", "don't ship": "bold red", "can't tell": "bold yellow"}


def arms_table(title: str, arms: Sequence[Arm], metric: MetricName, metrics: Mapping[MetricName, Measured]) -> Table:
    """Arms with their score by the deciding metric and its 95% interval, and by the metrics beside it.

    ``shared`` are the tokens that all prompts of the arm begin with.
    """
    table = Table(title=title, title_justify="left")
    counted = metrics[metric].kind == "right or wrong"
    also = [name for name in metrics if name != metric]
    # Told where there are any.
    counts = {
        "outside": [arm.score(metric).outside for arm in arms],
        "unscored": [sum(arm.score(metric).unscored.values()) for arm in arms],
    }
    extra = [name for name, of_arms in counts.items() if any(of_arms)]
    names = ("arm", *(["right"] if counted else []), axis_label(metric), "95% interval", *map(axis_label, also))
    for name in (*names, *extra, "prompt tokens", "shared"):
        # Names of metrics may be long: their headings wrap.
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name in {"arm", "95% interval"})
    for row, arm in enumerate(arms):
        score = arm.score(metric)
        table.add_row(
            arm.name,
            *([f"{round(score.value * score.scored)} of {score.scored}"] if counted else []),
            f"{100 * score.value:.1f}",
            _interval(score),
            *(f"{100 * arm.score(name).value:.1f}" for name in also),
            *(str(counts[name][row]) for name in extra),
            f"{arm.prompt_tokens:.0f}",
            str(arm.shared_tokens),
        )
    return table


def prompting_tables(advice: Advice) -> list[RenderableType]:
    """What prompting reaches on dev: every arm, static ones by their draws, and the finalists where there are some."""
    narrowing = advice.narrowing
    arms = advice.arms if narrowing is None else narrowing.arms
    all_dev = f"{advice.items} dev items"
    on = all_dev if narrowing is None else f"{narrowing.items} of the {all_dev}"
    told: list[RenderableType] = [
        arms_table(
            f"Prompting on {on}, untuned base",
            [arm for arm in arms if arm.seed is None],
            advice.metric,
            advice.metrics,
        )
    ]
    if advice.static:
        told.append(draws_table(f"Static demonstrations on {on}", advice))
    if narrowing is not None:
        told.append(arms_table(f"Finalists on all {all_dev}", advice.arms, advice.metric, advice.metrics))
        told.append(f"Finalists: {narrowing.rule}.")
    trimmed = advice.budget.prompting if advice.budget else ()
    told += [f"Left out: {arm.name}: {arm.why}." for arm in advice.left_out if arm.name not in trimmed]
    told += _left_out(advice.budget)
    return [*told, f"Best prompting arm: {advice.best}. A fine-tune has to beat it."]


def draws_table(title: str, advice: Advice) -> Table:
    """Static arms: the mean over draws of demonstrations, and how much the draw matters."""
    table = Table(title=title, title_justify="left")
    for name in ("arm", "draws", axis_label(advice.metric), "lowest to highest"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for each in advice.static:
        spread = f"{100 * min(each.scores):.1f} to {100 * max(each.scores):.1f}"
        table.add_row(each.name, str(len(each.scores)), f"{100 * each.mean:.1f}", spread)
    return table


def _interval(score: Score) -> str:
    return f"{100 * score.interval.low:.1f} to {100 * score.interval.high:.1f}"


def contrasts_table(title: str, evidence: Evidence) -> Table:
    """Contrasts with difference, interval, p (adjusted for being several), and the items that changed."""
    table = Table(title=title, title_justify="left")
    several = len(evidence.metrics) > 1
    words = changed_words(evidence, evidence.metric)
    names = ("contrast", *(["metric"] if several else []), "difference", "95% interval", "p", "adjusted p", *words)
    for name in (*names, "detectable"):
        # These have blanks to wrap at; without that, long names of arms would cut numbers off.
        wrapped = name in {"metric", "adjusted p"}
        table.add_column(name, justify="left" if name in {"contrast", "metric"} else "right", no_wrap=not wrapped)
    for c in evidence.contrasts:
        table.add_row(
            f"{c.treatment} - {c.control}",
            *([metric_label(c.metric)] if several else []),
            f"{100 * c.difference:+.1f}",
            f"{100 * c.interval.low:+.1f} to {100 * c.interval.high:+.1f}",
            f"{c.p_value:.2g}",
            "" if c.p_adjusted is None else f"{c.p_adjusted:.2g}",
            str(c.fixed),
            str(c.broken),
            f"{100 * c.minimum_detectable_effect:.1f}",
        )
    return table


def folds_table(evidence: Evidence) -> Table:
    """The folds of a cross-fitted evaluation: what each trained on, chose and scored."""
    table = Table(title=f"Folds, scores by {axis_label(evidence.metric)}", title_justify="left")
    scored = [arm.name for arm in evidence.arms]
    for name in ("fold", "train", "dev", "items", "best prompting", *scored, "dev loss by epoch"):
        wrapped = name == "dev loss by epoch"  # has blanks to wrap at, so that nothing else is cut off
        table.add_column(name, justify="left" if name == "best prompting" else "right", no_wrap=not wrapped)
    for fold in evidence.folds:
        scores = ("none" if (score := fold.scores[name]) is None else f"{100 * score:.1f}" for name in scored)
        numbers = (fold.number, fold.train_items, fold.dev_items, fold.items)
        losses = ", ".join(f"{loss:.3f}" for loss in fold.dev_losses)
        table.add_row(*map(str, numbers), fold.best_prompting, *scores, losses)
    return table


def evidence_tables(evidence: Evidence) -> list[RenderableType]:
    """The arms on the test items and their contrasts."""
    engine = [engine_text(evidence.engine)] if evidence.engine else []
    if evidence.design == "cross-fitted":
        items = f"{evidence.items} items in {evidence.clusters} clusters{evidence.inputs_text}"
        title = f"{items}, cross-fitted in {len(evidence.folds)} folds"
        arms = arms_table(title, evidence.arms, evidence.metric, evidence.metrics)
        contrasts = contrasts_table("Contrasts on all items, in points", evidence)
        return [folds_table(evidence), arms, contrasts, *engine]
    kind = "held-out test" if evidence.split == "test" else "dev"
    title = f"{evidence.items} {kind} items in {evidence.clusters} clusters{evidence.inputs_text}"
    return [
        arms_table(title, evidence.arms, evidence.metric, evidence.metrics),
        contrasts_table(f"Contrasts on the {evidence.split} split, in points", evidence),
        *([DEV_NOTE] if evidence.split == "dev" else []),
        *_left_out(evidence.budget),
        *engine,
        *([noise_text(evidence.noise_floor)] if evidence.noise_floor else []),
        *(general_tables(evidence.general) if evidence.general else ()),
    ]


def _left_out(budget: Budget | None) -> list[str]:
    if budget is None:
        return []
    told = f"Left out by --minutes {budget.minutes:g}: {', '.join(budget.left_out)}."
    return [told, *([f"Caution: {budget.caution}"] if budget.caution else [])]


def engine_text(engine: EngineUsed) -> str:
    """What computed the answers, and why that engine."""
    return f"Answered by {engine.text}: {engine.why}."


def noise_text(noise: NoiseFloor) -> str:
    """What changes when nothing is changed."""
    return (
        f"Noise floor: {noise.changed} of {noise.items} answers changed when the base gave them again in other "
        f"batches, and its score by {100 * noise.score_difference:+.1f} points."
    )


def ledger_table(openings: Sequence[TestSetAccess]) -> Table:
    """The openings of the test split, in the ledger's order."""
    table = Table(title="Openings of the test split", title_justify="left")
    for name in ("line", "opened (UTC)", "by", "evaluation", "adapter", "items", "declared"):
        wide = name in {"by", "adapter", "declared"}
        justify: Literal["left", "right"] = "right" if name in {"line", "items"} else "left"
        table.add_column(name, justify=justify, no_wrap=not wide, overflow="fold")
    for opening in openings:
        first = opening.declared[0]
        table.add_row(
            str(opening.number),
            opening.time[:16],
            opening.author or "",
            opening.evaluation,
            opening.adapter or "one for each fold",
            str(opening.items),
            f"{first.treatment} against {first.control}",
        )
    return table


def verdict_text(decision: Verdict) -> Text:
    """The decision and its reasons."""
    on_dev = " (on dev)" if decision.split == "dev" else ""
    text = Text(f"Verdict{on_dev}: {decision.decision}\n", style=_COLOURS[decision.decision])
    lines = [f"  {reason}" for reason in decision.reasons]
    if decision.causes:
        lines.append("Why, as far as it can be known:")
        lines += [f"  - {cause.what}: {cause.evidence}. Next: {cause.next_command}." for cause in decision.causes]
    text.append("\n".join(lines), style="default")
    return text


def run_tables(result: RunResult) -> list[RenderableType]:
    """The whole road's result."""
    return [*evidence_tables(result.evaluated.evidence), verdict_text(result.verdict), f"Report: {result.report}"]


def run_document(result: RunResult) -> dict[str, Any]:
    """The whole road's result as JSON."""
    return {
        "data": result.added.as_dict(),
        "advice": result.advised.advice.model_dump(mode="json"),
        "adapter": result.trained.adapter.name,
        "evidence": result.evaluated.evidence.model_dump(mode="json"),
        "verdict": result.verdict.as_dict(),
        "report": str(result.report),
    }


def answers_table(answered: ThreeAnswers) -> Table:
    """One question and who answered what."""
    table = Table(
        title=f"Served: {answered.question}\nReference: {answered.reference}", title_justify="left", show_lines=True
    )
    table.add_column("model", no_wrap=True)
    table.add_column("answer", overflow="fold")
    for model, answer in answered.answers.items():
        table.add_row(model, Text(answer))
    return table


def version_table(versions: Sequence[Manifest], current: Manifest | None = None) -> Table:
    """Dataset versions with what is in them; of several, the current one has a star."""
    table = Table()
    mixed = ["mixed in"] if any(v.counts.mixed for v in versions) else []
    numbers = ("rows", "train", "dev", "test", *mixed, "clusters", "families", "conflicts")
    for name in ("version", "created", *numbers, "message"):
        text = name in {"version", "created", "message"}
        table.add_column(name, justify="left" if text else "right", no_wrap=name != "message")
    for version in versions:
        c = version.counts
        counts = (c.rows, c.train, c.dev, c.test, *([c.mixed] if mixed else []), c.clusters, c.families, c.conflicts)
        star = "*" if len(versions) > 1 and current is not None and version.digest == current.digest else ""
        table.add_row(version.digest[:12] + star, version.created[:16], *(f"{n:,}" for n in counts), version.message)
    return table


def scales_table(result: ScaleResult) -> Table:
    """An adapter at several scales: what it scores, what it forgets, which was chosen."""
    samples = result.chosen.forgetting.samples
    title = f"{result.parent.name} on {result.dev_items} dev items and {samples} samples of the base"
    table = Table(title=title, title_justify="left", caption=f"Chosen: {result.rule}.", caption_justify="left")
    for name in ("factor", axis_label(result.metric), "forgotten, nats/token", "95% interval", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for each in result.tried:
        lost = each.forgetting
        table.add_row(
            f"{each.factor:g}",
            f"{100 * each.dev:.1f}",
            f"{lost.increase:+.4f}",
            f"{lost.interval.low:+.4f} to {lost.interval.high:+.4f}",
            "chosen" if each == result.chosen else "",
        )
    return table
