"""``data``: from raw files to dataset versions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import USER_ERROR, session
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.wording import count_of

data_app = typer.Typer(help="Pairs, versions and splits.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Rows = Annotated[
    str | None,
    typer.Option("--rows", help="JMESPath to the rows in a JSON document.", show_default="the config's data.rows"),
]
Input = Annotated[
    str | None,
    typer.Option("--input", help="The input's column or key, or a template over the row.", show_default="the config's"),
]
Output = Annotated[
    str | None,
    typer.Option("--output", help="The same for the ideal output.", show_default="the config's"),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave faulty rows out, listed by cause.")]
Redact = Annotated[bool, typer.Option("--redact", help="Put placeholders for secrets and personal data.")]
AcceptConflicts = Annotated[
    bool, typer.Option("--accept-conflicts", help="Keep inputs with different outputs, instead of refusing.")
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Let an output supersede the one that the dataset has for its input.")
]
Restore = Annotated[bool, typer.Option("--restore", help="Take rows in again that were removed or superseded.")]
SplitFrom = Annotated[
    Path | None,
    typer.Option(help="A project whose split the rows of this new dataset keep.", show_default="a split of its own"),
]
Presidio = Annotated[
    str | None,
    typer.Option(help="Look for names and places too, with this spaCy model.", show_default="patterns only"),
]


@data_app.command("add")
def data_add(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of pairs: JSON, CSV, Parquet, saved `datasets` folders; folders or patterns of these."
        ),
    ],
    rows: Rows = None,
    input_column: Input = None,
    output_column: Output = None,
    skip_bad: SkipBad = False,
    redact: Redact = False,
    accept_conflicts: AcceptConflicts = False,
    replace: Replace = False,
    restore: Restore = False,
    split_from: SplitFrom = None,
    presidio: Presidio = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Kept with the version.")] = "",
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Add files of pairs: checked, deduplicated, clustered and split into a new dataset version."""
    import tunewright
    from tunewright.cli.tables import version_table

    with session(json, project, kept="nothing was added; run the same command again") as current:
        result = tunewright.open(project, current.reporter).data.add(
            files,
            rows=rows,
            input_column=input_column,
            output_column=output_column,
            skip_bad=skip_bad,
            redact=redact,
            accept_conflicts=accept_conflicts,
            presidio=presidio,
            message=message,
            replace=replace,
            restore=restore,
            split_from=split_from,
        )
        what = f"{count_of(result.added, 'example')} added, {result.known:,} known before, "
        what += count_of(len(result.duplicates), "duplicate")
        if result.skipped:
            what += f", {len(result.skipped):,} left out as faulty"
        if result.left_out:
            what += f", {result.left_out:,} left out as holding a test input or a benchmark item"
        what += f", {sum(len(r.before) for r in result.replaced):,} replaced" if result.replaced else ""
        what += f", {len(result.superseded):,} superseded earlier and left out" if result.superseded else ""
        what += f", {len(result.removed):,} removed earlier and left out" if result.removed else ""
        if near := result.version.counts.near_duplicates:
            what += f"; near-duplicates in the version: {near:,}, each in one cluster with the row that it is like"
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

    with session(json, project) as current:
        opened = tunewright.open(project, current.reporter)
        member = opened.data.show(row)
        if not tokens:
            metadata = opened.data.metadata(member.key)
            counts = opened.data.cluster_counts(member)
            told = [f"{key}: {canonical_json(value)}" for key, value in metadata.items()]
            document = {**row_document(member, counts), "metadata": metadata}
            current.show(document, row_heading(member, counts), *told, conversation_text(member))
            return
        from tunewright.chat.view import view
        from tunewright.training.rows import row_faults, told_by

        encoded = opened.chat.rows(member.example.messages)
        rows = [view(opened.chat, each) for each in encoded]
        faults = row_faults(opened.chat, encoded, told_by(member, len(encoded)))
        document = {
            **row_document(member),
            "template_digest": opened.chat.digest,
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
def data_check(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Files of pairs.", show_default="the current version")
    ] = None,
    fix: Annotated[Path | None, typer.Option(help="Write a corrected copy of the one file here.")] = None,
    rows: Rows = None,
    input_column: Input = None,
    output_column: Output = None,
    skip_bad: SkipBad = False,
    redact: Redact = False,
    accept_conflicts: AcceptConflicts = False,
    replace: Replace = False,
    restore: Restore = False,
    split_from: SplitFrom = None,
    presidio: Presidio = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Say what `data add` would do with files; without files, what training will see of the current version.

    Of files: faults, duplicates, conflicts, secrets, splits; exit code 2 if `data add` with the same options would
    refuse. Of the version: every row encoded: lengths, trained share, rows too long, rows that cannot be trained on.
    """
    import tunewright
    from tunewright.cli.data_texts import preview_text
    from tunewright.cli.token_tables import check_tables

    with session(json, project) as current:
        opened = tunewright.open(project, current.reporter)
        mapped = {"rows": rows, "input_column": input_column, "output_column": output_column}
        options = {"skip_bad": skip_bad, "redact": redact, "accept_conflicts": accept_conflicts, "replace": replace}
        options |= {"restore": restore, "split_from": split_from is not None, "presidio": presidio is not None}
        adding = [f"--{name.replace('_', '-')}" for name, given in options.items() if given]
        if files is None and (any(mapped.values()) or adding):
            named = [f"--{name.removesuffix('_column')}" for name, given in mapped.items() if given]
            what = f"{', '.join([*named, *adding])} is for files, and none is named"
            raise UserError(what, fix="Name the files.")
        if fix is not None:
            if files is None or len(files) != 1:
                raise UserError("--fix corrects one file", where="--fix", fix="Name the file, and one only.")
            if adding:
                raise UserError(f"--fix does not use {', '.join(adding)}", where="--fix", fix="Leave the option out.")
            changes = opened.data.fix_file(files[0], fix, **mapped)
            left_out = sum(change.left_out for change in changes)
            done = f"{count_of(len(changes) - left_out, 'change')}, {count_of(left_out, 'row')} left out"
            document = {"out": str(fix), "changes": [asdict(change) for change in changes]}
            current.show(document, "\n".join([*map(str, changes), f"Wrote {fix}: {done}"]))
            return
        if files is not None:
            checked = opened.data.check_files(
                files,
                **mapped,
                skip_bad=skip_bad,
                redact=redact,
                accept_conflicts=accept_conflicts,
                presidio=presidio,
                replace=replace,
                restore=restore,
                split_from=split_from,
            )
            current.show(checked.as_dict(), preview_text(checked))
            if not checked.ok:
                raise typer.Exit(USER_ERROR)
            return
        report = opened.data.check()
        dropping = opened.folder.config.train.on_overlength == "drop"
        current.show(report.as_dict(), *check_tables(report, dropping=dropping))
        if report.refused(dropping=dropping):
            raise typer.Exit(USER_ERROR)


@data_app.command("leak")
def data_leak(
    evaluation: Annotated[
        Path | None,
        typer.Argument(help="An evaluation, scored by distance and by output template too.", show_default="none"),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A JSONL file of benchmark items to look for, besides data.benchmarks.", show_default="none"),
    ] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """How near held-out rows are to training rows, what a random split would have leaked, and what training rows hold.

    Outputs are compared too: identical, of one template, near-equal. Training rows, those mixed in included, are
    searched for test inputs and benchmark items.
    """
    import tunewright
    from tunewright.cli.data_texts import contamination_text, leak_text

    with session(json, project) as current:
        data = tunewright.open(project, current.reporter).data
        report = data.leak()
        bands = data.scores_by_distance(report, evaluation) if evaluation is not None else []
        templates = data.scores_by_template(evaluation) if evaluation is not None else []
        misleading = data.exact_match_misleads(evaluation) if evaluation is not None else None
        if misleading is not None:
            bands, templates = [], []
        found = data.contamination(against or [])
        document = {
            **report.as_dict(),
            "bands": [band.as_dict() for band in bands],
            "templates": [score.as_dict() for score in templates],
            "exact_not_counted": misleading,
            "contamination": found.as_dict(),
        }
        texts = [leak_text(report, bands, templates), *([misleading] if misleading else [])]
        current.show(document, *texts, contamination_text(found))


@data_app.command("log")
def data_log(project: Folder = HERE, json: Json = False) -> None:
    """List the dataset's versions, the newest last."""
    import tunewright
    from tunewright.cli.tables import version_table
    from tunewright.data.versions import current_manifest

    with session(json, project) as current:
        opened = tunewright.open(project)
        versions, head = opened.data.log(), current_manifest(opened.folder.dataset)
        current.show(
            {"versions": [v.model_dump(mode="json") for v in versions], "current": head.digest if head else None},
            version_table(versions, head) if versions else "No version yet: tunewright data add FILE makes one.",
        )
