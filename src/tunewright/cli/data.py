"""``data add``, ``check`` and ``leakage``: from raw files to dataset versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import DATA, command, given_options, group, refuse_unused
from tunewright.cli.console import USER_ERROR, Session
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.options import AddOptions, ColumnMapping
from tunewright.render.blocks import Block, Cell, Column, Lead, Notes, table

if TYPE_CHECKING:
    from tunewright.data.dedup.decontaminate import Contamination, MatchKind
    from tunewright.data.dedup.leakage import BandScore, LeakageReport, TemplateScore
    from tunewright.data.preview import Effect, Preview
    from tunewright.training.rows import LengthReport

data_app = group("data", DATA, "Add, check, review, version and share training pairs.")


@command(
    data_app,
    "add",
    options=AddOptions,
    cluster=True,
    example="tunewright data add pairs.jsonl -m 'first export'",
    kept="nothing was added; run the same command again",
)
def data_add(
    run: Session,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of pairs (JSON, CSV, .xlsx, Parquet, saved `datasets` folders), folders or patterns.",
            show_default="data.sources in the config",
        ),
    ] = None,
    options: AddOptions = AddOptions(),
    message: Annotated[str, typer.Option("--message", "-m", help="Message stored with the version.")] = "",
) -> None:
    """Check, deduplicate, cluster and split files of pairs into a new dataset version."""
    from tunewright.data.versions.version import version_table

    result = run.project.data.add(files, options, message=message)
    what = f"{count_of(result.added, 'example')} added, {result.known:,} known before, "
    what += count_of(len(result.duplicates), "duplicate")
    if result.skipped:
        what += f", {len(result.skipped):,} left out as faulty"
    if result.left_out:
        what += f", {result.left_out:,} left out as holding a test input or a benchmark item"
    if result.overlapping:
        mode = run.project.folder.config.data.on_overlap
        fate = {"drop-train": "left out as", "move": "moved as", "keep": "kept although"}[mode]
        what += f", {len(result.overlapping):,} {fate} near a held-out row of another split"
    if result.unaccepted:
        what += f", {result.unaccepted:,} generated and left out as similar to a held-out row"
    what += f", {sum(len(r.before) for r in result.replaced):,} replaced" if result.replaced else ""
    what += f", {len(result.superseded):,} superseded earlier and left out" if result.superseded else ""
    what += f", {len(result.removed):,} removed earlier and left out" if result.removed else ""
    if near := result.version.counts.near_duplicates:
        what += f"; near-duplicates in the version: {near:,}, each in one cluster with the row that it is like"
    status = "New version" if result.created else "Nothing new: still version"
    text = f"{status} {result.version.digest[:12]}: {what}"
    run.show(result.as_dict(), text, version_table([result.version]))


@command(
    data_app,
    "check",
    options=AddOptions,
    cluster=True,
    example="tunewright data check pairs.csv --input question --output answer",
)
def data_check(
    run: Session,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of pairs.", show_default="the current version, else data.sources in the config"),
    ] = None,
    fix: Annotated[Path | None, typer.Option(help="Write a corrected copy of one file to this path.")] = None,
    leave_out: Annotated[
        list[int] | None,
        typer.Option(
            help="Line whose row, and each repetition of it, is not in the copy (repeatable).", show_default="none"
        ),
    ] = None,
    options: AddOptions = AddOptions(),
) -> int | None:
    """Show what `data add` would do with files or, without files, what training sees of the current version.

    With files: faults, duplicates, conflicts, secrets and splits; exit code 2 if `data add` with the same options would
    refuse them. Without files, every row is encoded: lengths, trained share, and rows too long or unfit for training.
    Before the first version, the files in data.sources are checked.
    """
    from tunewright.data.preview import Preview
    from tunewright.data.versions import has_version

    of_files = files is not None or not has_version(run.project.folder.dataset)
    mapping, adding = given_options(options.mapping), given_options(replace(options, mapping=ColumnMapping()))
    if not of_files and (mapping or adding):
        named = ", ".join([*mapping, *adding])
        raise UserError(f"{named} requires files (got none)", fix="Name the files.")
    if leave_out and fix is None:
        raise UserError("--leave-out requires --fix", where="--leave-out", fix="Name the copy with --fix.")
    if fix is not None:
        if files is None or len(files) != 1:
            what = f"--fix requires exactly one file (got {len(files or ())})"
            raise UserError(what, where="--fix", fix="Name one file.")
        refuse_unused("--fix", {**dict.fromkeys(adding, True), "--cluster": run.cluster is not None})
        changes = run.project.data.fix_file(files[0], fix, options.mapping, leave_out=leave_out or ())
        left_out = sum(change.left_out for change in changes)
        done = f"{count_of(len(changes) - left_out, 'change')}, {count_of(left_out, 'row')} left out"
        document = {"out": str(fix), "changes": changes}
        run.show(document, "\n".join([*map(str, changes), f"Wrote {fix}: {done}"]))
        return None
    report = run.project.data.check_files(files, options) if of_files else run.project.data.check()
    if isinstance(report, Preview):
        run.show(report.as_dict(), preview_text(report))
        return None if report.ok else USER_ERROR
    dropping = run.project.folder.config.train.on_overlength == "drop"
    run.show(report, *check_blocks(report, dropping=dropping))
    return USER_ERROR if report.refused(dropping=dropping) else None


@command(data_app, "leakage", cluster=True, example="tunewright data leakage --against benchmark.jsonl")
def data_leakage(
    run: Session,
    evaluation: Annotated[
        Path | None,
        typer.Argument(help="Evaluation to score by distance and by output template too.", show_default="none"),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSONL file of benchmark items to look for (repeatable); data.benchmarks are searched as well.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Compare held-out rows with training rows, and with what a random split would have leaked.

    Outputs are compared too: identical, of one template, near-equal. Training rows, including the mix-in, are searched
    for test inputs and benchmark items.
    """
    data = run.project.data
    report = data.leakage()
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
    notes = [misleading] if misleading else []
    run.show(document, *leakage_blocks(report, bands, templates), *notes, contamination_text(found))


_MOST_HELD = 10
_MOST_NAMED = 20


def preview_text(preview: Preview) -> str:
    """Return the contents of the files, each reason why `data add` would refuse them, and its effect otherwise."""
    from tunewright.data.notices import of_files
    from tunewright.data.readers.validate import counted

    checked = preview.files
    lines = of_files((file.source, file.notes) for file in checked.files)
    if preview.metadata:
        lines.append(f"Kept as metadata: {counted(Counter(preview.metadata))}")
    for refusal in (file.unreadable for file in checked.files if file.unreadable):
        lines.append(f"{refusal['where']}: {refusal['what']}")
        lines += [f"  {refusal['fix']}"] if refusal["fix"] else []
    lines += [str(refusal) for refusal in preview.refusals]
    lines.append(checked.summary.splitlines()[0])  # secrets are among the refusals, by place
    if preview.effect is not None:
        lines += _effect_lines(preview.effect, preview.ok)
    verdict = "would add these files" if preview.ok else "would refuse these files (exit code 2)"
    return "\n".join([*lines, f"`tunewright data add` {verdict}. Nothing was written."])


def _effect_lines(effect: Effect, ok: bool) -> list[str]:
    counts = {
        "near-duplicates with the same output": effect.near_kept,
        "known before": effect.known,
        "replacing": effect.replaced,
        "left out as exact duplicates": effect.exact_duplicates,
        "left out as near-duplicates": effect.near_dropped,
        "removed earlier": effect.removed,
        "superseded earlier": effect.superseded,
        "inputs with different outputs": effect.conflicts,
        "training rows that hold a test or benchmark item": effect.contaminated,
        "rows near a held-out row of another split": effect.overlapping,
        "rows that change their split": effect.moved,
    }
    of = "" if ok else "Of the rows without faults: "
    lines = [", ".join([f"{of}new {effect.added:,}", *(f"{what} {n:,}" for what, n in counts.items() if n)])]
    for size in effect.splits:
        rows = "row" if size.rows == 1 else "rows"
        lines.append(
            f"  {size.split:<5} {size.rows:>8,} {rows} ({size.new:,} new) in {count_of(size.clusters, 'cluster')}"
        )
    return lines


def leakage_blocks(
    report: LeakageReport, bands: Sequence[BandScore], templates: Sequence[TemplateScore] = ()
) -> tuple[Block, ...]:
    """Return similarities next to a random split's, and scores by distance and by output template."""
    from tunewright.data.dedup.leakage import similarity_blocks

    lines = [
        f"{band.arm}, nearest {band.low:.1f} to {band.high:.1f}: {band.exact} of {band.items} exact "
        f"({band.interval[0]:.1%} to {band.interval[1]:.1%})"
        for band in bands
    ]
    lines += [
        f"{score.arm}, {_TEMPLATES[score.template]}: {score.exact} of {score.items} exact "
        f"({score.interval[0]:.1%} to {score.interval[1]:.1%})"
        for score in templates
    ]
    title = f"Held-out rows by the similarity of their nearest training row, version {report.version[:12]}"
    return (Lead(title), *similarity_blocks(report), Notes(tuple(lines)))


_TEMPLATES = {"seen": "output template in training", "new": "new output template"}


def contamination_text(found: Contamination) -> str:
    """Return the training rows and their pairs with items of each source, by kind, and the most certain pairs."""
    from tunewright.data.notices import HOLDS
    from tunewright.data.versions import short

    lines = []
    for source, items in found.looked_for.items():
        rows, pairs = found.rows(source), found.pairs(source)
        line = f"Training rows with one of the {items:,} items of {source}: {rows.total():,}"
        if rows:
            line += f" ({_kinds(rows)}, by their closest item), in {count_of(pairs.total(), 'pair')} of a row and an "
            line += f"item ({_kinds(pairs)})"
        lines.append(line)
    for held in found.found[:_MOST_HELD]:
        mixed = " (mixed in)" if held.mixed else ""
        lines.append(f"  row {short(held.row)}{mixed} {HOLDS[held.how]} {held.item}")
    if len(found.found) > _MOST_HELD:
        lines.append(f"  and {count_of(len(found.found) - _MOST_HELD, 'more pair')}: --json lists all")
    return "\n".join(lines)


def _kinds(counts: Counter[MatchKind]) -> str:
    return f"{counts['equal']:,} equal, {counts['contained']:,} contained, {counts['overlap']:,} overlapping"


def check_blocks(report: LengthReport, *, dropping: bool) -> list[Block]:
    """Return lengths by split, a histogram, and the rows that are too long or unfit for training."""
    from tunewright.training.rows import PERCENTILES

    names = {0: "Shortest", 50: "Median", 100: "Longest"}
    percentiles = (names.get(percent, f"{percent}%") for percent in PERCENTILES)
    rows = []
    for split in report.splits:
        lengths = (f"{split.percentiles[p]:,}" for p in PERCENTILES)
        share = f"{split.trained / split.tokens:.1%}" if split.tokens else "-"
        rows.append((split.split, f"{split.rows:,}", *lengths, f"{split.tokens:,}", share))
    head = ("Split", "Rows", *percentiles, "Tokens", "Trained")
    bars = (
        (f"{one.first:,} to {one.last:,}", Cell(f"{one.rows:,}", tone="no" if one.first > report.max_length else ""))
        for one in report.histogram
    )
    title = f"Rows in tokens, version {report.version[:12]}, {report.base}"
    parts: list[Block] = [Lead(title), table(title, head, rows)]
    if report.histogram:
        parts.append(table("Histogram of lengths", ("Tokens", Column("Rows", words=True, of="bar")), bars))
    if report.look_alikes:
        parts.append(Lead(f"Text that looks like a control token, and stays text: in {report.look_alikes:,} examples."))
    if report.too_long:
        what = "left out of the training" if dropping else "training would refuse them (train.on_overlength: error)"
        parts.append(Lead(f"Over {report.max_length:,} tokens: {len(report.too_long):,}; {what}, test rows apart:"))
        parts.append(_named([f"{row['split']}: {row['name']}: {row['tokens']:,} tokens" for row in report.too_long]))
    if report.faults:
        parts += [Lead(f"Cannot be trained on: {len(report.faults):,}:"), _named(report.faults)]
    if not report.too_long and not report.faults:
        text = f"Every row is whole and within {report.max_length:,} tokens, and ends with its end token, trained."
        parts.append(Lead(text))
    return parts


def _named(lines: Sequence[str]) -> Notes:
    more = [f"  and {len(lines) - _MOST_NAMED:,} more: --json lists all"] if len(lines) > _MOST_NAMED else []
    return Notes((*(f"  {line}" for line in lines[:_MOST_NAMED]), *more))
