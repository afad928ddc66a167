"""Training rows that contain a test row or a benchmark item: reported on adding, left out on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.versions import load_version

PAIRS = unlike_pairs(100)
ITEM = "What is the name of the largest lake in the far north of the country?"


def _with_benchmark(root: Path, more: str = "") -> ProjectFolder:
    project = new_project(root, f"data:\n  benchmarks: [lakes.jsonl]\n{more}")
    (root / "lakes.jsonl").write_text(json.dumps({"question": ITEM}) + "\n" + json.dumps("Who?") + "\n")
    return project


def _holding(project: ProjectFolder) -> Path:
    return write_jsonl(project.root / "holding.jsonl", [*PAIRS, (f"Tell me. {ITEM} Be brief.", "the long lake")])


def test_add_reports_and_keeps_a_training_row_with_a_benchmark_item(tmp_path: Path) -> None:
    project = _with_benchmark(tmp_path / "p")
    listener = Listener()
    result = add(project, [_holding(project)], listener)
    row = next(m for m in load_version(project.dataset).members if m.example.output == "the long lake")
    assert row.split == "train"
    [hit] = result.contaminated
    assert (hit.row, hit.source, hit.item, hit.how) == (row.key, "lakes.jsonl", 0, "contained")
    reported = next(w for w in listener.warned if "benchmark item" in w)
    assert "holding.jsonl:101 contains or is part of item 1 of lakes.jsonl" in reported
    assert "kept" in reported


def test_add_drops_contaminated_rows_and_records_them(tmp_path: Path) -> None:
    project = _with_benchmark(tmp_path / "p", "  contaminated: drop\n")
    listener = Listener()
    result = add(project, [_holding(project)], listener)
    version = load_version(project.dataset)
    assert all(m.example.output != "the long lake" for m in version.members)
    assert (result.added, result.version.counts.rows) == (100, 100)
    assert any("left out" in w and "holding.jsonl:101" in w for w in listener.warned)
    records = [
        json.loads(line) for line in next(project.dataset.glob("versions/*/imports.jsonl")).read_text().splitlines()
    ]
    assert [r["line"] for r in records if r["fate"] == "contaminated"] == [101]
    again = add(project, [_holding(project)], Listener())
    assert not again.created


def test_dropped_contaminated_rows_stay_out_in_later_versions(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {contaminated: drop}\n")
    add(project, [write_jsonl(tmp_path / "pairs.jsonl", PAIRS)], Listener())
    tests = load_version(project.dataset).examples("test")
    holding = [
        (f"Listen to this, please, and think: {m.example.input_text}. What now?", f"held {i}")
        for i, m in enumerate(tests)
    ]
    file = write_jsonl(tmp_path / "holding.jsonl", [*holding, *unlike_pairs(40, seed=3)])
    add(project, [file], Listener())
    for seed in (4, 5):
        add(project, [write_jsonl(tmp_path / "more.jsonl", unlike_pairs(60, seed=seed))], Listener())
        again = add(project, [file], Listener())
        assert (again.created, again.added, len({hit.row for hit in again.contaminated})) == (False, 0, len(tests))


def test_add_reports_a_training_row_with_a_test_row(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    add(project, [write_jsonl(tmp_path / "pairs.jsonl", PAIRS)], Listener())
    held_out = load_version(project.dataset).examples("test")[0]
    text = f"A customer wrote this last night, in some haste: {held_out.example.input_text}. What now, and who answers?"
    result = add(project, [write_jsonl(tmp_path / "more.jsonl", [(text, "call back")])], Listener())
    [hit] = result.contaminated
    assert (hit.source, hit.how) == ("the test split", "contained")


def test_add_refuses_an_unreadable_benchmark(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {benchmarks: [nowhere.jsonl]}\n")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        add(project, [write_jsonl(tmp_path / "pairs.jsonl", PAIRS)], Listener())
    assert not (project.dataset / "HEAD").exists()


def _intents(rows: int = 40) -> list[tuple[str, str]]:
    """Utterances of several intents, of each one utterance that is the intent's name."""
    names = ["cancel", "weather", "timer", "balance", "transfer"]
    said = iter(unlike_pairs(rows * len(names), seed=7))
    return [pair for name in names for pair in [(name, name), *((next(said)[0], name) for _ in range(rows))]]


def test_add_keeps_rows_whose_label_equals_a_test_input(tmp_path: Path) -> None:
    pairs = _intents()
    for seed in range(200):  # until a one-word input is a test row
        project = new_project(tmp_path / f"p{seed}", f"seed: {seed}\ndata: {{contaminated: drop}}\n")
        result = add(project, [write_jsonl(tmp_path / "intents.jsonl", pairs)], Listener())
        version = load_version(project.dataset)
        assert (result.left_out, len(version.members)) == (0, len(pairs))
        if any(" " not in m.example.input_text for m in version.examples("test")):
            return
    pytest.fail("no one-word input was ever a test row")


def test_add_warns_of_a_class_that_loses_most_of_its_rows(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {contaminated: drop, benchmarks: [items.jsonl]}\n")
    pairs = _intents()
    items = [json.dumps(prompt) + "\n" for prompt, intent in pairs if intent == "timer"]
    (tmp_path / "p" / "items.jsonl").write_text("".join(items))
    listener = Listener()
    result = add(project, [write_jsonl(tmp_path / "intents.jsonl", pairs)], listener)
    reported = [w for w in listener.warned if w.startswith("The class")]
    assert len(reported) == 1
    assert reported[0].startswith(f'The class "timer" loses {result.left_out} of its {result.left_out} training rows')
    assert result.left_out == len(items)
    assert not any(m.example.output == "timer" for m in load_version(project.dataset).members)
