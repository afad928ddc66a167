"""`data remove`, `data add --replace`, `--restore` and `--split-from` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from making.command_line import tiny_project, tunewright


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """A project with one version of 120 rows."""
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def test_adapters_show_follows_lineage_through_a_purge(project: Path) -> None:
    assert tunewright("train", "-p", project).code == 0
    options = ("--where", "split == 'train' && output == 'red'", "--because", "asked", "--purge")
    done = tunewright("data", "remove", *options, "-p", project, "--json").document
    traced = tunewright("adapters", "show", "--rows", "-p", project, "--json").document
    keys = {key for split in traced["dataset"]["splits"] if split["split"] == "train" for key in split["keys"]}
    assert {row["key"] for row in done["rows"]} <= keys
    place = tunewright("data", "trained-by", done["rows"][0]["key"], "-p", project, "--json").document
    assert len(place["trained_on"]) == 1


def test_remove_accepts_keys_printed_by_other_commands(project: Path, tmp_path: Path) -> None:
    def removed(name: str, text: str) -> set[str]:
        keys = project / name
        keys.write_text(text, encoding="utf-8")
        ran = tunewright("data", "remove", "--keys", keys, "--because", "x", "--dry-run", "-p", project, "--json")
        assert ran.code == 0, ran.stderr
        return {row["key"] for row in ran.document["rows"]}

    suspects = tunewright("data", "suspects", "-p", project, "--json")
    named = [suspect["key"] for suspect in suspects.document["suspects"]]
    assert len(named) > 1
    assert removed("suspects.json", suspects.stdout) == set(named)
    assert removed("some.jsonl", "".join(json.dumps(s) + "\n" for s in suspects.document["suspects"][:2])) == {
        *named[:2]
    }
    shown = tunewright("data", "show", "pairs.jsonl:7", "-p", project, "--json")
    assert removed("shown.json", shown.stdout) == {shown.document["key"]}
    sheet = tmp_path / "review.csv"
    assert tunewright("data", "review", "--suspects", "--export", sheet, "-p", project).code == 0
    assert removed("review.csv", sheet.read_text(encoding="utf-8")) == set(named)
    condition = ("--where", "split == 'train' && output == 'red'", "--because", "x")
    dry = tunewright("data", "remove", *condition, "--dry-run", "-p", project, "--json")
    assert removed("dry.json", dry.stdout) == {row["key"] for row in dry.document["rows"]} != set()
