"""``tunewright`` without a command: the ways to begin, or the project's state and the next command."""

from __future__ import annotations

from collections.abc import Iterator

from tunewright.cli.console import Session

_WAYS = {
    "tunewright demo": "a finished example: verdict and server in 6 to 10 minutes on two cores",
    "tunewright init my-model": "your own data: two questions, in a minute; then `tunewright run`",
    "tunewright studio": "the same in a browser, which opens in seconds",
}
_HELP = "All commands: tunewright --help"


def begin(run: Session) -> None:
    """Print the three ways to begin; in a project, its stages and the next command."""
    from tunewright.config.project import CONFIG_FILE

    if (run.folder / CONFIG_FILE).exists():
        run.show(None, "\n".join(_standing(run)))
        return
    ways = [line for command, text in _WAYS.items() for line in (f"  {command}", f"      {text}")]
    run.show(None, "\n".join(["This folder has no project. Three ways to begin:", "", *ways, "", _HELP]))


def _standing(run: Session) -> Iterator[str]:
    from tunewright.studio.pages.evaluate import evaluations_of
    from tunewright.studio.pages.project import REVIEW, stages

    project, config = run.project, run.project.folder.config
    found = stages(project, evaluations_of(project), project.data.version)
    yield f"{config.name}, on {config.base_model}"
    yield from (f"  {stage.name:9} {stage.text}" for stage in found)
    done = [number for number, stage in enumerate(found, start=1) if stage.state == "done"]
    ahead = [stage.command for stage in found[max(done, default=0) :] if stage.command]
    # A review can be skipped, so the command after it is named too.
    following = ahead[: 2 if ahead[:1] == [REVIEW] else 1]
    if following:
        yield "Next: " + ", or without a review ".join(following)
    yield _HELP
