"""``data``: from raw files to dataset versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import session

data_app = typer.Typer(help="Pairs, versions and splits.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("add")
def data_add(
    files: Annotated[list[Path], typer.Argument(help="JSONL or CSV files of pairs.")],
    input_column: Annotated[
        str | None, typer.Option("--input", help="CSV: the input's column.", show_default="the recipe's")
    ] = None,
    output_column: Annotated[
        str | None, typer.Option("--output", help="CSV: the ideal output's column.", show_default="the recipe's")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty rows out, each named.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="Kept with the version.")] = "",
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Add files of pairs: checked, deduplicated, clustered and split into a new dataset version."""
    import tunewright
    from tunewright.cli.tables import version_table

    with session(json) as current:
        road = tunewright.open(project, current.reporter)
        result = road.add(
            files, input_column=input_column, output_column=output_column, skip_bad=skip_bad, message=message
        )
        what = f"{result.added:,} examples added, {result.known:,} known before, {len(result.duplicates):,} duplicates"
        status = "New version" if result.created else "Nothing new: still version"
        current.show(
            result.as_dict(), f"{status} {result.version.digest[:12]}: {what}", version_table([result.version])
        )


@data_app.command("log")
def data_log(project: Folder = HERE, json: Json = False) -> None:
    """List the dataset's versions, the newest last."""
    import tunewright
    from tunewright.cli.tables import version_table
    from tunewright.data.versions import list_versions

    with session(json) as current:
        versions = list_versions(tunewright.open(project).project.dataset)
        current.show(
            {"versions": [v.model_dump(mode="json") for v in versions]},
            version_table(versions) if versions else "No version yet: tunewright data add FILE makes one.",
        )
