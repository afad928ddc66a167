"""Inputs with several references, through the command line: trained, evaluated, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import Ran, pairs, tiny_project, tunewright, write_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, Ran]:
    """A project of 40 inputs with three references each, and what `run` printed."""
    folder = tiny_project(tmp_path_factory.mktemp("references") / "project", tiny_base_folder)
    rows = [
        {"prompt": row["prompt"], "completion": f"{row['completion']} in words {n} of this {row['prompt']}"}
        for row in pairs(40)
        for n in range(3)
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace(
        "sources: [pairs.jsonl]", "sources: [pairs.jsonl]\n  conflicts: accept\n  test_size: 0.25"
    )
    config.write_text(text.replace("epochs: 2", "epochs: 1").replace("evaluate:\n", "evaluate:\n  metric: bleu\n"))
    found = tunewright("run", "--project", folder)
    assert found.code in {0, 3, 4}, found.stderr
    return folder, found


def _folder(project: Path) -> Path:
    (folder,) = (p for p in (project / "evaluations").iterdir() if p.is_dir() and (p / "evidence.json").exists())
    return folder


def _evaluation(project: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = _folder(project)
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    return json.loads((folder / "evidence.json").read_text()), items


def test_evaluate_counts_inputs_and_keeps_every_items_references(ran: tuple[Path, Ran]) -> None:
    evidence, items = _evaluation(ran[0])
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
    assert message in " ".join(ran[1].stderr.split())
