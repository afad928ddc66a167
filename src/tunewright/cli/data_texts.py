"""Files of pairs and splits, as people read about them."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.data.formats.file_check import FileCheck
from tunewright.data.neighbours.contamination import Contamination
from tunewright.data.neighbours.leak import BandScore, LeakReport
from tunewright.data.neighbours.output_leak import OutputLeak
from tunewright.data.notices import HOLDS
from tunewright.data.versions import short

_BAR = 40
_MOST_HELD = 10


def file_check_text(checked: FileCheck) -> str:
    """Every fault with what to do, and how many there are of each code."""
    lines = [note for file in checked.files for note in file.notes]
    for refusal in (file.unreadable for file in checked.files if file.unreadable):
        lines.append(f"{refusal['where']}: {refusal['what']}")
        lines += [f"  {refusal['fix']}"] if refusal["fix"] else []
    for fault in checked.faults:
        lines.append(f"{fault} [{fault.code} {fault.path}]")
        lines += [f"  {fault.fix}"] if fault.fix else []
    return "\n".join([*lines, checked.summary])


def leak_text(report: LeakReport, bands: Sequence[BandScore]) -> str:
    """A histogram of similarities, the random split beside, and scores by distance."""
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
    return "\n".join(lines)


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
