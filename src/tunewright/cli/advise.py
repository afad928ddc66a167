"""``advise`` and ``optimize-prompt``: whether to train at all, and the best instruction before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tunewright.cli.app import TRAIN, Minutes, app, command
from tunewright.cli.console import RESUMES, Session
from tunewright.core.errors import UserError
from tunewright.render.blocks import Lead, table, words

if TYPE_CHECKING:
    from tunewright.advisor.advice import AdviceResult
    from tunewright.advisor.signals import Signals
    from tunewright.evaluation.prompt_optimization.run import OptimizePromptEstimate
    from tunewright.evidence.common import Interval, Score
    from tunewright.render.terminal import Part


_COLOURS = {"fine-tune": "bold green", "can't tell": "bold yellow"}
_WIDTH = 41


@command(app, "advise", panel=TRAIN, cluster=True, loads=True, example="tunewright advise --minutes 20", kept=RESUMES)
def advise(
    run: Session,
    stored: Annotated[
        Path | None,
        typer.Argument(metavar="ADVICE", help="ID or file of stored advice to decide from; nothing is measured."),
    ] = None,
    no_pilot: Annotated[
        bool, typer.Option("--no-pilot", help="Train no pilot adapter; the gain from training is then unknown.")
    ] = False,
    minutes: Minutes = None,
) -> int:
    """Say whether to prompt, retrieve or use no model (exit code 3), to fine-tune (0), or that dev can't tell (4).

    Measures the score by number of demonstrations, and after how many calls training pays off. A pilot adapter, trained
    on a part of the rows, meets the best prompt. Resumes where it stopped.
    """
    if run.cluster is not None and (no_pilot or stored is not None):
        raise UserError("--cluster applies to pilots only", where="--cluster", fix="Omit it, --no-pilot or ADVICE.")
    if stored is None:
        result = run.project.advise(pilot=not no_pilot, minutes=minutes)
        document = {
            **result.as_dict(),
            "detectable_effects": [each.as_dict() for each in run.project.detectable_effects()],
        }
    elif no_pilot or minutes is not None:
        option = "--no-pilot" if no_pilot else "--minutes"
        raise UserError(f"{option} does not apply to stored advice", where=option, fix="Omit one of the two.")
    else:
        result = run.unopened.advise(stored)
        document = result.as_dict()
    run.show(document, *advice_tables(result))
    return result.decision.exit_code


def advice_tables(result: AdviceResult) -> list[Part]:
    """Return the arms, the score over k next to the pilot's, the signals, and the answer with what would change it."""
    from tunewright.advisor.advice import changes, expectations, measured
    from tunewright.evidence.blocks import advice_section

    signals, decision = result.signals, result.decision
    answer = Text(f"Answer: {decision.answer}", style=_COLOURS.get(decision.answer, "bold cyan"))
    if decision.arm is not None:
        answer.append(f" ({decision.arm})")
    lines = [decision.why, "What would change this answer:", *(f"  - {c}" for c in changes(signals, decision))]
    lines += [f"Few pairs: {line}" for line in expectations(signals)]
    answer.append("".join(f"\n  {line}" for line in lines), style="default")
    return [
        advice_section(signals.prompting),
        scores_plot(signals),
        Lead("Signals"),
        table("Signals", words("Signal", "Measured"), measured(signals).items()),
        answer,
        f"Advice: {result.file}",
    ]


def scores_plot(signals: Signals) -> Table:
    """Return scores with their intervals on one axis: each kind of demonstrations over k, and the pilots."""
    from tunewright.metrics import axis_label

    rows: list[tuple[str, str, Score]] = [
        (curve.name, str(point.shots), point.score) for curve in signals.context.curves for point in curve.points
    ]
    if signals.gain is not None:
        rows += [("pilot", f"{part.rows:,} rows", part.score) for part in signals.gain.parts]
    top = max((score.interval.high for _, _, score in rows), default=1.0)
    plot = Table(title=f"{axis_label(signals.metric)} over k, with 95% intervals", title_justify="left")
    for name in ("demonstrations", "k", f"0 to {100 * top:.0f}", ""):
        plot.add_column(name, justify="right" if name == "k" else "left", no_wrap=True)
    before = None
    for kind, shots, score in rows:
        if before not in (None, kind):
            plot.add_section()
        plot.add_row("" if kind == before else kind, shots, bar(score, top), f"{100 * score.value:.1f}")
        before = kind
    return plot


def bar(score: Score, top: float) -> str:
    """Draw an interval and its value on an axis from 0 to ``top``: ``    ├──●───┤``."""

    def place(share: float) -> int:
        return round(share / (top or 1.0) * (_WIDTH - 1))

    interval: Interval = score.interval
    line = [" "] * _WIDTH
    for column in range(place(interval.low), place(interval.high) + 1):
        line[column] = "─"
    line[place(interval.low)] = "├"
    line[place(interval.high)] = "┤"
    line[place(score.value)] = "●"
    return "".join(line).rstrip()


@command(app, "optimize-prompt", panel=TRAIN, loads=True, example="tunewright optimize-prompt --estimate", kept=RESUMES)
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
    from tunewright.model_io.client import limits_text

    replies, cost = limits_text(estimate.most_completion_tokens, estimate.most_cost)
    return (
        f"At most {estimate.reflection_calls:,} calls of the reflection model, and {estimate.metric_calls:,} answers "
        f"of the base on training rows and {estimate.dev_answers:,} on dev\n"
        f"At most about {estimate.prompt_tokens:,} prompt tokens (4 characters each), {replies}\n"
        f"Cost: {cost}"
    )
