"""Files of pairs and splits, as people read about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunewright.core.wording import count_of
from tunewright.data.dedup.contamination import Contamination
from tunewright.data.dedup.leakage import BandScore, LeakReport, TemplateScore
from tunewright.data.dedup.output_leakage import OutputLeak
from tunewright.data.notices import HOLDS
from tunewright.data.preview import Effect, Preview
from tunewright.data.readers.metadata import counted
from tunewright.data.versions import short

_BAR = 40
_MOST_HELD = 10


def preview_text(preview: Preview) -> str:
    """Return what is in the files, each reason why `data add` would refuse them, and what it would do otherwise."""
    checked = preview.files
    lines = [note for file in checked.files for note in file.notes]
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
    of = "" if ok else "Of the rows without faults: "
    lines = [
        f"{of}new {effect.added:,} (near-duplicates with the same output {effect.near_kept:,}), "
        f"known before {effect.known:,}, replacing {effect.replaced:,}; "
        f"left out: exact duplicates {effect.exact_duplicates:,}, "
        f"near-duplicates {effect.near_dropped:,}, removed earlier {effect.removed:,}, "
        f"superseded earlier {effect.superseded:,}; "
        f"inputs with different outputs {effect.conflicts:,}; "
        f"training rows that hold a test or benchmark item {effect.contaminated:,}; "
        f"rows that change their split {effect.moved:,}",
    ]
    for size in effect.splits:
        rows = "row" if size.rows == 1 else "rows"
        lines.append(
            f"  {size.split:<5} {size.rows:>8,} {rows} ({size.new:,} new) in {count_of(size.clusters, 'cluster')}"
        )
    return lines


def leak_text(report: LeakReport, bands: Sequence[BandScore], templates: Sequence[TemplateScore] = ()) -> str:
    """Return a histogram of similarities next to a random split's, and scores by distance and by output template."""
    counts = [dev + test for dev, test in zip(report.histogram("dev"), report.histogram("test"), strict=True)]
    lines = [f"Held-out rows by the similarity of their nearest training row, version {report.version[:12]}"]
    for place, count in enumerate(counts):
        bar = "█" * round(_BAR * count / max(*counts, 1)) or "▏" * (count > 0)
        lines.append(f"{place / 10:.1f} to {(place + 1) / 10:.1f}  {bar} {count:,}")
    lines += [
        f"Test rows with a training row at {each.threshold} or above: {each.here:.1%} here, "
        f"{each.random:.1%} in a random split"
        for each in report.leaks
    ]
    lines += _output_lines(report.outputs)
    lines += [
        f"{band.arm}, nearest {band.low:.1f} to {band.high:.1f}: {band.exact} of {band.items} exact "
        f"({band.interval[0]:.1%} to {band.interval[1]:.1%})"
        for band in bands
    ]
    lines += [
        f"{score.arm}, {_TEMPLATES[score.template]}: {score.exact} of {score.items} exact "
        f"({score.interval[0]:.1%} to {score.interval[1]:.1%})"
        for score in templates
    ]
    return "\n".join(lines)


_TEMPLATES = {"seen": "output template in training", "new": "new output template"}
_OVERLAPS = {"identical": "an identical output", "template": "the same output template", "near": "a near-equal output"}


def _output_lines(found: OutputLeak) -> list[str]:
    about = f"{found.outputs:,} different outputs, {found.templates:,} different templates"
    if found.natural is not None:
        return [f"Outputs in training and test are alike by nature: {found.natural} ({about})"]
    lines = [
        f"Test rows with {_OVERLAPS[each.how]} in training: {each.here:.1%} here, {each.random:.1%} in a random split"
        for each in found.overlaps
    ]
    return [*lines, f"  ({about})"]


def contamination_text(found: Contamination) -> str:
    """How many training rows hold items of each source, and the surest hits."""
    lines = []
    for source, items in found.looked_for.items():
        rows = found.rows(source)
        whole, piece, words = rows["equal"], rows["contained"], rows["overlap"]
        lines.append(
            f"Training rows that hold one of the {items:,} items of {source}: {whole + piece:,} "
            f"({whole:,} equal); {words:,} more share a run of 13 words with one"
        )
    for held in found.found[:_MOST_HELD]:
        mixed = " (mixed in)" if held.mixed else ""
        lines.append(f"  row {short(held.row)}{mixed} {HOLDS[held.how]} {held.item}")
    if len(found.found) > _MOST_HELD:
        lines.append(f"  and {len(found.found) - _MOST_HELD:,} more: --json lists all")
    return "\n".join(lines)
