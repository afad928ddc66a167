"""Nothing goes live whose answers through the engine differ from the trained model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from making.command_line import (
    Ran,
    document,
    pairs,
    store_evidence,
    tiny_project,
    tunewright,
    without_state,
    write_jsonl,
)
from making.evidence import make_evidence, make_items
from making.planted_bugs import LateBase, WrongScale
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.engines import peft
from tunewright.gate.results import ServingCheck
from tunewright.open_project import OpenProject
from tunewright.serving.releases import ReleaseGate
from tunewright.serving.serve import open_state

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
    store_evidence(folder, adapter, SHIPS)
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
    assert document(project, "audit", "verify")["ok"]
    document(project, "undeploy", "courts")
    again = _deploy(project)
    assert again.document["serving"] == check
    assert "Serving check: passed on peft on" in again.stderr
    assert "and not run again" in again.stderr


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
    assert document(project, "releases")["releases"] == []
    (line,) = document(project, "audit", "show")["lines"]
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


def _checked(project: Path) -> ServingCheck:
    """Run the check without the isolation test."""
    opened = OpenProject(ProjectFolder(project), LogReporter())
    with open_state(opened, make=True) as state:
        return ReleaseGate(opened, state, "courts", _adapter(project), None).serving_check()
