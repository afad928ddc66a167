"""Versions as code: ``data diff``, ``blame``, ``where``, ``checkout``, ``export``, ``push``, ``pull``, ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunewright.cli.app import HERE, Folder, Json
from tunewright.cli.console import FAILED, session
from tunewright.cli.data import data_app
from tunewright.core.clock import to_the_second
from tunewright.core.wording import count_of

if TYPE_CHECKING:
    from tunewright.data.versions.changes import Blame
    from tunewright.data.versions.remote import Transfer


# As in data.export and data.splits, which are too heavy to import for --help.
Format = Literal["chat", "alpaca", "csv", "parquet"]
Split = Literal["train", "dev", "test"]

Row = Annotated[str, typer.Argument(help="The first digits of the row's key, or FILE:LINE of an added file.")]
Version = Annotated[
    str | None, typer.Option("--version", help="A version's digest, or its beginning.", show_default="the current one")
]
Url = Annotated[str, typer.Argument(help="A folder, or any URL that fsspec knows: s3://bucket/prefix, …")]


@data_app.command("diff")
def data_diff(
    a: Annotated[str, typer.Argument(help="The version before: its digest, or the beginning of it.")],
    b: Annotated[str | None, typer.Argument(help="The version after.", show_default="the current one")] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """What differs between two versions, and whether scores on the one can be compared with scores on the other."""
    import tunewright
    from tunewright.data.versions.change_text import diff_text

    with session(json, project) as current:
        found = tunewright.open(project, current.reporter).data.diff(a, b)
        current.show(found.as_dict(), diff_text(found))


@data_app.command("blame")
def data_blame(row: Row, project: Folder = HERE, json: Json = False) -> None:
    """How a row came into the dataset: which version brought it, from where, when and by whom."""
    import tunewright

    with session(json, project) as current:
        found = tunewright.open(project, current.reporter).data.blame(row)
        current.show(found.as_dict(), _blame_text(found))


def _blame_text(found: Blame) -> str:
    version = found.version
    lines = [
        f"row {found.key[:12]}, version {version.digest[:12]} of {to_the_second(version.created)}"
        + (f", by {version.author}" if version.author else "")
        + (f": {version.message}" if version.message else "")
    ]
    if found.source is not None:
        lines.append(f"from {found.source}:{found.line}")
    lines += [f"reviewed by {', '.join(found.reviewers)}"] if found.reviewers else []
    lines += [f"in place of {key[:12]}, the same input with another output" for key in found.edit_of]
    lines += [f"beside {key[:12]}, the same input with another output" for key in found.beside]
    if found.older_missing:
        lines.append(f"or from an older version: {found.older_missing[:12]}, its parent, is not here")
    return "\n".join(lines)


@data_app.command("where")
def data_where(row: Row, project: Folder = HERE, json: Json = False) -> None:
    """Which adapters were trained on a row."""
    import tunewright
    from tunewright.data.versions.changes import trained_on

    with session(json, project) as current:
        key, found = tunewright.open(project, current.reporter).data.where(row)
        lines = [f"{s.adapter}: {s.use}{f' ({s.reason})' if s.reason else ''}" for s in found]
        current.show(
            {"key": key, "trained_on": trained_on(found), "adapters": [s.as_dict() for s in found]},
            "\n".join(lines) if lines else "No adapter has been trained yet.",
        )


@data_app.command("checkout")
def data_checkout(
    version: Annotated[str, typer.Argument(help="The version's digest, or its beginning.")],
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Make a version that is there the current one."""
    import tunewright
    from tunewright.cli.tables import version_table

    with session(json, project) as current:
        manifest = tunewright.open(project, current.reporter).data.checkout(version)
        current.show(manifest.model_dump(mode="json"), version_table([manifest]))


@data_app.command("export")
def data_export(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    form: Annotated[Format, typer.Option("--format", help="What the other tool reads.")] = "chat",
    split: Annotated[Split | None, typer.Option(help="One split.", show_default="all")] = None,
    version: Version = None,
    metadata: Annotated[
        bool, typer.Option("--metadata", help="With chat: the keys that the rows' files had besides.")
    ] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Write a version, or one split of it, as a file for other tools."""
    import tunewright

    with session(json, project) as current:
        data = tunewright.open(project, current.reporter).data
        written = data.export(out, form, split=split, version=version, metadata=metadata)
        current.show(written.as_dict(), f"Wrote {written.rows:,} rows of version {written.version[:12]} to {out}")


@data_app.command("push")
def data_push(url: Url, project: Folder = HERE, json: Json = False) -> None:
    """Copy the current version, those that it was made from, and reviews to a folder or bucket that a team shares."""
    import tunewright

    with session(json, project) as current:
        done = tunewright.open(project, current.reporter).data.push(url)
        current.show(done.as_dict(), _transfer_text(done, f"{url} is"))


@data_app.command("pull")
def data_pull(url: Url, project: Folder = HERE, json: Json = False) -> None:
    """Copy the current version and reviews from where a team shares them, verified, and make it current here."""
    import tunewright

    with session(json, project) as current:
        done = tunewright.open(project, current.reporter).data.pull(url)
        current.show(done.as_dict(), _transfer_text(done, "This side is"))


def _transfer_text(done: Transfer, other: str) -> str:
    reviews = (
        f"Copied {count_of(done.verdicts, 'verdict')} ({count_of(done.reviews, 'record')} of reviews)."
        if done.reviews
        else ""
    )
    names = ", ".join(digest[:12] for digest in done.versions)
    copied = f"Copied {names}: {count_of(done.rows, 'new row')}, {done.bytes:,} bytes." if names else ""
    if done.ahead:
        state = f"{other} {count_of(done.ahead, 'version')} ahead{'' if reviews else ': nothing to do'}."
    elif copied or reviews:
        state = f"Both sides are at version {done.head[:12]}."
    else:
        state = f"Nothing to do: both sides are at version {done.head[:12]}."
    return " ".join(filter(None, [copied, reviews, state]))


@data_app.command("verify")
def data_verify(project: Folder = HERE, json: Json = False) -> None:
    """Check every row, version and review against its digest. Exit code 1 where something is not as it was written."""
    import tunewright
    from tunewright.data.versions.removals import purge_told

    with session(json, project) as current:
        found = tunewright.open(project, current.reporter).data.verify()
        if found.unsealed:
            names = ", ".join(digest[:12] for digest in found.unsealed)
            current.reporter.warn(f"Of an earlier tunewright, so that no digest covers manifest and imports: {names}")
        if found.undigested:
            current.reporter.warn(f"No digest covers {count_of(found.undigested, 'review')} of an earlier tunewright.")
        if found.unneeded:
            current.reporter.warn(
                f"{count_of(found.unneeded, 'row')} that no version has; what a stopped command left, the next one "
                "clears."
            )
        if found.purges:
            current.reporter.say(f"{purge_told(found.purges)}. Their text is gone, their digests are in place.")
        told = f"{count_of(found.rows, 'row')}, {count_of(found.versions, 'version')}, "
        told += f"{count_of(found.reviews, 'record')} of reviews"
        current.show(
            found.as_dict(), f"{told}: all as written." if found.ok else "\n".join([told, *map(str, found.damage)])
        )
        if not found.ok:
            raise typer.Exit(FAILED)
