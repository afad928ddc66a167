"""Metrics through the command line: one of the project's own decides, others are also measured, on a tiny base."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tiny_project, tunewright
from tunewright.evidence.statistics import holm

pytestmark = pytest.mark.slow

# Some items cannot be scored: those whose question has an even number.
SCORING = """
def shared_letters(answer, reference, example):
    if int(example.input_text.split()[-1]) % 2 == 0:
        return None
    return len(set(answer) & set(reference)) / len(set(answer) | set(reference))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project after one run of the pipeline with a custom metric."""
    folder = tiny_project(tmp_path_factory.mktemp("metrics") / "project", tiny_base_folder)
    config = (folder / "tunewright.yaml").read_text()
    colours = "[red, green, blue, amber, violet, ochre, teal, navy, olive, coral]"
    config = config.replace(
        "  num_fewshot: [1, 2]\n",
        "  num_fewshot: [1]\n  metric: {python: 'scoring:shared_letters'}\n"
        f"  extra_metrics: [exact_match, {{choices: {colours}}}, chrf]\n",
    )
    (folder / "tunewright.yaml").write_text(config)
    (folder / "scoring.py").write_text(SCORING)
    ran = tunewright("run", "-p", folder, "--json")
    assert ran.code in {0, 3, 4}, ran.stderr
    return folder


def _evaluated(project: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    document = tunewright("evaluate", "-p", project, "--json").document
    assert document["evaluated"] is False
    lines = (Path(document["folder"]) / "items.jsonl").read_text().split("\n")
    return document["evidence"], [json.loads(line) for line in lines if line]


def test_custom_metric_decides_and_others_are_reported(project: Path) -> None:
    evidence, _ = _evaluated(project)
    own = "python scoring:shared_letters"
    assert evidence["metric"] == own
    assert set(evidence["metrics"]) == {own, "exact_match", "choices", "chrf"}
    assert "SHA-256" in evidence["metrics"][own]["definition"]
    first, *others = [list(group) for _, group in groupby(evidence["contrasts"], key=lambda c: c["metric"])]
    assert {c["metric"] for c in first} == {own}, "the deciding metric's come first"
    assert all(c["p_adjusted"] >= c["p_value"] for c in first)
    assert [c["p_adjusted"] for c in first] == holm([c["p_value"] for c in first])
    assert len(others) == 3
    assert all(c["p_adjusted"] is None for group in others for c in group)


def test_items_and_arms_agree_on_every_metric_and_on_what_is_unscored(project: Path) -> None:
    evidence, items = _evaluated(project)
    even = [item for item in items if int(item["input"].split()[-1]) % 2 == 0]
    assert 0 < len(even) < len(items)
    for arm in evidence["arms"]:
        for metric, score in arm["scores"].items():
            values = [i["scores"][metric][arm["name"]] for i in items if arm["name"] in i["scores"][metric]]
            assert len(values) == score["scored"] == len(items) - sum(score["unscored"].values())
            if metric != "chrf":
                assert score["value"] == pytest.approx(sum(values) / len(values))
        own = arm["scores"]["python scoring:shared_letters"]
        assert own["unscored"] == {"scoring:shared_letters returned None": len(even)}
    assert evidence["contrasts"][0]["scored"] == len(items) - len(even)


def test_custom_metric_selects_the_checkpoint(project: Path) -> None:
    ran = tunewright("train", "-p", project, "--json")
    assert ran.document["trained"] is False
    assert ran.document["metric"] == "python scoring:shared_letters"
    scores = [epoch["dev_metric"] for epoch in ran.document["epochs"]]
    kept = next(e for e in ran.document["epochs"] if e["step"] == ran.document["kept_step"])
    assert kept["dev_metric"] == max(scores)


def test_evaluate_refuses_a_metric_that_fails_or_scores_nothing(project: Path, tmp_path: Path) -> None:
    config = (project / "tunewright.yaml").read_text()
    for name in ("pairs.jsonl", "scoring.py"):
        (tmp_path / name).write_text((project / name).read_text())
    for metric, what in (
        ("{python: 'scoring:none_such'}", "no function 'none_such'"),
        ("json", "No item can be scored by json"),
    ):
        text = config.replace("{python: 'scoring:shared_letters'}", metric)
        (tmp_path / "tunewright.yaml").write_text(text)
        tunewright("data", "add", tmp_path / "pairs.jsonl", "-p", tmp_path)
        ran = tunewright("train", "-p", tmp_path)
        assert (ran.code, what in " ".join(ran.stderr.split())) == (2, True), ran.stderr
        assert not (tmp_path / "adapters").exists()
