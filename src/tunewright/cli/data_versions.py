"""Dataset versions: ``data log``, ``diff``, ``checkout``, ``export``, ``push``, ``pull`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunewright.cli.app import command
from tunewright.cli.console import FAILED, Session
from tunewright.cli.data import data_app
from tunewright.core.text import count_of

if TYPE_CHECKING:
    from tunewright.data.remote import Transfer

# As in data.export and data.splits, which are too heavy to import for --help.
Format = Literal["chat", "alpaca", "csv", "parquet", "preference"]
Split = Literal["train", "dev", "test"]

Url = Annotated[str, typer.Argument(help="Folder or any URL that fsspec supports, such as s3://bucket/prefix.")]


@command(data_app, "log", example="tunewright data log")
def data_log(run: Session) -> None:
    """List the dataset's versions, the newest last."""
    from tunewright.data.versions import current_manifest
    from tunewright.data.versions.version import version_table

    versions, head = run.project.data.log(), current_manifest(run.project.folder.dataset)
    run.show(
        {"versions": [v.model_dump(mode="json") for v in versions], "current": head.digest if head else None},
        version_table(versions, head) if versions else "No version yet: `tunewright data add FILE` makes one.",
    )


@command(data_app, "diff", example="tunewright data diff 4f1c02a9")
def data_diff(
    run: Session,
    a: Annotated[str, typer.Argument(help="Digest of the older version, or its first characters.")],
    b: Annotated[str | None, typer.Argument(help="The newer version.", show_default="the current one")] = None,
) -> None:
    """Compare two versions: rows added, removed and edited, and whether their scores are comparable."""
    from tunewright.data.versions.diff import diff_text

    found = run.project.data.diff(a, b)
    run.show(found.as_dict(), diff_text(found))


@command(data_app, "checkout", example="tunewright data checkout 4f1c02a9")
def data_checkout(
    run: Session,
    version: Annotated[str, typer.Argument(help="Digest of the version, or its first characters.")],
) -> None:
    """Make an existing version the current one."""
    from tunewright.data.versions.version import version_table

    manifest = run.project.data.checkout(version)
    run.show(manifest, version_table([manifest]))


@command(data_app, "export", example="tunewright data export train.jsonl --split train --format chat")
def data_export(
    run: Session,
    out: Annotated[Path, typer.Argument(help="File to write.")],
    form: Annotated[Format, typer.Option("--format", help="Format of the file.")] = "chat",
    split: Annotated[Split | None, typer.Option(help="Split to export.", show_default="all")] = None,
    version: Annotated[
        str | None,
        typer.Option("--version", help="Digest of a version, or its first characters.", show_default="the current one"),
    ] = None,
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Include other keys of the rows' files (chat format only).")
    ] = False,
) -> None:
    """Write a version, or one of its splits, to a file for other tools."""
    written = run.project.data.export(out, form, split=split, version=version, metadata=metadata)
    run.show(written, f"Wrote {written.rows:,} rows of version {written.version[:12]} to {out}")


@command(data_app, "push", example="tunewright data push s3://team-bucket/legal")
def data_push(run: Session, url: Url) -> None:
    """Copy the current version, its ancestors and reviews to a shared folder or bucket."""
    done = run.project.data.push(url)
    run.show(done, _transfer_text(done, f"{url} is"))


@command(data_app, "pull", example="tunewright data pull s3://team-bucket/legal")
def data_pull(run: Session, url: Url) -> None:
    """Copy the current version and reviews from a shared folder or bucket, verify them, and make it current here."""
    done = run.project.data.pull(url)
    run.show(done, _transfer_text(done, "This side is"))


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


@command(data_app, "verify", example="tunewright data verify")
def data_verify(run: Session) -> int | None:
    """Check every row, version and review against its digest. Exit code 1 if anything has changed."""
    from tunewright.data.versions.logs import describe_purges

    found = run.project.data.verify()
    warn = run.reporter.warn
    if found.unsealed:
        names = ", ".join(digest[:12] for digest in found.unsealed)
        warn(f"Written by an earlier tunewright, so no digest covers manifest and imports: {names}")
    if found.undigested:
        warn(f"No digest covers {count_of(found.undigested, 'review')} of an earlier tunewright.")
    if found.unneeded:
        rows = count_of(found.unneeded, "row")
        warn(f"{rows} left by a stopped command, in no version. The next command removes them.")
    if found.purges:
        run.reporter.say(f"{describe_purges(found.purges)}. Their text is gone, their digests are in place.")
    counts = f"{count_of(found.rows, 'row')}, {count_of(found.versions, 'version')}, "
    counts += f"{count_of(found.reviews, 'record')} of reviews"
    text = f"{counts}: all as written." if found.ok else "\n".join([counts, *map(str, found.damage)])
    run.show(found.as_dict(), text)
    return None if found.ok else FAILED
