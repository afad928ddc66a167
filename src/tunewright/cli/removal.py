"""Taking rows out of a dataset: ``data remove``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json
from tunewright.cli.console import session
from tunewright.cli.data import data_app
from tunewright.core.wording import count_of

if TYPE_CHECKING:
    from tunewright.data.remove import RemoveResult

_MOST = 10


@data_app.command("remove")
def data_remove(
    because: Annotated[
        str,
        typer.Option(
            "--because",
            help="The reason, kept with the version and in removed.jsonl; --dry-run needs none.",
            show_default=False,
        ),
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(
            help="A file of keys: one, or its first digits, on each line; JSON Lines with `key`; what `data suspects` "
            "or `data show` prints with --json; CSV with a column `key` or `row`."
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="A JMESPath condition on a row as `data remove --json` shows it.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="The added file that the rows came from.")] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A group of the rows, such as customer=ACME (repeatable).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and change nothing.")] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Erase the rows' text from all versions too. This cannot be undone.")
    ] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Remove rows: a new version without them, and a log that keeps them out when their file is added again.

    Rows have to match all of --keys, --where, --source and --group that are given.
    """
    import tunewright

    with session(json, project) as current:
        done = tunewright.open(project, current.reporter).data.remove(
            because=because,
            keys=keys,
            where=where,
            source=source,
            groups=group or (),
            dry_run=dry_run,
            purge=purge,
        )
        current.show(done.as_dict(), "\n".join(_text(done, purging=purge)))


def _text(done: RemoveResult, *, purging: bool) -> Iterator[str]:
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
    yield from _seen(done)
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


def _seen(done: RemoveResult) -> Iterator[str]:
    for seen in done.adapters:
        parts = [f"trained on {seen.trained:,}"] if seen.trained else []
        parts += [f"chosen on {seen.dev:,} (dev)"] if seen.dev else []
        parts += [f"tested on {seen.test:,}"] if seen.test else []
        parts += [f"{seen.unknown:,} unknown"] if seen.unknown else []
        yield f"Adapter {seen.adapter}: {', '.join(parts)}"
    for name, count in done.evaluations.items():
        yield f"Evaluation {name}: measured on {count:,}"
