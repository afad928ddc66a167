"""``verdict``, ``report`` and ``access-log``: conclusions from the evidence, and accesses to the test split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from tunewright.cli.app import EVALUATE, app, command
from tunewright.cli.console import Session

if TYPE_CHECKING:
    from tunewright.evidence.verdict import Verdict

Evaluation = Annotated[
    Path | None, typer.Argument(help="ID, folder or evidence.json of an evaluation.", show_default="the newest")
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
    # The evidence and its log suffice, wherever they are stored: no project is opened.
    decision = run.unopened.verdict(evaluation)
    document = decision.as_dict()
    if markdown:
        document["markdown"] = run.unopened.verdict_markdown(evaluation)
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
        lines += ["Likely causes:", *(f"  - {cause.text}" for cause in decision.causes)]
    for each in decision.replacements:
        lines.append(f"Incumbent {each.incumbent.name}: {each.outcome}")
        lines += [f"  {reason}" for reason in each.reasons]
    text.append("\n".join(lines), style="default")
    return text
