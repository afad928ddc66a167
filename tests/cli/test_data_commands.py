"""Data as code, through the command line: reports on files, rows, versions and splits, and removals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from making.command_line import Ran, pairs, tiny_project, tunewright, write_jsonl

pytest_plugins = "making.adapter_projects"


def _run(project: Path, *arguments: str | Path, code: int = 0) -> Any:
    ran = tunewright("data", *arguments, "-p", project, "--json")
    assert ran.code == code, ran.stderr
    return ran.document


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """A project with one version of 120 rows."""
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    _run(folder, "add", folder / "pairs.jsonl", "-m", "first")
    return folder


def test_verify_names_the_row_of_a_flipped_byte(project: Path) -> None:
    assert _run(project, "verify")["ok"]
    shard = next((project / "dataset" / "rows").glob("*.jsonl"))
    data = bytearray(shard.read_bytes())
    row = json.loads(data.split(b"\n")[0])
    place = data.index(b'"content":"') + len(b'"content":"')
    data[place] ^= 1
    shard.write_bytes(bytes(data))
    found = _run(project, "verify", code=1)
    assert not found["ok"]
    assert any(row["key"] in damage["rows"] for damage in found["damage"])
    assert shard.name in tunewright("data", "verify", "-p", project).stdout


def _refused(ran: Ran, value: str) -> None:
    assert ran.code == 2
    assert "secret.jsonl:31" in ran.stderr
    assert value not in ran.stderr + ran.stdout


def test_add_refuses_secrets_until_redacted_and_never_prints_them(project: Path) -> None:
    card = "4556737586899855"
    assert sum(int(d) for i, c in enumerate(reversed(card)) for d in str(int(c) * (1 + i % 2))) % 10 == 0
    rows = [*pairs(30, seed=8), {"prompt": f"charge card {card} now", "completion": f"charged {card}"}]
    path = write_jsonl(project / "secret.jsonl", rows)
    before = _run(project, "log")
    for more in ([], ["--json"]):
        ran = tunewright("data", "add", path, "-p", project, *more)
        assert (ran.code, card in ran.stdout + ran.stderr) == (2, False)
    _refused(tunewright("data", "add", path, "-p", project), card)
    assert _run(project, "log") == before
    added = _run(project, "add", path, "--redact")
    assert list(added["redacted"].values()) == [2]
    row = _run(project, "show", "secret.jsonl:31")
    texts = [m["content"] for m in row["messages"]]
    assert card not in "".join(texts)
    assert texts[0].split()[2] == texts[1].split()[1]


def test_leakage_searches_benchmark_items_in_training_rows(project: Path) -> None:
    item = "Which of the seven bridges in the old town was built before the great flood?"
    (project / "items.jsonl").write_text(json.dumps({"question": item}) + "\n")
    row = {"prompt": f"Say: {item} And why?", "completion": "the third"}
    _run(project, "add", write_jsonl(project / "more.jsonl", [row]))
    found = _run(project, "leakage", "--against", project / "items.jsonl")["contamination"]
    [held] = [held for held in found["found"] if held["source"].endswith("items.jsonl")]
    assert (held["how"], held["mixed"]) == ("contained", False)
    assert held["row"] == _run(project, "show", "more.jsonl:1")["key"]
    shown = tunewright("data", "leakage", "--against", project / "items.jsonl", "-p", project).stdout
    assert "one of the 1 items of" in shown
    for source, totals in found["totals"].items():
        held = [each for each in found["found"] if each["source"] == source]
        assert sum(totals["pairs"].values()) == len(held)
        assert sum(totals["rows"].values()) == len({each["row"] for each in held})
    missing = _run(project, "leakage", "--against", project / "nowhere.jsonl", code=2)
    assert "nowhere.jsonl" in missing["error"]["where"]


def test_adapters_show_follows_lineage_through_a_purge(trained: Path) -> None:
    options = ("--where", "split == 'train' && output == 'red'", "--because", "asked", "--purge")
    done = _run(trained, "remove", *options)
    traced = tunewright("adapters", "show", "--rows", "-p", trained, "--json").document
    keys = {key for split in traced["dataset"]["splits"] if split["split"] == "train" for key in split["keys"]}
    assert {row["key"] for row in done["rows"]} <= keys
    assert len(_run(trained, "trained-by", done["rows"][0]["key"])["trained_on"]) == 1


def test_remove_accepts_keys_printed_by_other_commands(project: Path, tmp_path: Path) -> None:
    def removed(name: str, text: str) -> set[str]:
        keys = project / name
        keys.write_text(text, encoding="utf-8")
        document = _run(project, "remove", "--keys", keys, "--because", "x", "--dry-run")
        return {row["key"] for row in document["rows"]}

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
