"""Options of training commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tunewright.core.options import Option


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The card, the base and the rows of an estimate; options without a value are this machine's and the project's."""

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


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The learning rates and the time of a sweep, and the use of its winner."""

    minutes: Annotated[float | None, Option("Time limit of the whole sweep (--sweep only).", default="no limit")] = None
    """The limit includes earlier runs in the sweep's ledger. On a cluster it counts the time of all trials together."""
    rates: Annotated[
        list[float] | None,
        Option(
            "Learning rate to try (--sweep only, repeatable).",
            default="three around the base's usual rate",
            name="--rate",
        ),
    ] = None
    """None: three rates that suit the base's size, including the config's own."""
    write: Annotated[bool, Option("Write the winner's values to tunewright.yaml (--sweep only).")] = False
    force: Annotated[bool, Option("Train on fewer than 50 pairs, which is refused otherwise.")] = False
