"""``judge``: a language model compares the answers, after it has been tested itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import EVALUATE, app, command
from tunewright.cli.console import MEASURED_NO, RESUMES, Session
from tunewright.cli.verdict import Evaluation
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from tunewright.evaluation.judge.runner import Estimate


@command(app, "judge", panel=EVALUATE, example="tunewright judge --estimate", kept=RESUMES)
def judge(
    run: Session,
    evaluation: Evaluation = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate calls, tokens and cost, and send nothing.")
    ] = False,
    keep_preferences: Annotated[
        bool,
        typer.Option(
            "--keep-preferences", help="Keep the judged preferences as pairs for preference tuning; send nothing."
        ),
    ] = False,
) -> int | None:
    """Have a model judge the answers' correctness and compare them. The judge is tested first; exit code 3 if it fails.

    The model is the config's judge. Its replies are stored, so a stopped run resumes and pays for nothing twice.
    """
    from tunewright.evaluation.judge.rows import CONTROLS_FILE, ROWS_FILE
    from tunewright.evidence.judge import judge_section

    if estimate and keep_preferences:
        raise UserError(
            "--estimate and --keep-preferences are mutually exclusive", where="--keep-preferences", fix="Choose one."
        )
    if keep_preferences:
        from tunewright.cli.human_eval import show_kept

        show_kept(run, run.project.keep_preferences(evaluation, source="judge"))
        return None
    if estimate:
        expected = run.project.estimate_judge(evaluation)
        run.show(expected, estimate_text(expected))
        return None
    result = run.project.judge(evaluation)
    judged = result.judgement
    run.show(
        {"folder": str(result.folder), "judge": judged.model_dump(mode="json")},
        judge_section(judged),
        f"Replies: {result.folder / (CONTROLS_FILE if judged.vetoed else ROWS_FILE)}",
    )
    return MEASURED_NO if judged.vetoed else None


def estimate_text(estimate: Estimate) -> str:
    """Return the calls, tokens and cost of judging."""
    calls = estimate.controls + estimate.questions + estimate.reference_answers
    parts = [f"{estimate.controls:,} to test the judge", f"{estimate.questions:,} to judge"]
    if estimate.reference_answers:
        parts.append(f"{estimate.reference_answers:,} answers of the reference model")
    known = f", {estimate.known:,} of them answered already" if estimate.known else ""
    most = estimate.most_completion_tokens
    replies = "no limit on replies is set" if most is None else f"at most {most:,} reply tokens"
    cost = "unknown" if estimate.most_cost is None else f"at most about {estimate.most_cost:.2f}"
    return (
        f"{calls:,} calls{known}: {', '.join(parts)}\n"
        f"Still to send: about {estimate.prompt_tokens:,} prompt tokens (4 characters each), {replies}\n"
        f"Cost: {cost}"
    )
