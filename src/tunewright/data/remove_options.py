"""The options of ``data remove``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tunewright.core.options import Option


@dataclass(frozen=True, kw_only=True)
class RemoveOptions:
    """The rows to remove, which match each of keys, where, source and groups that is set, and the reason."""

    because: Annotated[
        str, Option("Reason, stored with the version and in removed.jsonl. Optional with --dry-run.", default="")
    ] = ""
    keys: Annotated[
        Path | None,
        Option(
            "File of keys: one, or its first digits, on each line; JSON Lines with `key`; what `data suspects` or "
            "`data show` prints with --json; CSV with a column `key` or `row`."
        ),
    ] = None
    where: Annotated[str | None, Option("JMESPath condition on a row as `data remove --json` shows it.")] = None
    source: Annotated[str | None, Option("Added file that the rows came from.")] = None
    groups: Annotated[
        tuple[str, ...], Option("Group of the rows, such as customer=ACME (repeatable).", name="--group")
    ] = ()
    """A row must have one of them."""
    dry_run: Annotated[bool, Option("Show what would be removed, and change nothing.")] = False
    purge: Annotated[bool, Option("Erase the rows' text from all versions too. This cannot be undone.")] = False
    """Also that of rows that they were edited from, and of former rows with the same input."""

    @property
    def selection(self) -> str:
        """The selection of rows as command-line options."""
        options = {"--keys": self.keys, "--where": self.where, "--source": self.source}
        parts = [f"{name} {value}" for name, value in options.items() if value is not None]
        return " ".join([*parts, *(f"--group {group}" for group in self.groups)])
