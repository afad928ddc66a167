"""Options of ``data review``: the choice of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tunewright.core.options import Option


@dataclass(frozen=True, kw_only=True)
class ReviewOptions:
    """The rows that a review goes through: a random sample by default."""

    suspects: Annotated[bool, Option("Review the suspects, apart from the sample.")] = False
    adapter: Annotated[
        str | None,
        Option(
            'For free text: adapter whose loss ranks the suspects, or "base".',
            default="cross-validated adapters, or the newest that fits",
        ),
    ] = None
    second: Annotated[bool, Option("Review rows again, blind, that others have reviewed.")] = False
    conflicts: Annotated[
        bool, Option("Judge rows again on which you and others disagree, with all verdicts shown.")
    ] = False
    fixed: Annotated[
        int | None, Option("Draw a sample of fixed size that allows this many wrong rows.", min=0, max=1000)
    ] = None
    redraw: Annotated[bool, Option("Draw another sample; the first stays on record.")] = False
