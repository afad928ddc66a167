"""Measurements and their conclusions: ``evaluate``, ``crossval``, ``regressions``, ``verdict`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tunewright.cli.app import EVALUATE, Adapter, Force, Minutes, app, command
from tunewright.cli.console import RESUMES, Session
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from tunewright.evaluation.benchmarks.runner import BenchmarkResult
    from tunewright.evaluation.frozen_answers import IncumbentEstimate
    from tunewright.evaluation.runner import EvaluateResult
    from tunewright.evidence.verdict import Verdict


@command(
    app, "evaluate", panel=EVALUATE, cluster=True, loads=True, example="tunewright evaluate --minutes 30", kept=RESUMES
)
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
            help="Count the answers to compute and estimate their time, and the calls, tokens and cost of the "
            "incumbents'; send nothing.",
        ),
    ] = False,
) -> None:
    """Compare the adapter with zero-shot, the best prompting arm and incumbents on the held-out test split.

    Before the test split is opened, the planned comparison is written to the access log. Resumes where it stopped.
    """
    from tunewright.adapters.registry import list_adapters

    if estimate and minutes is not None:
        raise UserError(
            "--estimate and --minutes are mutually exclusive", where="--minutes", fix="Leave one of them out."
        )
    project = run.project
    if estimate:
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
    _show(run, project.evaluate(adapter, dev=dev, minutes=minutes))


@command(
    app, "crossval", panel=EVALUATE, cluster=True, loads=True, example="tunewright crossval --folds 5", kept=RESUMES
)
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


@command(
    app,
    "regressions",
    panel=EVALUATE,
    cluster=True,
    loads=True,
    example="tunewright regressions legal-4f1c02a9",
    kept=RESUMES,
)
def regressions(run: Session, adapter: Adapter = None) -> int:
    """Compare general abilities without and with the adapter: not worse (exit code 0), worse (3) or can't tell (4).

    The suites are those of the config's `regressions` section; `evaluate` measures them too. Resumes where it stopped.
    """
    from tunewright.evidence.benchmarks import benchmarks_section

    result = run.project.regressions(adapter)
    standing = result.standing
    evidence = (
        f"In the evidence: {result.folder}"
        if result.folder
        else "`tunewright evaluate` adds it to the adapter's evidence, once there is some."
    )
    run.show(regressions_document(result), benchmarks_section(result.benchmarks), *standing.reasons, evidence)
    return standing.exit_code


def regressions_document(result: BenchmarkResult) -> dict[str, Any]:
    """Return the result as JSON."""
    standing = result.standing
    return {
        "adapter": result.adapter.name,
        "measured": result.measured,
        "evaluation": None if result.folder is None else str(result.folder),
        "result": standing.result,
        "decides": standing.decides,
        "reasons": list(standing.reasons),
        "regressions": result.benchmarks.model_dump(mode="json"),
    }


Evaluation = Annotated[
    Path | None, typer.Argument(help="Number, ID, folder or evidence.json of an evaluation.", show_default="the newest")
]
_COLOURS = {"ship": "bold green", "don't ship": "bold red", "can't tell": "bold yellow"}


@command(app, "verdict", panel=EVALUATE, example="tunewright verdict --markdown")
def verdict(
    run: Session,
    evaluation: Evaluation = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print GitHub markdown on stdout, for a pull-request comment.")
    ] = False,
) -> int:
    """Decide from the evidence: ship (exit code 0), don't ship (3) or can't tell (4), with the reasons."""
    # The evidence and its log suffice, wherever they are stored: a project is opened only to name its missing config.
    project = run.unopened
    if evaluation is None and not project.folder.evaluations.is_dir():
        project = run.project
    decision = project.verdict(evaluation)
    document = decision.as_dict()
    if markdown:
        document["markdown"] = project.verdict_markdown(evaluation)
    if markdown and not run.as_json:
        run.print_out(document["markdown"])
    else:
        run.show(document, verdict_text(decision))
    return decision.exit_code


@command(app, "report", panel=EVALUATE, example="tunewright report")
def report(run: Session, evaluation: Evaluation = None) -> None:
    """Write the evaluation's report as one self-contained HTML file."""
    path = run.project.report(evaluation)
    run.show({"report": str(path)}, f"Report: {path}")


@command(app, "access-log", panel=EVALUATE, example="tunewright access-log")
def access_log(run: Session) -> None:
    """List every opening of the test split, after checking the log and the files that it binds for changes."""
    from tunewright.evidence.logged_access import log_table
    from tunewright.render.blocks import Lead

    openings = run.unopened.access_log()
    if not openings:
        run.unopened.folder.config  # noqa: B018 - refuses a folder that is no project
    shown = [Lead("Openings of the test split"), log_table(openings)]
    run.show(
        {"openings": [opening.model_dump(mode="json") for opening in openings]},
        *(shown if openings else ["The test split has not been opened yet."]),
    )


def verdict_text(decision: Verdict) -> Text:
    """Return the decision and its reasons."""
    on_dev = " (on dev)" if decision.split == "dev" else ""
    text = Text(f"Verdict{on_dev}: {decision.decision}\n", style=_COLOURS[decision.decision])
    lines = [f"  {reason}" for reason in decision.reasons]
    if decision.causes:
        lines += [decision.causes_title, *(f"  - {cause.text}" for cause in decision.causes)]
    for each in decision.replacements:
        lines.append(f"Incumbent {each.incumbent.name}: {each.outcome}")
        lines += [f"  {reason}" for reason in each.reasons]
    text.append("\n".join(lines), style="default")
    return text
