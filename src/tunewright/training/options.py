"""Options of training commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tunewright.core.options import Option


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The card, the base and the rows of an estimate; those without a value are this machine's and the project's."""

    gpu: Annotated[
        str | None,
        Option(
            "GPU by name or memory, such as 'RTX 4090', a100-80gb or 24GB.",
            default="this machine's",
            name=("--gpu", "--card"),
        ),
    ] = None
    base: Annotated[str | None, Option("Base other than the project's; needs no project.")] = None
    """Without a project the config's defaults apply."""
    rows: Annotated[int | None, Option("Rows of a micro-batch.", default="from the config", min=1)] = None
    length: Annotated[int | None, Option("Tokens of a row.", default="max_length in the config", min=2)] = None
    shared: Annotated[int, Option("Tokens at the start of a row that all rows share.", min=0)] = 0
    answer: Annotated[int | None, Option("Trained tokens of a row.", default="all but the shared", min=1)] = None
