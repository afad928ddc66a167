"""The test split is opened once, and each further opening is reported: through the command line, on a tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tunewright as package
from making.command_line import pairs, trained_project, tunewright, write_jsonl
from tunewright.evaluation.access_log import ACCESS_LOG

pytestmark = pytest.mark.slow

FAST = "  static_seeds: 1\n  retrievers: [bm25]\n"


def add_keys(project: Path, text: str) -> None:
    """Add keys to the config's evaluate section."""
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("  num_fewshot: [1, 2]\n", f"  num_fewshot: [1, 2]\n{text}"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter, its test split closed."""
    folder = trained_project(tmp_path_factory.mktemp("access-log") / "project", tiny_base_folder)
    add_keys(folder, FAST)
    assert package.open(folder).prompting().measured
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "project"))


def openings(project: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tunewright("access-log", "-p", project, "--json").document["openings"]
    return found


def test_evaluate_declares_the_contrast_before_building_test_prompts(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunewright.evaluation.arm_runner import ArmRunner

    def answers(*_: object) -> None:
        lines = [json.loads(text) for text in (project / "evaluations" / ACCESS_LOG).read_text().splitlines()]
        assert [line["event"] for line in lines] == ["written", "opened"]
        assert lines[1]["declared"][0]["control"]
        raise KeyboardInterrupt

    monkeypatch.setattr(ArmRunner, "answer_arms", answers)
    assert tunewright("evaluate", "-p", project).code == 130
    (opening,) = openings(project)
    monkeypatch.undo()
    evidence = tunewright("evaluate", "-p", project, "--json").document["evidence"]
    # Resuming after a stop is the same opening, and what was declared is what is measured.
    assert openings(project) == [opening] == [evidence["opening"]]
    declared = [(each["treatment"], each["control"]) for each in opening["declared"]]
    free = evidence["free"]["best"]  # compared by non-inferiority, apart from the contrasts
    compared = [(c["treatment"], c["control"]) for c in evidence["contrasts"]]
    assert declared == [*compared, (free, "tuned"), (free, evidence["best_prompting"])]
    assert (opening["declared"][0]["treatment"], opening["declared"][0]["margin"]) == ("tuned", 0.02)
    assert opening["adapter_digest"] == evidence["lineage"]["adapter"]["digest"]
    assert opening["test_split"] == evidence["lineage"]["test_split"]
    assert evidence["openings"] == []


def test_ledger_records_an_opening_for_new_settings_only(project: Path) -> None:
    message = tunewright("evaluate", "-p", project).stderr
    assert "The test split is opened (line 2 of access_log.jsonl). Declared: tuned against" in " ".join(message.split())
    assert tunewright("evaluate", "-p", project).code == 0
    assert tunewright("verdict", "-p", project).code in {0, 3, 4}
    assert len(openings(project)) == 1
    add_keys(project, "  margin: 0.05\n")
    ran = tunewright("evaluate", "-p", project)
    assert "had been opened once before this" in " ".join(ran.stderr.split())
    assert [each["declared"][0]["margin"] for each in openings(project)] == [0.02, 0.05]
    evidence = tunewright("evaluate", "-p", project, "--json").document["evidence"]
    (earlier,) = evidence["openings"]
    assert (earlier["number"], earlier["shared_items"]) == (2, evidence["items"])
    reasons = tunewright("verdict", "-p", project, "--json").document["reasons"]
    assert any("had been opened once before this" in reason for reason in reasons)
    # Back to the first margin: that evidence is there, and the newer one is what `verdict` would take.
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("  margin: 0.05\n", ""))
    back = tunewright("evaluate", "-p", project)
    assert f"{evidence['id']} is newer" in " ".join(back.stderr.split())
    assert len(openings(project)) == 2


def test_verdict_and_evaluate_refuse_a_changed_ledger_line(project: Path) -> None:
    assert tunewright("evaluate", "-p", project).code == 0
    file = project / "evaluations" / ACCESS_LOG
    whole = file.read_text()
    file.write_text(whole.replace('"margin":0.02', '"margin":0.01'))
    for command in ("verdict", "evaluate", "access-log", "crossval"):
        ran = tunewright(command, "-p", project, "--json")
        assert (ran.code, ran.document["error"]["where"]) == (2, f"{file}:2"), command
    file.unlink()
    ran = tunewright("verdict", "-p", project, "--json")
    assert (ran.code, ran.document["error"]["what"].split(":")[0]) == (2, "Line 2 is missing")
    file.write_text(whole)
    assert tunewright("verdict", "-p", project).code in {0, 3, 4}


def test_commands_refuse_edited_evidence_items_and_advice(project: Path, tmp_path: Path) -> None:
    folder = Path(tunewright("evaluate", "-p", project, "--json").document["folder"])
    (advice,) = folder.parent.glob("advice-*.json")
    every = ("verdict", "report", "evaluate", "access-log")
    for file, commands in ((folder / "evidence.json", every), (folder / "items.jsonl", every), (advice, ["evaluate"])):
        whole = file.read_text()
        file.write_text(whole.replace('"zero-shot"', '"zero-shop"'))
        assert file.read_text() != whole
        for command in commands:
            ran = tunewright(command, "-p", project, "--json")
            assert (ran.code, ran.document["error"]["where"]) == (2, str(file)), (command, ran.stderr)
            assert "was changed after it was written" in ran.document["error"]["what"]
        file.write_text(whole)
    # A copy elsewhere has no log of its own, and says so.
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))
    ran = tunewright("verdict", copy, "-p", project)
    assert ran.code in {0, 3, 4}
    assert "no access log shows that it was not changed" in " ".join(ran.stderr.split())
    assert tunewright("evaluate", "--dev", "-p", project).code == 0
    assert "is missing" not in tunewright("verdict", "-p", project).stderr
    shutil.rmtree(folder)
    (dev,) = folder.parent.glob("dev-*")
    shutil.rmtree(dev)
    shutil.copytree(copy, folder)
    missing = f"The evidence of evaluation {dev.name} is missing. {folder.name}, which is older, is used instead."
    assert missing in " ".join(tunewright("verdict", "-p", project).stderr.split())
    # Removed as the message says, the evaluation is measured again, from the answers that there are.
    shutil.rmtree(folder)
    assert tunewright("evaluate", "-p", project, "--json").document["evaluated"] is True
    assert tunewright("verdict", "-p", project).code in {0, 3, 4}
    assert len(openings(project)) == 1


def test_verdict_warns_of_rows_opened_by_an_earlier_version(project: Path, tmp_path: Path) -> None:
    assert tunewright("evaluate", "-p", project).code == 0
    first = openings(project)[0]["items"]
    more = write_jsonl(tmp_path / "more.jsonl", [{**p, "prompt": f"more {p['prompt']}"} for p in pairs(60, seed=9)])
    assert tunewright("data", "add", more, "-p", project).code == 0
    assert tunewright("train", "-p", project).code == 0
    evidence = tunewright("evaluate", "-p", project, "--json").document["evidence"]
    assert evidence["items"] > first
    assert [each["shared_items"] for each in evidence["openings"]] == [first]
    assert len({each["test_split"] for each in openings(project)}) == 2


def test_crossval_opens_the_test_split_too(project: Path) -> None:
    assert tunewright("crossval", "--folds", "2", "--force", "-p", project).code == 0
    (opening,) = openings(project)
    assert (opening["design"], opening["adapter"], opening["items"]) == ("cross-fitted", None, 120)
    evidence = tunewright("evaluate", "-p", project, "--json").document["evidence"]
    assert [each["shared_items"] for each in evidence["openings"]] == [evidence["items"]]
