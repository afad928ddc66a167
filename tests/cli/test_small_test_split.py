"""A test split of too few clusters: said when rows are added, and before any time is spent on a base."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import tunewright, write_jsonl

TOO_FEW = "no difference can be significant"


@pytest.fixture
def few_clusters(tmp_path: Path) -> Path:
    """A project with 480 rows in 40 groups of 12, which leave four test clusters, and no base."""
    rows = [
        {"prompt": f"{'abcdefghij'[g % 10] * 3} {g * 7919 % 10007} question {g}-{k}", "completion": f"{g} {k}", "g": g}
        for g in range(40)
        for k in range(12)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "tunewright.yaml").write_text(
        f"name: few\nbase_model: {tmp_path / 'nowhere'}\ndata: {{sources: [pairs.jsonl], group_by: [g]}}\n"
    )
    return tmp_path


def test_data_add_warns_last_of_few_test_clusters_and_succeeds(few_clusters: Path) -> None:
    ran = tunewright("data", "add", few_clusters / "pairs.jsonl", "-p", few_clusters, "--json")
    assert ran.code == 0
    assert ran.document["clusters"] == {"train": 32, "dev": 4, "test": 4}
    warnings = [line for line in ran.stderr.splitlines() if line.startswith("Warning:")]
    assert warnings[-1].startswith(f"Warning: 4 test clusters: {TOO_FEW} with fewer than 6. About ")
    assert "Independent clusters: 32 train, 4 dev, 4 test." in ran.stderr


def test_run_stops_before_resolving_the_base_unless_forced(few_clusters: Path) -> None:
    ran = tunewright("run", "-p", few_clusters)
    assert ran.code == 2
    assert f"Error: test split: 4 test clusters: {TOO_FEW}" in ran.stderr
    assert "--force" in ran.stderr
    assert "nowhere" not in ran.stderr
    forced = tunewright("run", "--force", "-p", few_clusters)
    assert forced.code == 2
    assert 'the verdict will be "can\'t tell"' in " ".join(forced.stderr.split())
    assert "nowhere" in forced.stderr


def test_train_warns_before_resolving_the_base(few_clusters: Path) -> None:
    tunewright("data", "add", few_clusters / "pairs.jsonl", "-p", few_clusters)
    ran = tunewright("train", "-p", few_clusters)
    assert f"Warning: 4 test clusters: {TOO_FEW}" in ran.stderr
    assert ran.stderr.index(TOO_FEW) < ran.stderr.index("nowhere")
