"""``evaluate`` and ``crossval``: the adapter against prompting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tunewright.cli.app import EVALUATE, Adapter, Force, Minutes, app, command
from tunewright.cli.console import RESUMES, Session
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.config import MetricName
    from tunewright.evaluation.frozen_answers import IncumbentEstimate
    from tunewright.evaluation.runner import EvaluateResult
    from tunewright.evidence.common import Budget, EngineUsed, NoiseFloor, Score
    from tunewright.evidence.incumbents import Incumbents
    from tunewright.evidence.schema import Advice, Arm, Evidence, Measured

DEV_NOTE = (
    "The dev split chose the adapter's step and the best prompting arm, so both look better here than they are. "
    "The test split stays closed."
)


@command(app, "evaluate", panel=EVALUATE, cluster=True, example="tunewright evaluate --minutes 30", kept=RESUMES)
def evaluate(
    run: Session,
    adapter: Adapter = None,
    dev: Annotated[
        bool,
        typer.Option(
            "--dev",
            help="Compare on the dev split and leave the test split closed. `verdict` and `report` mark the result as "
            "dev; `deploy` does not accept it.",
        ),
    ] = False,
    minutes: Minutes = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Estimate the time of the answers on this machine, and calls, tokens and cost of the incumbents'; "
            "send nothing.",
        ),
    ] = False,
) -> None:
    """Compare the adapter with zero-shot, the best prompting arm and incumbents on the held-out test split.

    Before the test split is opened, the planned comparison is written to the access log. Resumes where it stopped.
    """
    from tunewright.adapters.registry import list_adapters

    project = run.project
    if estimate:
        if minutes is not None:
            raise UserError(
                "--estimate and --minutes are mutually exclusive", where="--minutes", fix="Leave one of them out."
            )
        expected = project.estimate_incumbents(dev=dev) if project.folder.config.evaluate.incumbents else []
        # The cost of incumbents can be known before an adapter is trained.
        known = expected and adapter is None and not list_adapters(project.folder.adapters)
        answers = None if known else project.estimate_evaluation(adapter, dev=dev)
        run.show(
            {"answers": answers, "incumbents": expected},
            *([answers.text] if answers else []),
            *map(incumbent_estimate_text, expected),
        )
        return
    result = project.evaluate_on_dev(adapter, minutes=minutes) if dev else project.evaluate(adapter, minutes=minutes)
    _show(run, result)


@command(app, "crossval", panel=EVALUATE, cluster=True, example="tunewright crossval --folds 5", kept=RESUMES)
def crossval(
    run: Session,
    folds: Annotated[int, typer.Option(min=2, help="Number of folds.")] = 5,
    force: Force = False,
) -> None:
    """Evaluate the config by cross-validation: every row is answered by an adapter that saw no similar row.

    For small sets. Each fold trains its own adapter, so this takes as long as that many trainings. Resumes where it
    stopped.
    """
    _show(run, run.project.crossval(folds=folds, force=force))


def _show(run: Session, result: EvaluateResult) -> None:
    run.show(
        {
            "folder": str(result.folder),
            "evaluated": result.evaluated,
            "split": result.evidence.split,
            "evidence": result.evidence.model_dump(mode="json"),
        },
        *evidence_tables(result.evidence),
        f"Evidence: {result.folder}",
    )


def evidence_tables(evidence: Evidence) -> list[RenderableType]:
    """Return the tables of the arms and their contrasts."""
    from tunewright.cli.regressions import regressions_tables

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
        *([incumbents_table(evidence.incumbents)] if evidence.incumbents else []),
        *([DEV_NOTE] if evidence.split == "dev" else []),
        *_left_out(evidence.budget),
        *engine,
        *([noise_text(evidence.noise_floor)] if evidence.noise_floor else []),
        *(regressions_tables(evidence.regressions) if evidence.regressions else ()),
    ]


def arms_table(title: str, arms: Sequence[Arm], metric: MetricName, metrics: Mapping[MetricName, Measured]) -> Table:
    """Return arms with their score by the deciding metric, its 95% interval, and the other metrics.

    ``shared`` counts the tokens that all prompts of the arm begin with.
    """
    from tunewright.metrics import axis_label

    table = Table(title=title, title_justify="left")
    counted = metrics[metric].kind == "right or wrong"
    also = [name for name in metrics if name != metric]
    # Columns that appear only if a count is not zero.
    counts = {
        "outside": [arm.score(metric).outside for arm in arms],
        "unscored": [sum(arm.score(metric).unscored.values()) for arm in arms],
    }
    extra = [name for name, of_arms in counts.items() if any(of_arms)]
    names = ("arm", *(["right"] if counted else []), axis_label(metric), "95% interval", *map(axis_label, also))
    for name in (*names, *extra, "prompt tokens", "shared"):
        # Metric names may be long, so their headings wrap.
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
    """Return the prompting arms on dev: every arm, static ones by their draws, and the finalists if any."""
    narrowing = advice.narrowing
    arms = advice.arms if narrowing is None else narrowing.arms
    all_dev = f"{advice.items} dev items"
    on = all_dev if narrowing is None else f"{narrowing.items} of the {all_dev}"
    tables: list[RenderableType] = [
        arms_table(
            f"Prompting on {on}, untuned base",
            [arm for arm in arms if arm.seed is None],
            advice.metric,
            advice.metrics,
        )
    ]
    if advice.static:
        tables.append(draws_table(f"Static demonstrations on {on}", advice))
    if narrowing is not None:
        tables.append(arms_table(f"Finalists on all {all_dev}", advice.arms, advice.metric, advice.metrics))
        tables.append(f"Finalists: {narrowing.rule}.")
    trimmed = advice.budget.prompting if advice.budget else ()
    tables += [f"Left out: {arm.name}: {arm.why}." for arm in advice.left_out if arm.name not in trimmed]
    tables += _left_out(advice.budget)
    return [*tables, f"Best prompting arm: {advice.best}. A fine-tune has to beat it."]


def draws_table(title: str, advice: Advice) -> Table:
    """Return static arms with their mean and range over draws of demonstrations."""
    from tunewright.metrics import axis_label

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
    """Return contrasts with difference, interval, p (also adjusted for their number) and changed items."""
    from tunewright.evidence.verdict import changed_words
    from tunewright.metrics import metric_label

    table = Table(title=title, title_justify="left")
    several = len(evidence.metrics) > 1
    words = changed_words(evidence, evidence.metric)
    names = ("contrast", *(["metric"] if several else []), "difference", "95% interval", "p", "adjusted p", *words)
    for name in (*names, "detectable"):
        # These have spaces to wrap at. If they did not wrap, long arm names would cut numbers off.
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


def incumbents_table(incumbents: Incumbents) -> Table:
    """Return each incumbent with the tuned arm's loss against it, the margin, and its frozen answers."""
    table = Table(title="Tuned against incumbents: loss in points", title_justify="left")
    for name in ("incumbent", "model version", "answers", "loss", "95% interval", "margin", "outcome"):
        wide = name in {"incumbent", "model version"}
        table.add_column(name, justify="left" if wide else "right", no_wrap=not wide, overflow="fold")
    for found in incumbents.compared:
        drop = found.drop
        table.add_row(
            found.name,
            ", ".join(found.versions),
            f"{found.answered} of {found.answered + sum(found.gaps.values())}",
            f"{100 * drop.value:+.1f}",
            f"{100 * drop.interval.low:+.1f} to {100 * drop.interval.high:+.1f}",
            f"{100 * drop.margin:g}",
            drop.outcome,
        )
    return table


def incumbent_estimate_text(estimate: IncumbentEstimate) -> str:
    """Return the calls, tokens and cost of an incumbent's answers."""
    from tunewright.evidence.replacement import amount

    known = f", {estimate.known:,} more are there already" if estimate.known else ""
    most = estimate.most_completion_tokens
    limit = "without a limit" if most is None else f"at most {most:,}"
    cost = "unknown, since price_input and price_output are not set"
    if estimate.cost is not None:
        highest = "without a limit" if estimate.most_cost is None else f"at most {amount(estimate.most_cost)}"
        cost = f"about {amount(estimate.cost)}, {highest}"
    return (
        f"{estimate.name}: {estimate.calls:,} calls to send{known}\n"
        f"  about {estimate.prompt_tokens:,} prompt tokens (4 characters each) and {estimate.completion_tokens:,} "
        f"reply tokens (as long as the references), {limit}\n"
        f"  cost: {cost}"
    )


def folds_table(evidence: Evidence) -> Table:
    """Return the folds of a cross-validated evaluation: training rows, choices and scores."""
    from tunewright.metrics import axis_label

    table = Table(title=f"Folds, scores by {axis_label(evidence.metric)}", title_justify="left")
    scored = [arm.name for arm in evidence.arms]
    for name in ("fold", "train", "dev", "items", "best prompting", *scored, "dev loss by epoch"):
        wrapped = name == "dev loss by epoch"  # has spaces to wrap at, so that nothing else is cut off
        table.add_column(name, justify="left" if name == "best prompting" else "right", no_wrap=not wrapped)
    for fold in evidence.folds:
        scores = ("none" if (score := fold.scores[name]) is None else f"{100 * score:.1f}" for name in scored)
        numbers = (fold.number, fold.train_items, fold.dev_items, fold.items)
        losses = ", ".join(f"{loss:.3f}" for loss in fold.dev_losses)
        table.add_row(*map(str, numbers), fold.best_prompting, *scores, losses)
    return table


def _left_out(budget: Budget | None) -> list[str]:
    if budget is None:
        return []
    text = f"Left out by --minutes {budget.minutes:g}: {', '.join(budget.left_out)}."
    return [text, *([f"Caution: {budget.caution}"] if budget.caution else [])]


def engine_text(engine: EngineUsed) -> str:
    """Return the engine that computed the answers, and the reason for it."""
    return f"Answered by {engine.text}: {engine.why}."


def noise_text(noise: NoiseFloor) -> str:
    """Return the change between two runs of the same arm."""
    return (
        f"Noise floor: {noise.changed} of {noise.items} answers changed when the base repeated them in other "
        f"batches, and its score by {100 * noise.score_difference:+.1f} points."
    )
