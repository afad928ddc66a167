"""Items with several references each, and items whose outputs are made from templates, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from making.command_line import evaluation_of, pairs, tiny_project, tunewright, write_jsonl
from tunewright.data.examples import output_template
from tunewright.data.versions import load_version

pytestmark = pytest.mark.slow


def test_evaluate_counts_inputs_and_keeps_every_items_references(tmp_path: Path, tiny_base_folder: Path) -> None:
    """40 inputs with three references each."""
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    rows = [
        {"prompt": row["prompt"], "completion": f"{row['completion']} in words {n} of this {row['prompt']}"}
        for row in pairs(40)
        for n in range(3)
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    config = folder / "tunewright.yaml"
    data = "sources: [pairs.jsonl]\n  conflicts: accept\n  test_size: 0.25"
    text = config.read_text().replace("sources: [pairs.jsonl]", data).replace("epochs: 2", "epochs: 1")
    config.write_text(text.replace("evaluate:\n", "evaluate:\n  metric: bleu\n"))
    ran = tunewright("run", "--project", folder)
    assert ran.code in {0, 3, 4}, ran.stderr
    evidence, items = evaluation_of(folder)
    inputs = {item["input"] for item in items}
    assert evidence["references"] == {
        "items": len(items),
        "inputs": len(inputs),
        "several": len(inputs),
        "references": len(items),
    }
    assert len(items) == 3 * len(inputs)
    for item in items:
        same = {other["reference"] for other in items if other["input"] == item["input"]}
        assert {item["reference"], *item["other_references"]} == same
        # Equal prompts have equal answers and the same references: so they score the same.
        assert len({json.dumps(o["scores"]) for o in items if o["input"] == item["input"]}) == 1
    assert evidence["noise_floor"]["items"] == len(inputs)
    assert "nrefs:var" in evidence["metrics"]["bleu"]["definition"]
    message = (
        f"{len(items)} test items, {len(inputs)} distinct inputs with 3.0 references each: an answer is scored by all"
    )
    assert message in " ".join(ran.stderr.split())


COLUMNS = ["city", "river", "state", "peak", "lake", "road", "town", "port"]


def test_evaluate_scores_items_with_a_new_output_template_apart(tmp_path: Path, tiny_base_folder: Path) -> None:
    """Unlike questions, and queries of some templates with a value each; a few templates are of one row."""
    project = tiny_project(tmp_path / "project", tiny_base_folder)
    rows = [
        {"prompt": row["prompt"], "completion": f'get {COLUMNS[n % 8]} of {COLUMNS[n % 7 % 2]} in "{n}"'}
        for n, row in enumerate(pairs(90))
    ]
    rows[::9] = [{**row, "completion": f"list {'very ' * n} old {COLUMNS[n % 8]}"} for n, row in enumerate(rows[::9])]
    write_jsonl(project / "pairs.jsonl", rows)
    ran = tunewright("run", "--project", project)
    assert ran.code in {0, 3, 4}, ran.stderr
    evidence, items = evaluation_of(project)
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
