"""``review``: people compare the arms' answers, blind, by keys in the terminal or by way of a spreadsheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import RESUMES, Session, session
from tunewright.cli.measure import Evaluation
from tunewright.cli.review import read_key, require_terminal

if TYPE_CHECKING:
    from tunewright.api import Project
    from tunewright.evaluation.human_eval.journal import Side
    from tunewright.evaluation.human_eval.session import BlindReview

SIDE_KEYS: dict[str, Side] = {"a": "A", "b": "B", "g": "both", "n": "neither", "s": "skip"}
EXIT_CODES = {"treatment": 0, "control": 3, "can't tell": 4}


@app.command()
def review(
    evaluation: Evaluation = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="How many pairs to ask about, at the first call.", show_default="50")
    ] = None,
    reviewer: Annotated[
        str | None, typer.Option(help="Whose verdicts.", show_default="git's user.name, else your login name")
    ] = None,
    results: Annotated[bool, typer.Option("--results", help="Only say what all reviewers' verdicts come to.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write the pairs left as CSV, for a spreadsheet.")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="With --export: the references too.")] = False,
    import_file: Annotated[Path | None, typer.Option("--import", help="Read verdicts from such a CSV.")] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Compare the tuned answers with the best prompting arm's, side by side and blind, on a random sample.

    Keys: a A is better, b B is better, g both good, n neither, r show the reference, w write a note, s skip, u undo,
    q quit. It goes on where it was left. With --results the exit code is 0 if people prefer the tuned answers, 3 if the
    others, 4 if it can't be told.
    """
    from tunewright.api import Project
    from tunewright.config.project import ProjectFolder
    from tunewright.evaluation.human_eval.options import check_options

    with session(json, kept=RESUMES) as current:
        check_options(
            results=results,
            export=export is not None,
            sheet=import_file is not None,
            items=items is not None,
            reviewer=reviewer is not None,
            reference=reference,
        )
        # Not opened as a project: an evaluation is enough, wherever it lies.
        opened = Project(ProjectFolder(project), current.reporter)
        if results:
            raise typer.Exit(_show_results(current, opened, evaluation))
        if export is None and import_file is None:
            require_terminal("--export and --import, or --results")
        blind = opened.review(evaluation, reviewer=reviewer, items=items)
        if export is not None:
            _export(current, blind, export, reference=reference)
        elif import_file is not None:
            _import(current, blind, import_file)
            _show_results(current, opened, evaluation)
        else:
            _pass(current, blind)
            if blind.next() is None:
                _show_results(current, opened, evaluation)
            else:
                _show_progress(current, blind)


def _export(current: Session, blind: BlindReview, file: Path, *, reference: bool) -> None:
    from tunewright.evaluation.human_eval.sheet import export_sheet

    count = export_sheet(blind, file, reference=reference)
    told = f"{count} pairs written to {file}: fill in verdict (A, B, both, neither or skip) and note"
    current.show({"file": str(file), "pairs": count}, told)


def _import(current: Session, blind: BlindReview, file: Path) -> None:
    from tunewright.evaluation.human_eval.sheet import import_sheet

    taken = import_sheet(blind, file)
    told = f"{taken.recorded} verdicts recorded, {taken.known} known, {taken.blank} pairs without one"
    current.reporter.say(f"{told}; {taken.notes} notes recorded")


def _show_progress(current: Session, blind: BlindReview) -> None:
    from tunewright.cli.people_tables import progress_text

    at = blind.progress
    document = {"reviewer": blind.reviewer, "judged": at.answered, "skipped": at.skipped, "asked": at.asked}
    current.show(document, f"{progress_text(at)}. The same command goes on from here.")


def _show_results(current: Session, opened: Project, evaluation: Path | None) -> int:
    from tunewright.cli.people_tables import results_tables

    section = opened.review_results(evaluation)
    current.show({**section.model_dump(mode="json"), "decision": section.decision}, *results_tables(section))
    return EXIT_CODES[section.decision]


def _pass(current: Session, blind: BlindReview) -> None:
    from tunewright.cli.people_tables import pair_screen

    told = ""
    while (pair := blind.next()) is not None:
        current.console.clear()
        screen = pair_screen(pair, blind.progress, current.console.width, told)
        current.console.print(*screen, sep="\n", markup=False, highlight=False)
        key, told = read_key(), ""
        if key == "q":
            return
        if key == "u":
            told = "Taken back." if blind.undo() is not None else "There is nothing to take back."
        elif key == "r":
            blind.show_reference(pair)
        elif key == "w":
            blind.note(pair, read_note(current))
        elif key in SIDE_KEYS:
            blind.answer(pair, SIDE_KEYS[key])
        else:
            told = f"{key!r} is no key here."


def read_note(current: Session) -> str:
    """A line that the reviewer types; it takes the place of an earlier note."""
    try:
        return current.console.input("Note: ", markup=False)
    except EOFError:
        return ""
