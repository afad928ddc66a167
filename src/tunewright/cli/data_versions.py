"""The dataset's rows and versions: ``data show``, ``blame``, ``remove``, ``log``, ``diff``, ``push`` and more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from tunewright.cli.app import command
from tunewright.cli.console import FAILED, Session
from tunewright.cli.data import data_app
from tunewright.core.clock import without_milliseconds
from tunewright.core.io import canonical_json
from tunewright.core.text import count_of
from tunewright.data.options import RemoveOptions

if TYPE_CHECKING:
    from tunewright.chat.inspection import TokenView
    from tunewright.data.remote import Transfer
    from tunewright.data.remove import RemoveResult
    from tunewright.data.trace import RowOrigin
    from tunewright.data.versions import Member

Row = Annotated[str, typer.Argument(help="Number of the row, first digits of its key, or FILE:LINE of an added file.")]

_MOST = 10


@command(data_app, "show", example="tunewright data show pairs.jsonl:7 --tokens")
def data_show(
    run: Session,
    row: Row,
    tokens: Annotated[bool, typer.Option("--tokens", help="Token by token, as training sees it.")] = False,
) -> None:
    """Show a row's conversation, split and cluster or, with --tokens, what the model sees of it."""
    member = run.project.data.show(row)
    if tokens:
        _show_tokens(run, member)
        return
    metadata = run.project.data.metadata(member.key)
    counts = run.project.data.cluster_counts(member)
    lines = [f"{key}: {canonical_json(value)}" for key, value in metadata.items()]
    number = run.project.data.numbers()[member.key]
    document = {"number": number, **row_document(member, counts), "metadata": metadata}
    run.show(document, row_heading(member, counts, number), *lines, conversation_text(member))


def _show_tokens(run: Session, member: Member) -> None:
    from tunewright.chat.inspection import view
    from tunewright.training.rows import expected_messages, row_faults

    chat = run.project.chat
    encoded = chat.rows(member.example.messages)
    rows = [view(chat, each) for each in encoded]
    faults = row_faults(chat, encoded, expected_messages(member, len(encoded)))
    document = {
        **row_document(member),
        "template_digest": chat.digest,
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
    run.show(document, row_heading(member), *(tokens_text(each) for each in rows))
    for fault in filter(None, faults):
        run.reporter.warn(f"training would refuse this row: {fault}")


@command(data_app, "blame", example="tunewright data blame pairs.jsonl:7")
def data_blame(run: Session, row: Row) -> None:
    """Show which version added a row, from which file, when and by whom."""
    found = run.project.data.blame(row)
    run.show(found, _blame_text(found))


@command(data_app, "trained-by", example="tunewright data trained-by pairs.jsonl:7")
def data_trained_by(run: Session, row: Row) -> None:
    """List the adapters that were trained on a row."""
    key, found = run.project.data.trained_by(row)
    lines = [f"{s.adapter}: {s.use}{f' ({s.reason})' if s.reason else ''}" for s in found]
    run.show(
        {"key": key, "trained_on": [s.adapter for s in found if s.use == "trained"], "adapters": found},
        "\n".join(lines) if lines else "No adapter has been trained yet.",
    )


@command(
    data_app,
    "remove",
    example="tunewright data remove --group customer=ACME --because 'deletion request' --dry-run",
    options=RemoveOptions,
)
def data_remove(run: Session, options: RemoveOptions = RemoveOptions()) -> None:
    """Make a version without some rows, and a log that keeps them out when their file is added again.

    Rows must match all of --keys, --where, --source and --group that are given.
    """
    done = run.project.data.remove(options)
    run.show(done.as_dict(), "\n".join(_removal_lines(done, purging=options.purge)))


def _blame_text(found: RowOrigin) -> str:
    version = found.version
    lines = [
        f"row {found.key[:12]}, version {version.digest[:12]} of {without_milliseconds(version.created)}"
        + (f", by {version.author}" if version.author else "")
        + (f": {version.message}" if version.message else "")
    ]
    if found.source is not None:
        lines.append(f"from {found.source}:{found.line}")
    lines += [f"reviewed by {', '.join(found.reviewers)}"] if found.reviewers else []
    lines += [f"replaces {key[:12]}, which has the same input and another output" for key in found.edit_of]
    lines += [f"next to {key[:12]}, which has the same input and another output" for key in found.conflicts_with]
    if found.older_missing:
        lines.append(f"or from an older version: {found.older_missing[:12]}, its parent, is not here")
    return "\n".join(lines)


def _removal_lines(done: RemoveResult, *, purging: bool) -> Iterator[str]:
    goes = "would go" if done.dry_run else "removed"
    counts = ", ".join(f"{count:,} {split}" for split, count in done.splits.items() if count)
    if done.rows:
        yield f"{count_of(len(done.rows), 'row')} {goes} ({counts}){f': {done.because}' if done.because else ''}"
    if done.dry_run:
        for row in done.rows[:_MOST]:
            text = " ".join(row.document["input"].split())
            place = f"{row.source}:{row.line}" if row.source else "file unknown"
            yield f"  {row.key[:12]} ({row.split}, {place}) {text if len(text) <= 60 else text[:59] + '…'}"
        if len(done.rows) > _MOST:
            yield f"  and {len(done.rows) - _MOST:,} more: --json lists all"
    if done.earlier:
        would = "would be" if done.dry_run else "was"
        yield f"Former rows with these inputs, in earlier versions: {done.earlier:,}; their text {would} purged too"
    if done.splits["test"]:
        yield f"Of the test, {done.splits['test']:,} go: scores of the two versions cannot be compared"
    for seen in done.adapters:
        parts = [f"trained on {seen.trained:,}"] if seen.trained else []
        parts += [f"chosen on {seen.dev:,} (dev)"] if seen.dev else []
        parts += [f"tested on {seen.test:,}"] if seen.test else []
        parts += [f"{seen.unknown:,} unknown"] if seen.unknown else []
        yield f"Adapter {seen.adapter}: {', '.join(parts)}"
    for name, count in done.evaluations.items():
        yield f"Evaluation {name}: measured on {count:,}"
    if done.same_input:
        named = ", ".join(key[:12] for key in done.same_input[:_MOST])
        yield f"Rows with the same input that stay: {len(done.same_input):,}: {named}"
    if done.purged:
        yield f"Text erased from all versions: {count_of(done.purged, 'row')}; digests stay as tombstones."
        yield "Where versions were pushed, the next `tunewright data push` erases it too."
    if done.dry_run:
        yield f"Nothing has changed{'; --purge cannot be undone' if purging else ''}."
    elif done.created:
        yield f"New version {done.version.digest[:12]}: {count_of(done.version.counts.rows, 'row')}"
    elif done.rows:
        yield (
            f"Version {done.version.digest[:12]} is current again: {count_of(done.version.counts.rows, 'row')}. "
            "It keeps its own message in `tunewright data log`; the reason is in dataset/removed.jsonl."
        )
    elif not done.purged:
        yield f"No row was removed: version {done.version.digest[:12]} stays current."


def row_document(member: Member, counts: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return a row as JSON, with the number of rows in its cluster, and of rows in it with the same output."""
    return {
        **({"cluster_rows": counts[0], "same_output": counts[1]} if counts else {}),
        "key": member.key,
        "split": member.split,
        "cluster": member.cluster,
        "groups": list(member.groups),
        "mixed": member.mixed,
        "messages": [m.as_dict() for m in member.example.messages],
    }


def row_heading(member: Member, counts: tuple[int, int] | None = None, number: int | None = None) -> str:
    """Return the row's number, key, split and cluster."""
    row = member.key[:12] if number is None else f"{number} ({member.key[:12]})"
    more = ["generic mix-in"] if member.mixed else list(member.groups)
    if counts is not None and counts[0] > 1:
        more = [f"of {counts[0]:,} rows, {counts[1]:,} with this output", *more]
    return ", ".join([f"row {row}, split {member.split}, cluster {member.cluster[:12]}", *more])


def conversation_text(member: Member) -> Text:
    """Return the turns, one after the other."""
    text = Text()
    for message in member.example.messages:
        weight = "" if message.weight else " (weight 0: not trained)"
        answers = f" (result of {message.call_id})" if message.call_id is not None else ""
        text.append(f"{message.role}{answers}{weight}\n", style="bold")
        if message.role == "tools":
            text.append(_escaped("".join(map(_signature, json.loads(message.content)))))
            continue
        if message.reasoning:
            text.append(_escaped(f"{message.reasoning}\n"), style="italic")
        if message.content or not message.calls:
            text.append(_escaped(f"{message.content}\n"))
        for call in message.calls:
            text.append(_escaped(f"{call.id}: {call.name}({call.arguments})\n"))
    return text


def _signature(tool: Mapping[str, Any]) -> str:
    """Return a declaration in one line: ``get_weather(city: string, days?: integer): The weather.``"""
    function = tool["function"]
    needed = function["parameters"].get("required", [])
    named = [
        f"{name}{'' if name in needed else '?'}: {about.get('type', 'any') if isinstance(about, dict) else 'any'}"
        for name, about in function["parameters"].get("properties", {}).items()
    ]
    description = f": {' '.join(function['description'].split())}" if "description" in function else ""
    return f"{function['name']}({', '.join(named)}){description}\n"


def _escaped(text: str) -> str:
    return "".join(map(escape_control_character, text))


def tokens_text(tokens: Sequence[TokenView]) -> Text:
    """Return tokens separated by spaces, with their spaces as ·, line ends as ⏎, and trained ones in green ⟦ ⟧."""
    text = Text()
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        text.append("⟦ " if trained else "", style="green")
        for token in run:
            style = "bold magenta" if token.control else "green" if trained else "default"
            shown = token.text.replace(" ", "·").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
            text.append(_escaped(shown), style=f"{style} underline" if trained else style)
            text.append("\n" if "\n" in token.text else " ")
        text.append("⟧ " if trained else "", style="green")
    trained_count = sum(token.trained for token in tokens)
    text.append(f"\n{len(tokens):,} tokens, {trained_count:,} trained", style="dim")
    return text


def escape_control_character(character: str) -> str:
    """Return a control or format character as its code: it is invisible, or could corrupt the terminal."""
    return character if character.isprintable() or character in "\n\t" else f"<U+{ord(character):04X}>"


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
    a: Annotated[str, typer.Argument(help="Number of the older version, or first characters of its digest.")],
    b: Annotated[str | None, typer.Argument(help="The newer version.", show_default="the current one")] = None,
) -> None:
    """Compare two versions: rows added, removed and edited, and whether their scores are comparable."""
    from tunewright.data.versions.diff import diff_text

    found = run.project.data.diff(a, b)
    run.show(found.as_dict(), diff_text(found))


@command(data_app, "checkout", example="tunewright data checkout 4f1c02a9")
def data_checkout(
    run: Session,
    version: Annotated[str, typer.Argument(help="Number of the version, or first characters of its digest.")],
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
        typer.Option("--version", help="Number or first digits of a version.", show_default="the current one"),
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
    for digest, clusters in found.straddling.items():
        torn = f"{count_of(clusters, 'cluster')} with rows in several splits"
        warn(f"Version {digest[:12]} has {torn}, as data.on_overlap: keep allows.")
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
