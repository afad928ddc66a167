"""The options of ``data add``, which ``data check`` shares, of ``data remove`` and of ``data review``."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from tunewright.core.options import Option


@dataclass(frozen=True)
class ColumnMapping:
    """Overrides of data.rows, sheet, header_row, input and output of the config; None means the config's."""

    rows: Annotated[
        str | None, Option("JMESPath to the rows in a JSON document.", default="data.rows in the config")
    ] = None
    sheet: Annotated[str | None, Option("Sheet of an .xlsx workbook.", default="data.sheet in the config")] = None
    input_column: Annotated[
        str | None,
        Option(
            "Column, key or template of the input.", default="data.input in the config, else by name", name="--input"
        ),
    ] = None
    output_column: Annotated[
        str | None,
        Option(
            "Column, key or template of the output.", default="data.output in the config, else by name", name="--output"
        ),
    ] = None
    header_row: Annotated[
        int | None,
        Option(
            "Line or row of a table's header, if titles are above it.", default="data.header_row in the config", min=1
        ),
    ] = None

    @property
    def given(self) -> dict[str, str | int]:
        """The overrides by their key in the data section."""
        texts = {"rows": self.rows, "sheet": self.sheet, "input": self.input_column, "output": self.output_column}
        values: dict[str, str | int | None] = {**texts, "header_row": self.header_row}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class AddOptions:
    """Options of adding files, which a check of the files shares."""

    mapping: ColumnMapping = ColumnMapping()
    _: KW_ONLY
    skip_bad: Annotated[bool, Option("Leave faulty rows out and list them by cause.")] = False
    redact: Annotated[bool, Option("Replace secrets and personal data with placeholders.")] = False
    accept_conflicts: Annotated[bool, Option("Keep inputs that have different outputs, instead of refusing.")] = False
    replace: Annotated[bool, Option("Let a new output supersede the dataset's output for the same input.")] = False
    restore: Annotated[bool, Option("Add rows again that were removed or superseded.")] = False
    split_from: Annotated[
        Path | None, Option("Project whose split a new dataset's rows keep.", default="a new split")
    ] = None
    split: Annotated[
        tuple[str, ...],
        Option(
            "Split that authors gave the files: train, dev or test, or FILE=test for one of them (repeatable).",
            default="data.sources and data.split_column in the config",
        ),
    ] = ()
    presidio: Annotated[
        str | None, Option("spaCy model that also finds names and places.", default="patterns only")
    ] = None


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
    """A row must have one of these group values."""
    dry_run: Annotated[bool, Option("Show what would be removed, and change nothing.")] = False
    purge: Annotated[bool, Option("Erase the rows' text from all versions too. This cannot be undone.")] = False
    """Also the text of rows that they were edited from, and of former rows with the same input."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))  # a generator would be empty at its second use

    @property
    def selection(self) -> str:
        """The selection of rows as command-line options."""
        options = {"--keys": self.keys, "--where": self.where, "--source": self.source}
        parts = [f"{name} {value}" for name, value in options.items() if value is not None]
        return " ".join([*parts, *(f"--group {group}" for group in self.groups)])


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
