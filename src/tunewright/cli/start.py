"""``tunewright`` without a command: the ways to begin, or the project's state and the next command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.prompt import Prompt
from rich.text import Text

from tunewright.cli.console import Session
from tunewright.core.errors import UserError
from tunewright.data.options import ColumnMapping

if TYPE_CHECKING:
    from tunewright.data.task import Proposal

_WAYS = {
    "tunewright demo": "a finished example: verdict and server in 6 to 10 minutes on two cores",
    "tunewright init my-model": "your own data: two questions, in a minute; then `cd my-model` and `tunewright run`",
    "tunewright studio": "the same in a browser, which opens in seconds",
}
_LATER = "later"
_HELP = "All commands: tunewright --help"
ADD_FILES = "name your files under data.sources in tunewright.yaml, then: tunewright run"
"""The step after an `init` without a file."""
_OF_RUN = ("tunewright advise", "tunewright train", "tunewright evaluate")
"""Commands of `tunewright run`, which adds the files that the config lists."""


def begin(run: Session) -> None:
    """Print the three ways to begin; in a project, its stages and the next command."""
    from tunewright.config.project import CONFIG_FILE

    if (run.folder / CONFIG_FILE).exists():
        run.show(None, "\n".join([*_standing(run), _HELP]))
        return
    ways = [line for command, text in _WAYS.items() for line in (f"  {command}", f"      {text}")]
    run.show(None, "\n".join(["This folder has no project. Three ways to begin:", "", *ways, "", _HELP]))


def _standing(run: Session) -> Iterator[str]:
    from tunewright.studio.pages.evaluate import evaluations_of
    from tunewright.studio.pages.project import REVIEW, advice_against_training, stages

    project, config = run.project, run.project.folder.config
    found = stages(project, evaluations_of(project), project.data.version)
    yield f"{config.name}, on {config.base_model}"
    yield from (f"  {stage.name:9} {stage.text}" for stage in found)
    training = project.runs.unfinished
    if training is not None:
        state = training.state
        try:
            step = training.history[-1]["step"] if training.history else 0
            shown = f"after step {step:,}: {training.command}"
        except UserError as error:  # the run has finished since, or its metrics are damaged
            shown = f"({error.what})"
        yield f"Training {'in progress' if state == 'running' else state} {shown}"
        if state == "running":
            return
        if not any(stage.name == "Train" and stage.state == "done" for stage in found):
            yield f"Next: {training.command}, which resumes it if data and config have not changed"
            return
    commands = [stage.command for stage in found]
    done = [number for number, stage in enumerate(found, start=1) if stage.state == "done"]
    ahead = [each for each in commands[max(done, default=0) :] if each]
    # After the verdict on an earlier version, an adapter of this version can follow.
    ahead = ahead or [each.command for each in found if each.name == "Train" and each.state != "done" and each.command]
    # A review can be skipped, so the command after it is named too.
    following = ahead[: 2 if ahead[:1] == [REVIEW] else 1]
    advised = advice_against_training(found) if following == ["tunewright train"] else ""
    if config.data.sources and "tunewright train" in commands:
        following = ["tunewright run" if each in _OF_RUN else each for each in following]
    if following:
        against = f"follow the advice ({advised}), or to train anyway: " if advised else ""
        yield f"Next: {against}{', or without a review '.join(following)}"
    elif after := found[-1].next_step:
        yield f"Next: {after}"


def look_at(run: Session, sources: Sequence[str], mapping: ColumnMapping) -> Proposal:
    """Return what the sources' first rows say, and print it on stderr."""
    from tunewright.data.task import propose

    with run.console.status("Reading the first rows"):
        found = propose(sources, mapping, run.reporter)
    run.note("\n".join(found.lines))
    return found


def ask(run: Session) -> Proposal | None:
    """Ask for the file and, with the answers' shape as the proposal, for the task; None to decide later."""
    from tunewright.data.readers.source_files import has_known_suffix, is_hub_name
    from tunewright.data.task import TASKS, AmbiguousColumnsError

    here = [path.name for path in Path().iterdir() if has_known_suffix(path) and path.is_file()]
    found = None
    while found is None:
        question = (
            f'Your examples: a file, a folder or hf://datasets/NAME, or "{_LATER}" to name them in the config later'
        )
        source = _answer(run, question, here[0] if len(here) == 1 else _LATER)
        if source == _LATER:
            return None
        source = source if is_hub_name(source) else str(Path(source).expanduser())
        try:
            try:
                found = look_at(run, [source], ColumnMapping())
            except AmbiguousColumnsError as error:
                input_ = _answer(run, "Column of the input", error.columns[0], error.columns)
                rest = [name for name in error.columns if name != input_]
                output = _answer(run, "Column of the output", rest[-1], rest)
                found = look_at(run, [source], ColumnMapping(input_column=input_, output_column=output))
        except UserError as error:
            run.note(Text(str(error), style="red"))
    run.note("\n".join(["Tasks, by their answers:", *(f"  {name:6}  {task.answers}" for name, task in TASKS.items())]))
    name = _answer(run, "Task", found.name, list(TASKS))
    return found if name == found.name else replace(found, name=name, because="your choice")


def _answer(run: Session, question: str, default: str, choices: list[str] | None = None) -> Any:
    """Return the answer to a question; the end of the input stops the command as Ctrl-C does."""
    try:
        return Prompt.ask(question, console=run.console, choices=choices, default=default)
    except EOFError:
        raise KeyboardInterrupt from None
