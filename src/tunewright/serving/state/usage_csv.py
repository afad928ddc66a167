"""Usage for a spreadsheet or a bill."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields

from tunewright.core.csv import safe_cell
from tunewright.serving.state.meter import UsageLine


def usage_csv(lines: Sequence[UsageLine]) -> str:
    """Return a line for each request, under the names of `UsageLine`; what is not known (yet) is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(UsageLine)], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        # The only words in it that clients choose.
        writer.writerow({**asdict(line), "end_user": safe_cell(line.end_user or "")})
    return out.getvalue()
