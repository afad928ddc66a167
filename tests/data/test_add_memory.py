"""Memory of ``data add`` for each row, with long texts, which wait in files."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from data_helpers import Listener

from tunewright.config.project import ProjectFolder
from tunewright.data.add import add


def _peak(folder: Path, count: int) -> int:
    """Return the bytes at the peak of adding this many rows of 1,200 characters."""
    draw = random.Random(count)
    words = ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(500)]
    texts = [" ".join(draw.choices(words, k=150)) for _ in range(count)]
    rows = [{"prompt": text, "completion": f"answer {i % 40}"} for i, text in enumerate(texts)]
    folder.mkdir()
    (folder / "tunewright.yaml").write_text("data: {}\n")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del texts, rows
    tracemalloc.start()
    result = add(ProjectFolder(folder), [folder / "pairs.jsonl"], Listener())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.added == count
    return peak


@pytest.mark.slow
def test_memory_of_a_row_is_less_than_its_text_and_4_grams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of fixed size, which bound the memory of many rows, are made small enough for few.
    for name, size in (
        ("partition._FEW", 100),
        ("partition._SIGNED", 50),
        ("partition._CELLS", 10_000),
        ("similarity._CELLS", 50_000),
        ("similarity._TOGETHER", 100),
        ("shingles._CHARACTERS", 50_000),
        ("shingles._ROWS", 50),
    ):
        monkeypatch.setattr(f"tunewright.data.dedup.{name}", size)
    monkeypatch.setattr("tunewright.core.spill._BLOCK", 50_000)
    few, many = (_peak(tmp_path / str(count), count) for count in (500, 1_500))
    assert (many - few) / 1_000 < 1_200 * (1 + 4)
