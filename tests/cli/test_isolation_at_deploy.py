"""Nothing goes live that does not pass the isolation test, together with everything else that is live."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from making.command_line import Ran, document, trained_project, tunewright, without_state
from making.planted_bugs import LastSlot, StaleCache
from tunewright.adapters.registry import WEIGHTS, Adapter, list_adapters, store_adapter
from tunewright.engines import peft
from tunewright.engines.peft import PeftEngine

pytestmark = pytest.mark.slow

FORCED = ("--force", "--because", "what is tested here is isolation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with three trained adapters."""
    folder = trained_project(tmp_path_factory.mktemp("isolation") / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    text = config.read_text()
    for rate in ("0.006", "0.01"):
        config.write_text(text.replace("0.003", rate))
        assert tunewright("train", "-p", folder).code == 0
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return without_state(trained, tmp_path / "project")


def _adapters(project: Path) -> list[Adapter]:
    return list_adapters(project / "adapters")


def _run(project: Path, *arguments: str) -> Ran:
    return tunewright(*arguments, "-p", project)


def _deploy(project: Path, alias: str, adapter: Adapter, *options: str) -> Ran:
    return _run(project, "deploy", alias, adapter.name, *FORCED, *options, "--json")


def _live(project: Path) -> dict[str, str]:
    history = document(project, "releases")["releases"]
    return {release["alias"]: release["adapter"] for release in history}


def test_deploy_tests_a_release_with_all_live_adapters_and_stores_the_result(project: Path) -> None:
    first, second, third = _adapters(project)
    assert _deploy(project, "courts", first).code == 0
    done = _deploy(project, "recipes", second)
    assert done.code == 0, done.stderr
    test = done.document["release"]["grounds"]["isolation"]
    assert test == done.document["isolation"]
    assert (test["verdict"], test["engine"], test["tolerance"]) == ("isolated", "peft", 0.05)
    assert set(test["adapters"]) == {first.digest, second.digest}
    assert test["versions"]["torch"] == version("torch")
    assert [check["name"] for check in test["checks"]] == [
        "each alone",
        "all mixed",
        "the base in the mix",
        "prefixes warm",
        "evicted and reloaded",
        "a new version",
    ]
    assert all(check["asked"] and not check["wrong"] for check in test["checks"])
    # The candidate of a canary, what the alias answers with still, and the other alias's.
    assert set(_deploy(project, "courts", third, "--canary", "10%").document["isolation"]["adapters"]) == {
        first.digest,
        second.digest,
        third.digest,
    }
    message = _run(project, "releases").stdout
    assert "isolated" in message
    assert test["tested"][:16].replace("T", " ") in message
    assert document(project, "audit", "verify")["ok"]


@pytest.mark.parametrize(
    ("bug", "options"),
    [
        (LastSlot, ()),
        (LastSlot, ("--canary", "10%")),
        (StaleCache, ("--shadow",)),
    ],
    ids=["last slot", "last slot, canary", "stale cache, shadow"],
)
def test_deploy_releases_nothing_on_an_engine_that_mixes_adapters(
    project: Path, monkeypatch: pytest.MonkeyPatch, bug: type[PeftEngine], options: tuple[str, ...]
) -> None:
    first, second, _ = _adapters(project)
    assert _deploy(project, "courts", first).code == 0
    before = document(project, "releases")
    with monkeypatch.context() as planted:
        planted.setattr(peft, "PeftEngine", bug)
        ran = _deploy(project, "courts", second, *options)
        assert (ran.code, ran.document["release"]) == (3, None)
        assert ran.document["isolation"]["verdict"] == "not isolated"
        assert any(" got the answer of " in reason for reason in ran.document["isolation"]["reasons"])
        assert document(project, "releases") == before

        # What has failed cannot be let through by leaving the test out.
        ran = _run(project, "deploy", "courts", second.name, *FORCED, *options, "--untested", "no time")
        assert (ran.code, "The same adapters failed the isolation test" in ran.stderr) == (2, True)
        assert document(project, "releases") == before

        ran = _run(project, "deploy", "courts", second.name, *FORCED, *options)
        assert "NOT isolated" in ran.stdout
        assert "courts is unchanged" in ran.stdout
    refused = [line for line in document(project, "audit", "show")["lines"] if line["action"] == "isolation.refused"]
    assert [line["subject"] for line in refused] == ["courts", "courts"]
    assert json.loads(refused[0]["details"])["digest"] == second.digest
    assert "isolation test: not isolated on peft" in _run(project, "audit", "show").stdout
    assert document(project, "audit", "verify")["ok"]
    assert _deploy(project, "courts", second, *options).code == 0, "without the bug"


def test_deploy_repeats_the_test_only_for_a_changed_set(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = _adapters(project)
    _deploy(project, "courts", first)
    once = _deploy(project, "courts", second)
    monkeypatch.setattr(peft, "PeftEngine", LastSlot)  # whatever is tested from here on fails
    again = _deploy(project, "recipes", first)
    assert (again.code, "not run again" in again.stderr) == (0, True)
    assert again.document["isolation"] == once.document["isolation"]
    assert _deploy(project, "recipes", third).code == 3, "another adapter"
    config = (project / "tunewright.yaml").read_text()
    (project / "tunewright.yaml").unlink()
    (project / "tunewright.yaml").write_text(f"{config}serve:\n  max_num_seqs: 4\n")
    assert _deploy(project, "tickets", second).code == 3, "another engine"
    assert _live(project) == {"courts": second.name, "recipes": first.name}


def test_promote_reuses_the_candidates_test_until_another_release(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = _adapters(project)
    _deploy(project, "courts", first)
    canary = _deploy(project, "courts", second, "--canary", "10%").document
    promoted = document(project, "promote", "courts")
    assert promoted["release"]["adapter"] == second.name
    assert promoted["isolation"] == canary["isolation"]

    _deploy(project, "courts", first, "--shadow")
    document(project, "deploy", "recipes", third.name, *FORCED, "--untested", "to have it untested")
    before = document(project, "releases")
    with monkeypatch.context() as planted:
        planted.setattr(peft, "PeftEngine", LastSlot)
        ran = _run(project, "promote", "courts", "--json")
        assert (ran.code, ran.document["release"]) == (3, None)
        assert document(project, "releases") == before
        # The way back does not wait for a test.
        assert document(project, "rollback", "courts")["candidate"] is None
        assert document(project, "rollback", "courts")["adapter"] == first.name
    _deploy(project, "courts", second, "--shadow")
    assert document(project, "promote", "courts")["release"]["adapter"] == second.name


def test_deploy_untested_stores_the_reason(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = _adapters(project)
    monkeypatch.setattr(peft, "PeftEngine", LastSlot)
    ran = _deploy(project, "courts", first, "--untested", "the GPU holds one copy")
    assert (ran.code, ran.document["isolation"]) == (0, None)
    assert ran.document["release"]["grounds"]["untested"] == "the GPU holds one copy"
    assert "courts is released without the isolation test" in ran.stderr
    message = _run(project, "releases").stdout
    assert "left out" in message
    assert "courts 1 was not tested: the GPU holds one copy" in message
    assert "the GPU holds one copy" in document(project, "audit", "show")["lines"][0]["details"]
    ran = _deploy(project, "courts", second, "--untested", " ")
    assert (ran.code, "The reason is empty" in ran.stderr + ran.stdout) == (2, True)
    monkeypatch.undo()
    _deploy(project, "courts", second)
    assert "went live without the isolation test" in _run(project, "rollback", "courts").stderr


def test_deploy_refuses_indistinguishable_adapters_under_different_aliases(project: Path, trained: Path) -> None:
    first, second, _ = _adapters(project)
    # The same weights by other files: nobody can tell them apart.
    twin = _twin(project, first, trained)
    _deploy(project, "courts", first)
    ran = _deploy(project, "recipes", twin)
    assert (ran.code, ran.document["release"]) == (4, None)
    assert ran.document["isolation"]["alike"] == [sorted([first.name, twin.name])]
    assert _live(project) == {"courts": first.name}
    ran = _deploy(project, "courts", twin)
    assert ran.code == 0, ran.stderr
    assert "give the same answers to all probes" in ran.stderr
    assert ran.document["isolation"]["verdict"] == "can't tell"
    # The pair is known by now, and says nothing against another one.
    assert _deploy(project, "recipes", second).code == 0


def _twin(project: Path, adapter: Adapter, trained: Path) -> Adapter:
    """An adapter of another digest that says the same: its weights times 0.9999."""
    (project / "adapters").unlink()
    shutil.copytree(trained / "adapters", project / "adapters")
    scaled = project / "scaled"
    shutil.copytree(adapter.folder, scaled)
    weights = load_file(scaled / WEIGHTS)
    save_file({name: 0.9999 * w if ".lora_B." in name else w for name, w in weights.items()}, scaled / WEIGHTS)
    lineage = {**adapter.lineage, "inputs_digest": "0" * 64}
    return store_adapter(project / "adapters", "twin", scaled, {}, lineage, [], servable=True)
