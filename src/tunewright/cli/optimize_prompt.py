"""``optimize-prompt``: search for a better instruction before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import TRAIN, app, command
from tunewright.cli.console import RESUMES, Session

if TYPE_CHECKING:
    from tunewright.evaluation.prompt_optimization.run import OptimizePromptEstimate


@command(app, "optimize-prompt", panel=TRAIN, example="tunewright optimize-prompt --estimate", kept=RESUMES)
def optimize_prompt(
    run: Session,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print upper limits of calls, tokens and cost, and send nothing.")
    ] = False,
) -> None:
    """Search for a better instruction with GEPA: a reflection model proposes, training rows score, dev chooses.

    The found instruction is stored in prompts/ and measured as further arms. Replies and answers are kept, so a stopped
    run resumes and pays for nothing twice.
    """
    if estimate:
        expected = run.project.estimate_optimize_prompt()
        run.show(expected, estimate_text(expected))
        return
    from tunewright.evidence.prompt_optimization import optimization_section

    result = run.project.optimize_prompt()
    prompt = result.prompt
    run.show(
        {"file": str(result.file), "optimized": result.optimized, "prompt": prompt.model_dump(mode="json")},
        optimization_section(prompt),
        f"Prompt: {result.file}",
    )


def estimate_text(estimate: OptimizePromptEstimate) -> str:
    """Return the limits of an optimization in three lines."""
    most = estimate.most_completion_tokens
    replies = "no limit on replies is set" if most is None else f"at most {most:,} reply tokens"
    cost = "unknown" if estimate.most_cost is None else f"at most about {estimate.most_cost:.2f}"
    return (
        f"At most {estimate.reflection_calls:,} calls of the reflection model, and {estimate.metric_calls:,} answers "
        f"of the base on training rows and {estimate.dev_answers:,} on dev\n"
        f"At most about {estimate.prompt_tokens:,} prompt tokens (4 characters each), {replies}\n"
        f"Cost: {cost}"
    )
