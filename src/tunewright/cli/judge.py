"""``judge``: a language model compares the answers, after it has been tested itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tunewright.cli.app import EVALUATE, app, command
from tunewright.cli.console import MEASURED_NO, RESUMES, Session
from tunewright.cli.verdict import Evaluation
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.evaluation.judge.runner import Estimate
    from tunewright.evidence.common import Interval
    from tunewright.evidence.judge import Control, Judgement, JudgeUsage, Preference, WinRate


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
        *judgement_tables(judged),
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


def judgement_tables(judged: Judgement) -> list[RenderableType]:
    """Return the judge's controls, then its findings unless it failed them."""
    shown: list[RenderableType] = [_controls_table(judged.model, judged.controls)]
    if judged.vetoed:
        text = Text(f"Vetoed: {judged.model} failed its controls and is not used.\n", style="bold red")
        text.append("\n".join(f"  {reason}" for reason in judged.vetoed), style="default")
        shown.append(text)
    else:
        shown += [_arms_table(judged), _preferences_table(judged), *_notes(judged)]
    shown.append(_spent_text("Spent", judged.spent))
    if judged.reference_spent is not None:
        shown.append(_spent_text("On the reference model", judged.reference_spent))
    return shown


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _controls_table(model: str, controls: tuple[Control, ...]) -> Table:
    table = _table(f"Is {model} a judge?", "control", "passed", "no verdict", "at least", "required", "")
    for control in controls:
        table.add_row(
            control.name,
            f"{control.passed} of {control.items}",
            str(sum(control.unscored.values())),
            f"{control.limit:.0%}",
            f"{control.required:.0%}",
            "holds" if control.held else "FAILS",
        )
    return table


def _arms_table(judged: Judgement) -> Table:
    table = _table("Correct against the reference", "arm", "correct", "share", "95% interval", "exact", "no verdict")
    for arm in judged.arms:
        table.add_row(
            arm.name,
            f"{arm.correct} of {arm.items}",
            f"{arm.share.value:.1%}",
            _interval(arm.share.interval),
            str(arm.exact),
            str(sum(arm.unscored.values())),
        )
    return table


def _preferences_table(judged: Judgement) -> Table:
    first = judged.preferences[0]
    title = f"Answers of {first.treatment} preferred, in both orders"
    names = ("against", "wins", "ties", "losses", "win rate, %", "95% interval", "flips", "no verdict")
    table = _table(title, *names)
    for preference in judged.preferences:
        flips = "" if preference.flip_rate is None else f"{preference.flip_rate:.0%}"
        missing = str(sum(preference.unscored.values()))
        table.add_row(preference.opponent, *_rate(preference.rate), flips, missing)
        if preference.stripped is not None:
            table.add_row("  without markdown", *_rate(preference.stripped), "", "")
        if preference.length_controlled is not None:
            controlled = preference.length_controlled
            numbers = (f"{100 * controlled.value:.1f}", _interval(controlled.interval))
            table.add_row("  at equal length", "", "", "", *numbers, "", "")
    return table


def _rate(rate: WinRate) -> tuple[str, ...]:
    counts = (str(rate.wins), str(rate.ties), str(rate.losses))
    return (*counts, f"{100 * rate.value:.1f}", _interval(rate.interval))


def _interval(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _notes(judged: Judgement) -> list[str]:
    from tunewright.metrics import p_text, points_text

    notes = []
    contrast = judged.contrast
    if contrast is not None:
        low, high = points_text(contrast.interval.low), points_text(contrast.interval.high)
        notes.append(
            f"Correctness, {contrast.treatment} - {contrast.control}: {points_text(contrast.difference)} points, 95% "
            f"interval {low} to {high}, {p_text(contrast.p_value)} ({contrast.test}); {contrast.fixed} fixed, "
            f"{contrast.broken} broken."
        )
    for preference in judged.preferences:
        notes.append(_preference_note(preference))
    missing = {f"{arm.name}: {why}": count for arm in judged.arms for why, count in arm.unscored.items()}
    missing |= {f"against {p.opponent}: {why}": count for p in judged.preferences for why, count in p.unscored.items()}
    if missing:
        notes.append("No verdict: " + "; ".join(f"{why} ({count})" for why, count in missing.items()) + ".")
    return notes


def _preference_note(preference: Preference) -> str:
    from tunewright.metrics import p_text

    note = f"Against {preference.opponent}: {p_text(preference.p_value)} ({preference.test}); {preference.equal} equal"
    note += " answers tie unasked."
    if preference.length_note is not None:
        note += f" At equal length: {preference.length_note}."
    return note


def _spent_text(title: str, spent: JudgeUsage) -> str:
    cost = "" if spent.cost is None else f", cost {spent.cost:.4f}"
    guessed = f" ({spent.estimated:,} replies came without counts: guessed)" if spent.estimated else ""
    tokens = f"{spent.prompt_tokens:,} prompt and {spent.completion_tokens:,} reply tokens"
    return f"{title}: {spent.calls:,} replies, {tokens}{guessed}{cost}"
