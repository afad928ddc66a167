"""Outputs made from templates, through the command line: evaluated held-out and in folds, judged and reported."""

from __future__ import annotations

import json
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
