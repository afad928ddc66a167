"""Exports hold one base at a time, whatever merge methods they measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import tiny_project
from command_line import tunewright as command
from one_base import counted_bases

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("quantization", "bases"), [("none", 2), ("nf4", 4)])
def test_merge_holds_one_base_at_a_time(
    quantization: str, bases: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base_folder: Path
) -> None:
    """This covers the trained model, both merge methods over NF4, and the merged folder."""
    project = tiny_project(tmp_path / "project", tiny_base_folder, count=80)
    config = project / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", f"epochs: 1\n  eval_max_samples: 0\n  quantization: {quantization}")
    config.write_text(text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"))
    assert command("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    assert command("train", "-p", project).code == 0
    with counted_bases(monkeypatch) as counts:
        command("export", "merge", "-p", project)
    assert counts == [0] * bases
