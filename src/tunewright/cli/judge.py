"""``judge``: a language model compares the answers, after it has been tested itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import RESUMES, session
from tunewright.cli.measure import Evaluation

VETOED = 3


@app.command()
def judge(
    evaluation: Evaluation = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say how many calls, tokens and what cost it would be; send nothing.")
    ] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Correctness and preference by a judge (config: judge), which is tested first. Exit 3: it failed its controls.

    What the judge answered is kept: a stopped run goes on where it was, and nothing is paid for twice.
    """
    import tunewright
    from tunewright.cli.judge_tables import estimate_text, judgement_tables
    from tunewright.evaluation.judge.rows import CONTROLS_FILE, ROWS_FILE

    with session(json, project, kept=RESUMES) as current:
        opened = tunewright.open(project, current.reporter)
        if estimate:
            expected = opened.estimate_judge(evaluation)
            current.show(asdict(expected), estimate_text(expected))
            return
        result = opened.judge(evaluation)
        judged = result.judgement
        current.show(
            {"folder": str(result.folder), "judge": judged.model_dump(mode="json")},
            *judgement_tables(judged),
            f"Replies: {result.folder / (CONTROLS_FILE if judged.vetoed else ROWS_FILE)}",
        )
        if judged.vetoed:
            raise typer.Exit(VETOED)
