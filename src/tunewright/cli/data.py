"""``data``: from raw files to dataset versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import USER_ERROR, session

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


@data_app.command("show")
def data_show(
    row: Annotated[str, typer.Argument(help="The first digits of the row's key, or FILE:LINE of an added file.")],
    tokens: Annotated[bool, typer.Option("--tokens", help="Token by token, as training sees it.")] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Show one row: its conversation and where it belongs, or with --tokens what the model sees of it."""
    import tunewright
    from tunewright.cli.token_tables import conversation_text, row_document, row_heading, tokens_text

    with session(json) as current:
        road = tunewright.open(project, current.reporter)
        member = road.row(row)
        if not tokens:
            current.show(row_document(member), row_heading(member), conversation_text(member))
            return
        from tunewright.chat.view import view
        from tunewright.training.rows import row_faults, told_by

        encoded = road.chat.rows(member.example.messages)
        rows = [view(road.chat, each) for each in encoded]
        faults = row_faults(road.chat, encoded, told_by(member, len(encoded)))
        document = {
            **row_document(member),
            "template_digest": road.chat.digest,
            "rows": [
                {
                    "ids": [t.id for t in each],
                    "texts": [t.text for t in each],
                    "loss_mask": [t.trained for t in each],
                    "control": [t.control for t in each],
                    "fault": fault,
                }
                for each, fault in zip(rows, faults, strict=True)
            ],
        }
        current.show(document, row_heading(member), *(tokens_text(each) for each in rows))
        for fault in filter(None, faults):
            current.reporter.warn(f"training would refuse this row: {fault}")


@data_app.command("check")
def data_check(project: Folder = HERE, json: Json = False) -> None:
    """Encode every row as training would: lengths, trained share, rows too long, rows that cannot be trained on."""
    import tunewright
    from tunewright.cli.token_tables import check_tables

    with session(json) as current:
        road = tunewright.open(project, current.reporter)
        report = road.check()
        dropping = road.project.recipe.train.too_long == "drop"
        current.show(report.as_dict(), *check_tables(report, dropping=dropping))
        if report.refused(dropping=dropping):
            raise typer.Exit(USER_ERROR)


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
