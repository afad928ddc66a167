"""``judge`` and ``human-eval``: a language model, tested itself first, and people compare the arms' answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunewright.cli.app import EVALUATE, app, command, refuse_unused
from tunewright.cli.console import MEASURED_NO, RESUMES, Session
from tunewright.cli.data_review import Import, Reviewer, annotate, chosen_action, read_note, require_terminal
from tunewright.cli.data_versions import escape_control_character
from tunewright.cli.evaluate import Evaluation
from tunewright.core.errors import UserError
from tunewright.core.text import count_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.evaluation.human_eval.session import BlindPair, BlindReview, Progress
    from tunewright.evaluation.judge.runner import JudgeEstimate
    from tunewright.evaluation.stored_answers import KeptPreferences

EXIT_CODES = {"treatment": 0, "control": 3, "can't tell": 4}
SIDE_BY_SIDE = 90  # columns of the terminal; a narrower one shows A above B
KEYS = (
    "a A is better   b B is better   g both good   x neither",
    "v view the reference   s skip   n note   u undo   q quit",
)
SHADOW_KEYS = (KEYS[0], "s skip   u undo   q quit")

Estimate = Annotated[bool, typer.Option("--estimate", help="Estimate calls, tokens and cost, and send nothing.")]


@command(app, "judge", panel=EVALUATE, example="tunewright judge --estimate", kept=RESUMES)
def judge(
    run: Session,
    evaluation: Evaluation = None,
    estimate: Estimate = False,
    keep_preferences: Annotated[
        bool,
        typer.Option(
            "--keep-preferences",
            help="Experimental: keep the judged preferences as pairs for preference tuning; send nothing.",
        ),
    ] = False,
) -> int | None:
    """Have a model judge the answers' correctness and compare them. The judge is tested first; exit code 3 if it fails.

    The model is the config's judge. Its replies are stored, so a stopped run resumes and pays for nothing twice.
    """
    from tunewright.evaluation.judge.questions import CONTROLS_FILE, ROWS_FILE
    from tunewright.evidence.judge import judge_section

    if estimate and keep_preferences:
        raise UserError(
            "--estimate and --keep-preferences are mutually exclusive", where="--keep-preferences", fix="Choose one."
        )
    if keep_preferences:
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


def estimate_text(estimate: JudgeEstimate) -> str:
    """Return the calls, tokens and cost of judging."""
    from tunewright.model_io.client import limits_text

    calls = estimate.controls + estimate.questions + estimate.reference_answers
    parts = [f"{estimate.controls:,} to test the judge"] if estimate.controls else []
    parts.append(f"{estimate.questions:,} to judge")
    if estimate.reference_answers:
        parts.append(f"{estimate.reference_answers:,} answers of the reference model")
    known = f", {estimate.known:,} of them answered already" if estimate.known else ""
    replies, cost = limits_text(estimate.most_completion_tokens, estimate.most_cost)
    return (
        f"{calls:,} calls{known}: {', '.join(parts)}\n"
        f"Still to send: about {estimate.prompt_tokens:,} prompt tokens (4 characters each), {replies}\n"
        f"Cost: {cost}"
    )


@command(
    app,
    "human-eval",
    panel=EVALUATE,
    example="tunewright human-eval --items 50 --reviewer ada",
    kept=RESUMES,
    status=False,
)
def human_eval(
    run: Session,
    evaluation: Evaluation = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="Number of pairs to judge (first call only).", show_default="50")
    ] = None,
    reviewer: Reviewer = None,
    results: Annotated[bool, typer.Option("--results", help="Show the results of all reviewers and exit.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write the remaining pairs to a CSV file.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Incumbent whose answers to compare with.", show_default="the best prompting arm's"),
    ] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Include the references (--export only).")] = False,
    import_file: Import = None,
    keep_preferences: Annotated[
        bool,
        typer.Option(
            "--keep-preferences", help="Experimental: keep all reviewers' preferences as pairs for preference tuning."
        ),
    ] = False,
) -> int | None:
    """Judge the tuned answers against the best prompting arm's or an incumbent's, blind, on a random sample.

    Keys: a A is better, b B is better, g both good, x neither, v view the reference, s skip, n note, u undo, q quit.
    Resumes where it stopped. With --results, the exit code is 0 if people prefer the tuned answers, 3 if they prefer
    the others, 4 if neither is clear.
    """
    action = chosen_action(
        {"--results": results, "--export": export, "--import": import_file, "--keep-preferences": keep_preferences}
    )
    if reference and export is None:
        raise UserError("--reference requires --export", where="--reference", fix="Add --export.")
    if action is not None and action != "--export":
        unused = {"--items": items is not None}
        unused |= {} if action == "--import" else {"--reviewer": reviewer is not None}
        refuse_unused(action, unused | ({"--against": against is not None} if keep_preferences else {}))
    if keep_preferences:
        show_kept(run, run.project.keep_preferences(evaluation, source="person"))
        return None
    if results:
        return _show_results(run, evaluation, against)
    if export is None and import_file is None:
        require_terminal("--export and --import, or --results")
    # An evaluation is enough, wherever it is stored: no project is opened.
    blind = run.unopened.human_eval(evaluation, reviewer=reviewer, items=items, against=against)
    if export is not None:
        count = blind.export_sheet(export, reference=reference)
        text = f"Wrote {count} pairs to {export}: fill in verdict (A, B, both, neither or skip) and note"
        run.show({"file": str(export), "pairs": count}, text)
        return None
    if import_file is not None:
        taken = blind.import_sheet(import_file)
        counts = f"{taken.recorded} verdicts recorded, {taken.known} known, {taken.blank} pairs without one"
        run.reporter.say(f"{counts}; {taken.notes} notes recorded")
    else:
        _ask(run, blind)
    if import_file is not None or blind.next() is None:
        _show_results(run, evaluation, against)
        return None
    at = blind.progress
    document = {"reviewer": blind.reviewer, "judged": at.answered, "skipped": at.skipped, "asked": at.asked}
    run.show(document, f"{progress_text(at)}. The same command resumes here.")
    return None


def show_kept(run: Session, kept: KeptPreferences) -> None:
    """Print the pairs that were kept, by the split of their inputs."""
    splits = ", ".join(f"{count:,} {split}" for split, count in sorted(kept.splits.items()))
    new = f"{kept.new:,} new" if kept.kept else "none"
    text = f"Preference pairs of this evaluation: {kept.kept:,} ({new}{f'; inputs: {splits}' if splits else ''})"
    run.show(kept.as_dict(), f"{text}\nKept in {kept.file}")


def _show_results(run: Session, evaluation: Path | None, against: str | None) -> int:
    from tunewright.evidence.human_eval import human_eval_section

    review = run.unopened.human_eval_results(evaluation, against=against)
    run.show({**review.model_dump(mode="json"), "decision": review.decision}, human_eval_section(review))
    return EXIT_CODES[review.decision]


def _ask(run: Session, blind: BlindReview) -> None:
    def view(pair: BlindPair) -> str:
        blind.show_reference(pair)
        return ""

    def note(pair: BlindPair) -> str:
        blind.note(pair, read_note(run))
        return ""

    annotate(
        run,
        blind,
        lambda pair: pair_screen(pair, blind.progress, run.console.width),
        {"v": view, "n": note},
        blind.next,
    )


def progress_text(progress: Progress) -> str:
    """Return the reviewer's progress."""
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    same = f"; the answers to {count_of(progress.same, 'more item')} are equal, which is a tie" if progress.same else ""
    return f"{progress.answered} of {progress.asked} pairs judged{skipped}{same}"


def pair_screen(pair: BlindPair, progress: Progress, width: int, keys: Sequence[str] = KEYS) -> list[RenderableType]:
    """Return one pair: the input, both answers, the reference if requested, and the keys."""
    panels = [Panel(_plain(text), title=name, title_align="left") for name, text in (("A", pair.a), ("B", pair.b))]
    answers: list[RenderableType] = [*panels]
    if width >= SIDE_BY_SIDE:
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(*panels)
        answers = [grid]
    parts: list[RenderableType] = [
        Text(progress_text(progress), style="bold"),
        Panel(_plain(pair.input), title=f"Input {pair.number}", title_align="left", style="cyan"),
        *answers,
    ]
    if pair.reference is not None:
        parts.append(Panel(_plain(pair.reference), title="Reference", title_align="left", style="green"))
    if pair.note:
        parts.append(_plain(f"Your note: {pair.note}"))
    return [*parts, *(Text(line, style="bold") for line in keys)]


def _plain(text: str) -> Text:
    if not text.strip():
        return Text("(no text)", style="dim italic")
    return Text("".join(map(escape_control_character, text)))
