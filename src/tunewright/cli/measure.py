"""From an adapter to a decision: evaluate, crossfit, ledger, verdict, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import RESUMES, session
from tunewright.cli.train import Force

Evaluation = Annotated[
    Path | None, typer.Argument(help="An evaluation's ID, folder or evidence.json.", show_default="the newest")
]


Minutes = Annotated[
    float | None,
    typer.Option(
        "--minutes",
        help="The most that answers may take, by the speed measured here. Leaves arms out, by name: those that decide "
        "nothing, then those with the most demonstrations.",
        show_default="no limit",
    ),
]


@app.command()
def evaluate(
    adapter: Annotated[
        str | None, typer.Argument(help="The adapter's name, or its beginning.", show_default="the newest")
    ] = None,
    dev: Annotated[
        bool,
        typer.Option(
            "--dev",
            help="Compare on the dev split instead, and leave the test split closed. `verdict` and `report` read it, "
            "marked as dev; `deploy` does not.",
        ),
    ] = False,
    minutes: Minutes = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Compare the adapter with zero-shot and the best prompting arm on the held-out test split.

    That opens the test split: what is going to be compared is written to the ledger first (`tunewright ledger`).
    """
    import tunewright
    from tunewright.cli.tables import evidence_tables

    with session(json, project, kept=RESUMES) as current:
        opened = tunewright.open(project, current.reporter)
        result = opened.evaluate_on_dev(adapter, minutes=minutes) if dev else opened.evaluate(adapter, minutes=minutes)
        current.show(
            {
                "folder": str(result.folder),
                "evaluated": result.evaluated,
                "split": result.evidence.split,
                "evidence": result.evidence.model_dump(mode="json"),
            },
            *evidence_tables(result.evidence),
            f"Evidence: {result.folder}",
        )


@app.command()
def crossval(
    folds: Annotated[int, typer.Option(min=2, help="How many parts the rows are dealt into.")] = 5,
    force: Force = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """For small sets: evaluate the config on every row, each answered by an adapter that saw none like it.

    Each fold trains an adapter of its own, so this takes as long as that many trainings. Goes on where it was stopped.
    """
    import tunewright
    from tunewright.cli.tables import evidence_tables

    with session(json, project, kept=RESUMES) as current:
        result = tunewright.open(project, current.reporter).crossval(folds=folds, force=force)
        current.show(
            {
                "folder": str(result.folder),
                "evaluated": result.evaluated,
                "evidence": result.evidence.model_dump(mode="json"),
            },
            *evidence_tables(result.evidence),
            f"Evidence: {result.folder}",
        )


@app.command()
def ledger(project: Folder = HERE, json: Json = False) -> None:
    """List every opening of the test split: who, when, what for. A line that was changed or removed is found."""
    from tunewright.api import Project
    from tunewright.cli.tables import ledger_table
    from tunewright.config.project import ProjectFolder

    with session(json, project) as current:
        openings = Project(ProjectFolder(project), current.reporter).ledger()
        current.show(
            {"openings": [opening.model_dump(mode="json") for opening in openings]},
            ledger_table(openings) if openings else "The test split has not been opened yet.",
        )


@app.command()
def verdict(
    evaluation: Evaluation = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="On stdout as GitHub markdown, for a comment on a pull request.")
    ] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Ship (exit 0), don't ship (3) or can't tell (4), from the evidence alone; and why not, where it can be known."""
    from tunewright.api import Project
    from tunewright.cli.tables import verdict_text
    from tunewright.config.project import ProjectFolder

    with session(json, project) as current:
        # Not opened as a project: evidence is enough, wherever it lies.
        opened = Project(ProjectFolder(project), current.reporter)
        decision = opened.verdict(evaluation)
        document: dict[str, Any] = decision.as_dict()
        if markdown:
            document["markdown"] = opened.verdict_markdown(evaluation)
        if markdown and not json:
            current.print_out(document["markdown"])
        else:
            current.show(document, verdict_text(decision))
        raise typer.Exit(decision.exit_code)


@app.command()
def report(evaluation: Evaluation = None, project: Folder = HERE, json: Json = False) -> None:
    """Write the evaluation's report: one HTML file that needs nothing else."""
    import tunewright

    with session(json, project) as current:
        path = tunewright.open(project, current.reporter).report(evaluation)
        current.show({"report": str(path)}, f"Report: {path}")
