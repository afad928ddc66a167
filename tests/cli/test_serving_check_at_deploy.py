"""Nothing goes live whose answers through the engine differ from the trained model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import Ran, pairs, tiny_project, tunewright, without_state, write_jsonl
from factories import make_evidence, make_items
from planted_bugs import LateBase, WrongScale
from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter, list_adapters
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.engines import peft
from tunewright.evaluation.access_log import AccessLog
from tunewright.open_project import OpenProject
from tunewright.serving.releases import ReleaseGate
from tunewright.serving.serve import open_state
from tunewright.serving.tenants import ServingCheck

SHIPS = make_evidence(make_items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project whose answers are JSON, with an adapter whose evaluation says ship."""
    folder = tiny_project(tmp_path_factory.mktemp("serving-check") / "project", tiny_base_folder)
    rows = [{**row, "completion": json.dumps({"first": row["completion"]})} for row in pairs(120)]
    write_jsonl(folder / "pairs.jsonl", rows)
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 4"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert tunewright("train", "-p", folder).code == 0
    (adapter,) = list_adapters(folder / "adapters")
    lineage = SHIPS.lineage | {
        "created": "2026-11-01T10:00:00+00:00",
        "adapter": {"name": adapter.name, "digest": adapter.digest, "lineage": adapter.lineage},
    }
    stored = SHIPS.model_copy(update={"id": f"{1:012x}", "lineage": lineage})
    evaluations = folder / "evaluations"
    AccessLog(evaluations).write(evaluations / stored.id / "evidence.json", stored.model_dump_json())
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    folder = without_state(trained, tmp_path / "project")
    (folder / "evaluations").symlink_to(trained / "evaluations")
    return folder


def _run(project: Path, *arguments: str) -> Ran:
    return tunewright(*arguments, "-p", project)


def _deploy(project: Path, *options: str) -> Ran:
    return _run(project, "deploy", "courts", _adapter(project).name, *options, "--json")


def _adapter(project: Path) -> Adapter:
    (adapter,) = list_adapters(project / "adapters")
    return adapter


def _document(project: Path, *arguments: str) -> Any:
    ran = _run(project, *arguments, "--json")
    assert ran.code == 0, ran.stderr
    return ran.document


def test_deploy_stores_the_serving_check_of_adapter_identity_and_merged_model(project: Path) -> None:
    ran = _deploy(project)
    assert ran.code == 0, ran.stderr
    check = ran.document["serving"]
    assert ran.document["release"]["grounds"]["serving"] == check
    assert (check["engine"], check["adapter"], check["reasons"]) == ("peft", _adapter(project).digest, [])
    assert [figures["served"] for figures in check["figures"]] == ["adapter", "identity", "merged"]
    own, identity, merged = check["figures"]
    for figures in (own, identity, merged):
        assert figures["prompts"] == figures["formed"] > 5, "every ideal answer is JSON"
        assert figures["places"] > 4 * figures["prompts"]
        # In float32 only the order of additions differs.
        assert 0 <= figures["kl"]["value"] < 1e-5
        assert figures["kl"]["low"] <= figures["kl"]["value"] <= figures["kl"]["high"]
        assert (figures["same"]["value"], figures["wrong"]["value"]) == (1.0, 0.0)
        assert figures["same"]["low"] < 0.95, "few answers prove little"
        assert figures["well_formed"] == figures["trained_well_formed"]
        assert figures["change"]["low"] < 0 < figures["change"]["high"]
    assert own["effect"] == pytest.approx(merged["effect"])
    assert own["effect"] > 0.01
    assert identity["effect"] == 0
    shown = _run(project, "releases").stdout
    assert "passed" in shown
    assert "100% the same" in shown
    assert _document(project, "audit", "verify")["ok"]
    _document(project, "undeploy", "courts")
    again = _deploy(project)
    assert again.document["serving"] == check
    assert "Serving check: passed on peft on" in again.stderr
    assert "and not run again" in again.stderr


def test_serving_check_of_an_imported_adapter_has_a_merged_model_too(project: Path, tmp_path: Path) -> None:
    adapters = project / "adapters"
    trained = adapters.resolve()
    adapters.unlink()
    shutil.copytree(trained, adapters)
    stock = tmp_path / "stock"
    stock.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(_adapter(project).folder / name, stock / name)
    config = json.loads((stock / CONFIG).read_text(encoding="utf-8"))
    (stock / CONFIG).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}), encoding="utf-8")
    name = _document(project, "adapters", "import", str(stock), "--base-matches", "--unsigned")["adapter"]
    ran = _run(project, "deploy", "courts", name, "--force", "--because", "a foreign adapter", "--json")
    assert ran.code == 0, ran.stderr
    check = ran.document["serving"]
    assert ([figures["served"] for figures in check["figures"]], check["left_out"]) == (
        ["adapter", "identity", "merged"],
        None,
    )
    merged = check["figures"][-1]
    assert merged["kl"]["value"] < 1e-3, "its weights are rounded to bfloat16"


@pytest.mark.slow
def test_deploy_refuses_an_engine_that_loses_the_adapter_in_long_answers(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft, "PeftEngine", LateBase)
    ran = _deploy(project)
    assert (ran.code, ran.document["release"]) == (3, None), ran.stderr
    assert ran.document["isolation"]["verdict"] == "isolated", "its answers are too short to see it"
    check = ran.document["serving"]
    assert any("the adapter: " in reason and "go another way" in reason for reason in check["reasons"])
    assert not any(reason.startswith("the identity adapter") for reason in check["reasons"])
    assert _document(project, "releases")["releases"] == []
    (line,) = _document(project, "audit", "show")["lines"]
    assert (line["action"], line["subject"]) == ("serving.refused", "courts")
    shown = _run(project, "deploy", "courts", _adapter(project).name)
    assert shown.code == 3
    assert "does NOT answer as the trained model does" in shown.stdout
    assert "courts is unchanged" in shown.stdout

    forced = _deploy(project, "--force", "--because", "the answers are short")
    assert forced.code == 0
    assert "although the serving check failed" in forced.stderr
    assert forced.document["release"]["grounds"]["serving"]["reasons"] == check["reasons"]
    assert "failed" in _run(project, "releases").stdout


def test_serving_check_fails_on_an_engine_that_scales_the_adapter_wrongly(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft, "PeftEngine", WrongScale)
    check = _checked(project)
    assert any(reason.startswith("the adapter: KL from the trained model") for reason in check.reasons)
    own, identity, merged = check.figures
    assert own.kl is not None and identity.kl is not None and merged.kl is not None
    # Half of every change is missing: more than the 2% that may be lost.
    assert 0.03 < own.kl.value / own.effect < 0.5
    assert max(identity.kl.high, merged.kl.high) < 1e-5, "the fault is in the adapter's way alone"


@pytest.mark.slow
def test_deploy_checks_with_general_questions_without_a_dataset(project: Path) -> None:
    shutil.rmtree(project / "dataset")
    ran = _deploy(project, "--force", "--because", "no evidence here")
    assert ran.code == 0, ran.stderr
    assert "the serving check asks general questions" in ran.stderr
    assert {figures["formed"] for figures in ran.document["serving"]["figures"]} == {0}


def _checked(project: Path) -> ServingCheck:
    """Run the check without the isolation test."""
    opened = OpenProject(ProjectFolder(project), LogReporter())
    with open_state(opened, make=True) as state:
        return ReleaseGate(opened, state, "courts", _adapter(project), None).serving_check()
