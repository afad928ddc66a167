"""Outputs made from templates, through the command line: evaluated held-out and in folds, judged and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import pairs, tiny_project, tunewright, write_jsonl
from tunewright.data.examples import output_template
from tunewright.data.versions import load_version

pytestmark = pytest.mark.slow

COLUMNS = ["city", "river", "state", "peak", "lake", "road", "town", "port"]


def _query_project(folder: Path, base: Path) -> Path:
    """Unlike questions, and queries of some templates with a value each; a few templates are of one row."""
    tiny_project(folder, base)
    texts = [row["prompt"] for row in pairs(90)]
    rows = [
        {"prompt": text, "completion": f'get {COLUMNS[n % 8]} of {COLUMNS[n % 7 % 2]} in "{n}"'}
        for n, text in enumerate(texts)
    ]
    rows[::9] = [{**row, "completion": f"list {'very ' * n} old {COLUMNS[n % 8]}"} for n, row in enumerate(rows[::9])]
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project after one run of the whole pipeline."""
    folder = _query_project(tmp_path_factory.mktemp("templates") / "project", tiny_base_folder)
    ran = tunewright("run", "--project", folder)
    assert ran.code in {0, 3, 4}, ran.stderr
    return folder


def _evaluation(project: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (folder,) = (p for p in (project / "evaluations").iterdir() if p.is_dir())
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    return json.loads((folder / "evidence.json").read_text()), items


def test_evaluate_scores_items_with_a_new_output_template_apart(project: Path) -> None:
    evidence, items = _evaluation(project)
    members = load_version(project / "dataset").members
    known = {output_template(m.example.output) for m in members if m.split == "train"}
    assert [item["new_template"] for item in items] == [output_template(i["reference"]) not in known for i in items]
    found = evidence["output_templates"]
    for name, wanted in (("seen", False), ("new", True)):
        some = [item for item in items if item["new_template"] == wanted]
        assert bool(some) == (found[name] is not None)
        for arm, score in (found[name] or {"scores": {}})["scores"].items():
            right = sum(item["answers"][arm].strip() == item["reference"] for item in some)
            assert score["value"] == right / len(some)
    message = tunewright("verdict", "--project", project, "--json").document["reasons"]
    share = sum(not item["new_template"] for item in items) / len(items)
    assert share >= 0.5
    assert sum("have an output template seen in training" in r or "every test item" in r for r in message) == 1
    assert 'aria-labelledby="output-templates"' in next(project.glob("evaluations/*/report.html")).read_text()


def test_evaluate_dev_scores_dev_items_by_template_and_distance(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "project"))
    assert tunewright("evaluate", "--dev", "-p", copy).code == 0
    (folder,) = (copy / "evaluations").glob("dev-*/")
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    evidence = json.loads((folder / "evidence.json").read_text())
    members = load_version(copy / "dataset").members
    known = {output_template(m.example.output) for m in members if m.split == "train"}
    assert [item["new_template"] for item in items] == [output_template(i["reference"]) not in known for i in items]
    assert all(0 <= item["nearest"] <= 1 for item in items)
    parts = [part["items"] for part in (evidence["output_templates"][name] for name in ("seen", "new")) if part]
    assert sum(parts) == sum(band["items"] for band in evidence["train_similarity"]["bands"]) == len(items)
    message = tunewright("verdict", folder.name, "-p", copy, "--json").document["reasons"]
    assert sum("dev items have an output template seen in training" in r or "every dev item" in r for r in message) == 1
    assert tunewright("report", folder.name, "-p", copy).code == 0
    assert "The dev items by whether" in (folder / "report.html").read_text()


def test_leakage_scores_an_evaluation_by_output_template(project: Path) -> None:
    _, items = _evaluation(project)
    (folder,) = (p for p in (project / "evaluations").iterdir() if p.is_dir())
    found = tunewright("data", "leakage", folder, "-p", project, "--json").document["templates"]
    assert {score["template"] for score in found} == {"new" if item["new_template"] else "seen" for item in items}
    assert {score["arm"] for score in found} == set(items[0]["answers"])
    for score in found:
        some = [item for item in items if item["new_template"] == (score["template"] == "new")]
        right = sum(item["answers"][score["arm"]].strip() == item["reference"] for item in some)
        assert (score["items"], score["exact"], score["exact_match"]) == (len(some), right, right / len(some))
    shown = tunewright("data", "leakage", folder, "-p", project).stdout
    words = {"seen": "output template in training", "new": "new output template"}
    for score in found:
        assert f"{score['arm']}, {words[score['template']]}: {score['exact']} of {score['items']} exact" in shown
    assert tunewright("data", "leakage", "-p", project, "--json").document["templates"] == []


@pytest.mark.slow
def test_crossval_scores_items_by_the_templates_of_their_own_fold(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = _query_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    ran = tunewright("crossval", "--folds", "3", "-p", folder)
    assert ran.code == 0, ran.stderr
    evidence, items = _evaluation(folder)
    alone = [
        item
        for item in items
        if sum(output_template(i["reference"]) == output_template(item["reference"]) for i in items) == 1
    ]
    assert alone
    assert all(item["new_template"] for item in alone)
    assert evidence["output_templates"]["new"]["items"] == sum(item["new_template"] for item in items)
