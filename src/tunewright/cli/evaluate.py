"""``evaluate`` and ``crossval``: the adapter against prompting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import EVALUATE, Adapter, Force, Minutes, app, command
from tunewright.cli.console import RESUMES, Session
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from tunewright.evaluation.frozen_answers import IncumbentEstimate
    from tunewright.evaluation.runner import EvaluateResult


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
            help="Count the answers to compute, and estimate calls, tokens and cost of the incumbents'; send nothing.",
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
    from tunewright.evidence.blocks import evaluation_sections

    run.show(
        {
            "folder": str(result.folder),
            "evaluated": result.evaluated,
            "split": result.evidence.split,
            "evidence": result.evidence.model_dump(mode="json"),
        },
        *evaluation_sections(result.evidence),
        f"Evidence: {result.folder}",
    )


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
