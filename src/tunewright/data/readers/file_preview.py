"""The columns and first rows of a file, before any column is chosen as input or output."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.sources import is_workbook, open_source

_LOOKED_AT = 20  # rows, some of which may be faulty
# Templates on the whole row: every column is read, whatever its name.
_ANY_COLUMNS = {"input": "{{ row }}", "output": "{{ row | tojson }}", "group_by": (), "drop_columns": ()}


@dataclass(frozen=True)
class FilePreview:
    """The columns (or keys) of a file and its first rows without a fault."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


def preview_file(path: Path, data: DataConfig, count: int = 3) -> FilePreview:
    """Return the columns of a file and its first ``count`` rows.

    Raises:
        UserError: the file cannot be read, or two columns have the same name.
    """
    source = open_source(path, data.model_copy(update=_ANY_COLUMNS), [])
    rows = [raw.row for raw in islice(source.rows, _LOOKED_AT)]
    good = [row for row in rows if not isinstance(row, RowError)][:count]
    return FilePreview(tuple(dict.fromkeys(key for row in good for key in row)), tuple(good))


def sheet_titles(path: Path) -> tuple[str, ...]:
    """Return the titles of a workbook's visible sheets; of another file, nothing.

    Raises:
        UserError: a damaged workbook.
    """
    if not is_workbook(path):
        return ()
    from tunewright.data.readers.workbooks import visible_sheets

    return visible_sheets(path)
