"""Reading files of pairs: a million rows of JSON Lines, CSV and Parquet streamed, with speed and peak memory.

    python benchmarks/read_rows.py [--rows 1000000]

The files are written to a temporary folder, and each is read in a fresh process by ``scan_pairs``, as `data add` and
`data check` read it before they compare rows: once by the names of two columns, once by templates. Prints a table and
one JSON line; peak memory is that of the whole process (Linux's VmHWM), the libraries that it loads included.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig
from tunewright.data.readers import Fault, scan_pairs

MAPPINGS = {
    "columns": DataConfig(input="question", output="answer"),
    "templates": DataConfig(input="Customer: {{ question }}", output='{{ {"intent": answer} | tojson }}'),
}
_BATCH = 10_000


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", nargs=2, metavar=("FILE", "MAPPING"), help="Read one file in this process.")
    args = parser.parse_args()
    if args.read:
        print(json.dumps(_read(Path(args.read[0]), args.read[1])))
        return
    results = []
    print(f"{'file':<14} {'MB':>6} {'mapped by':<10} {'seconds':>8} {'rows/s':>9} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for path in _written(Path(folder), args.rows):
            for mapping in MAPPINGS:
                command = [sys.executable, __file__, "--read", str(path), mapping]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                result = {"file": path.name, "mb": round(path.stat().st_size / 1e6, 1), **json.loads(done.stdout)}
                assert result["rows"] == args.rows
                results.append(result)
                print(
                    f"{result['file']:<14} {result['mb']:>6} {mapping:<10} {result['seconds']:>8} "
                    f"{result['rows_per_s']:>9,} {result['peak_mb']:>8,}"
                )
    print(json.dumps(results))


def _read(path: Path, mapping: str) -> dict[str, Any]:
    began = time.perf_counter()
    rows = sum(not isinstance(row, Fault) for row in scan_pairs(path, MAPPINGS[mapping], []))
    seconds = time.perf_counter() - began
    summary = {"seconds": round(seconds, 1), "rows_per_s": round(rows / seconds), "peak_mb": _peak_mb()}
    return {"mapping": mapping, "rows": rows, **summary}


def _peak_mb() -> int:
    # Not getrusage's ru_maxrss, which begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return round(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6)


def _rows(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        question = f"Why was order {number} of customer {number * 7919 % 10_007} charged twice, “again”?"
        yield {"question": question, "answer": f"intent_{number % 77}"}


def _written(folder: Path, count: int) -> list[Path]:
    """Write the same rows in each format."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    lines, table, parquet = (folder / f"rows.{suffix}" for suffix in ("jsonl", "csv", "parquet"))
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    batch: list[dict[str, str]] = []
    with (
        lines.open("w", encoding="utf-8") as as_lines,
        table.open("w", encoding="utf-8", newline="") as as_table,
        pq.ParquetWriter(parquet, schema) as as_parquet,
    ):
        writer = csv.DictWriter(as_table, schema.names)
        writer.writeheader()
        for row in _rows(count):
            as_lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            writer.writerow(row)
            batch.append(row)
            if len(batch) == _BATCH:
                as_parquet.write_table(pa.Table.from_pylist(batch, schema))
                batch.clear()
        if batch:
            as_parquet.write_table(pa.Table.from_pylist(batch, schema))
    return [lines, table, parquet]


if __name__ == "__main__":
    main()
