"""The options of ``data add``, which ``data check`` shares."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from tunewright.core.options import Option


@dataclass(frozen=True)
class ColumnMapping:
    """Overrides of data.rows, data.sheet, data.input and data.output of the config; None: the config's."""

    rows: Annotated[
        str | None, Option("JMESPath to the rows in a JSON document.", default="data.rows in the config")
    ] = None
    sheet: Annotated[str | None, Option("Sheet of an .xlsx workbook.", default="data.sheet in the config")] = None
    input_column: Annotated[
        str | None,
        Option("Column, key or template of the input.", default="data.input in the config", name="--input"),
    ] = None
    output_column: Annotated[
        str | None,
        Option("Column, key or template of the output.", default="data.output in the config", name="--output"),
    ] = None

    @property
    def given(self) -> dict[str, str]:
        """The overrides by their key in the data section."""
        values = {"rows": self.rows, "sheet": self.sheet, "input": self.input_column, "output": self.output_column}
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
    presidio: Annotated[
        str | None, Option("spaCy model that also finds names and places.", default="patterns only")
    ] = None
