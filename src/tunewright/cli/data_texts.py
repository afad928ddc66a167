"""Files of pairs and splits, as people read about them."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.data.formats.file_check import FileCheck
from tunewright.data.neighbours.leak import BandScore, LeakReport

_BAR = 40


def file_check_text(checked: FileCheck) -> str:
    """Every fault with what to do, and how many there are of each code."""
    lines = [note for file in checked.files for note in file.notes]
    lines += [f"{file.source}: {file.unreadable['what']}" for file in checked.files if file.unreadable]
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
    lines += [
        f"{band.arm}, nearest {band.low:.1f} to {band.high:.1f}: {band.exact} of {band.items} exact "
        f"({band.interval[0]:.1%} to {band.interval[1]:.1%})"
        for band in bands
    ]
    return "\n".join(lines)
