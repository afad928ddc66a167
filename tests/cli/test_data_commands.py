"""Data as code, through the command line: reports on files, rows, versions and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import Ran, pairs, tiny_project, tunewright, write_jsonl


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


def _more(project: Path) -> tuple[str, str]:
    before = _run(project, "log")["versions"][-1]["digest"]
    _run(project, "add", write_jsonl(project / "more.jsonl", pairs(20, seed=3)), "-m", "more")
    return before, _run(project, "log")["versions"][-1]["digest"]


def test_diff_reports_added_rows_and_comparability_of_scores(project: Path) -> None:
    before, after = _more(project)
    document = _run(project, "diff", before[:12])
    assert (document["a"], document["b"], len(document["added"]), document["removed"]) == (before, after, 20, [])
    in_test = sum(row["split"] == "test" for row in document["added"])
    assert len(document["test_changes"]["added"]) == in_test
    assert document["comparable"] == (in_test == 0)
    back = _run(project, "diff", after[:12], before[:12])
    assert (len(back["added"]), len(back["removed"])) == (0, 20)


def test_blame_reports_the_version_file_and_line_of_a_row(project: Path) -> None:
    _more(project)
    old, new = (_run(project, "blame", row) for row in ("pairs.jsonl:7", "more.jsonl:3"))
    assert (old["version"]["message"], old["source"], old["line"]) == ("first", "pairs.jsonl", 7)
    assert (new["version"]["message"], new["source"], new["line"]) == ("more", "more.jsonl", 3)
    shown = tunewright("data", "blame", "more.jsonl:3", "-p", project).stdout
    assert "from more.jsonl:3" in shown


def test_trained_by_names_the_adapters_that_saw_a_row(project: Path) -> None:
    assert tunewright("train", "-p", project).code == 0
    uses = {}
    for line in range(1, 121):
        row = _run(project, "show", f"pairs.jsonl:{line}")
        if row["split"] not in uses:
            uses[row["split"]] = _run(project, "trained-by", row["key"])
        if len(uses) == 3:
            break
    assert [a["use"] for a in uses["train"]["adapters"]] == ["trained"]
    assert uses["train"]["trained_on"] == [uses["train"]["adapters"][0]["adapter"]]
    assert (uses["test"]["trained_on"], uses["test"]["adapters"][0]["use"]) == ([], "test")


def test_checkout_switches_between_versions(project: Path) -> None:
    before, after = _more(project)
    for digest, rows in ((before, 120), (after, 140)):
        assert _run(project, "checkout", digest[:10])["digest"] == digest
        assert sum(split["rows"] for split in _run(project, "check")["splits"]) == rows
    assert tunewright("data", "checkout", "0000", "-p", project).code == 2


@pytest.mark.parametrize("form", ["chat", "csv", "alpaca", "parquet"])
def test_export_added_to_another_project_creates_the_same_version(
    form: str, project: Path, tmp_path: Path, tiny_base_folder: Path
) -> None:
    out = tmp_path / f"out.{form}"
    assert _run(project, "export", out, "--format", form)["rows"] == 120
    assert tunewright("data", "export", out, "--format", form, "-p", project).code == 2, "it is there already"
    other = tiny_project(tmp_path / "other", tiny_base_folder)
    columns = ["--input", "prompt", "--output", "completion"] if form == "csv" else []
    _run(other, "add", out, *columns)
    assert _run(other, "log")["versions"][0]["digest"] == _run(project, "log")["versions"][0]["digest"]


def test_export_refuses_an_unknown_format_and_lists_the_known_ones(project: Path, tmp_path: Path) -> None:
    ran = tunewright("data", "export", tmp_path / "out", "--format", "xlsx", "-p", project)
    assert (ran.code, "parquet" in ran.stderr) == (2, True)


def test_pull_restores_a_pushed_dataset(project: Path, tmp_path: Path, tiny_base_folder: Path) -> None:
    _, head = _more(project)
    shared = tmp_path / "shared"
    pushed = _run(project, "push", str(shared))
    assert (len(pushed["versions"]), pushed["head"]) == (2, head)
    assert _run(project, "push", str(shared))["versions"] == []
    other = tiny_project(tmp_path / "other", tiny_base_folder)
    assert _run(other, "pull", str(shared))["head"] == head
    here, there = ([v["digest"] for v in _run(p, "log")["versions"]] for p in (project, other))
    assert here == there
    assert _run(other, "verify")["ok"]


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


def test_leakage_measures_every_held_out_row(project: Path) -> None:
    document = _run(project, "leakage")
    held_out = sum(sum(document["histogram"][split]) for split in ("dev", "test"))
    assert held_out == document["held_out"] == 24
    assert all(row["similarity"] < 0.8 for row in document["nearest"])
    assert "in a random split" in tunewright("data", "leakage", "-p", project).stdout


def test_check_lists_faults_with_codes_and_fixes_a_copy(project: Path, tmp_path: Path) -> None:
    rows: list[Any] = [*pairs(30), {"prompt": "a"}, {"messages": [{"role": "user", "content": "x"}]}, 7]
    path = write_jsonl(tmp_path / "new.jsonl", rows)
    document = _run(project, "check", path, code=2)
    assert [fault["line"] for fault in document["faults"]] == [31, 32, 33]
    assert all(fault["code"].startswith("E") for fault in document["faults"])
    fixed = tmp_path / "fixed.jsonl"
    changes = _run(project, "check", path, "--fix", fixed)["changes"]
    assert [c["line"] for c in changes if c["left_out"]] == [31, 32, 33]
    assert path.read_text().count("\n") == 33
    assert _run(project, "check", fixed)["ok"]
    wrong: list[list[str | Path]] = [
        [path, path, "--fix", tmp_path / "b"],
        ["--fix", tmp_path / "b"],
        [path, "--fix", path],
    ]
    for arguments in wrong:
        assert tunewright("data", "check", *arguments, "-p", project).code == 2


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


def test_add_refuses_a_new_conflict_unless_accepted(project: Path) -> None:
    row = _run(project, "show", "pairs.jsonl:7")
    asked = row["messages"][-2]["content"]
    file = write_jsonl(project / "conflict.jsonl", [{"prompt": asked, "completion": "quite another answer"}])
    refused = _run(project, "add", file, code=2)
    assert "1 input with different outputs" in refused["error"]["what"]
    assert "conflict.jsonl:1" in refused["error"]["what"]
    accepted = _run(project, "add", file, "--accept-conflicts")
    assert (accepted["added"], accepted["version"]["counts"]["conflicts"]) == (1, 1)


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
    missing = _run(project, "leakage", "--against", project / "nowhere.jsonl", code=2)
    assert "nowhere.jsonl" in missing["error"]["where"]


def test_show_reports_groups_and_mix_in_of_a_row(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    data = "data:\n  group_by: [customer]\n  mix: {source: generic.jsonl, fraction: 0.1}\n"
    config.write_text(config.read_text().replace("data:\n", data))
    write_jsonl(folder / "grouped.jsonl", [{**pair, "customer": f"c{i}"} for i, pair in enumerate(pairs(60))])
    write_jsonl(folder / "generic.jsonl", pairs(30, seed=8))
    added = _run(folder, "add", folder / "grouped.jsonl")
    assert _run(folder, "show", "grouped.jsonl:5")["groups"] == ["customer=c4"]
    assert "customer=c4" in tunewright("data", "show", "grouped.jsonl:5", "-p", folder).stdout
    drawn = added["version"]["mix"]["drawn"]
    lines = [tunewright("data", "show", f"generic.jsonl:{n}", "-p", folder, "--json") for n in range(1, 31)]
    shown = [ran.document for ran in lines if ran.code == 0]
    assert sum(document["mixed"] for document in shown) == drawn == 5
    assert "mixed in" in tunewright("data", "log", "-p", folder).stdout


def _queries(count: int, templates: int) -> list[Any]:
    texts = [row["prompt"] for row in pairs(count)]
    return [
        {"prompt": text, "completion": f'select c{"xyzuvw"[i % 6] * (1 + i % templates // 6)} from t where a = "{i}"'}
        for i, text in enumerate(texts)
    ]


def test_leakage_reports_output_and_template_overlap_against_chance(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    added = _run(folder, "add", write_jsonl(folder / "queries.jsonl", _queries(240, 24)))
    assert added["outputs"]["high"]
    document = _run(folder, "leakage")["outputs"]
    assert [each["how"] for each in document["overlaps"]] == ["identical", "template", "near"]
    assert (document["templates"], document["natural"], document["high"]) == (24, None, True)
    assert document["overlaps"][1]["here"] == 1
    shown = tunewright("data", "leakage", "-p", folder).stdout
    assert "Test rows with the same output template in training: 100.0% here, 100.0% in a random split" in shown


def test_add_reports_last_the_excluded_rows_and_reasons(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    (folder / "items.jsonl").write_text(json.dumps(pairs(120)[5]["prompt"]) + "\n")
    config = folder / "tunewright.yaml"
    config.write_text(
        config.read_text().replace("data:\n", "data:\n  contaminated: drop\n  benchmarks: [items.jsonl]\n")
    )
    ran = tunewright("data", "add", folder / "pairs.jsonl", "-p", folder)
    assert ran.code == 0
    assert "1 left out as holding a test input or a benchmark item" in " ".join(ran.stdout.split())
