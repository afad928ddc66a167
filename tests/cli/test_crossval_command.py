"""``crossval`` through the command line, on a tiny base: seen rows, resuming after a kill, and suspects."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from making.command_line import evaluation_of, tiny_project, tunewright, write_jsonl
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.data.examples import Example, Message
from tunewright.data.versions import load_version
from tunewright.evaluation.access_log import ACCESS_LOG

pytestmark = pytest.mark.slow

FOLDS = 3


def families(count: int, size: int = 3, seed: int = 0) -> list[dict[str, str]]:
    """Free-text pairs in families of nearly equal inputs, each of which has another answer."""
    generator = random.Random(seed)
    names = ["".join(generator.choices("abcdefghijklmnop", k=40)) for _ in range(count)]
    return [{"prompt": f"{name} {n}", "completion": f"{name[:4]} {n}"} for name in names for n in range(size)]


def family_project(folder: Path, base: Path) -> Path:
    """A project of 90 rows in 30 clusters, added."""
    tiny_project(folder, base)
    write_jsonl(folder / "pairs.jsonl", families(30))
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def crossvalidated(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, list[list[str]]]:
    """A project that has been cross-fitted, and the texts of the rows that each training and dev pass was given."""
    import tunewright.training.run as training
    from making.tiny_bases import byte_tokenizer
    from tunewright.training.rows import as_columns

    folder = family_project(tmp_path_factory.mktemp("crossval") / "project", tiny_base_folder)
    tokenizer = byte_tokenizer()
    given: list[list[str]] = []

    def recording(rows: Any, *replay: Any) -> Any:
        given.append([tokenizer.decode(row.ids) for row in rows])
        return as_columns(rows, *replay)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "as_columns", recording)
        ran = tunewright("crossval", "--folds", str(FOLDS), "-p", folder)
    assert ran.code == 0, ran.stderr
    assert "Fold 3 of 3: 51 train, 9 dev and 30 test rows" in ran.stderr
    assert "2 left: about" in ran.stderr
    return folder, given


@pytest.fixture
def project(crossvalidated: tuple[Path, list[list[str]]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(crossvalidated[0], tmp_path / "project"))


def test_crossval_answers_each_row_with_an_adapter_that_never_saw_its_cluster(
    crossvalidated: tuple[Path, list[list[str]]],
) -> None:
    folder, given = crossvalidated
    evidence, items = evaluation_of(folder)
    members = load_version(folder / "dataset").members
    assert [item["key"] for item in items] == [m.key for m in members]
    assert sum(band["items"] for band in evidence["train_similarity"]["bands"]) == len(items)
    assert all(0 <= item["nearest"] <= 1 for item in items)
    assert len(given) == 2 * FOLDS  # to train on and to choose by, fold after fold
    for number in range(1, FOLDS + 1):
        held_out = [item for item in items if item["fold"] == number]
        seen = "\n".join(text for part in given[2 * number - 2 : 2 * number] for text in part)
        assert len(held_out) == 30
        for item in held_out:
            # A family is identified by its name, the first 40 characters of its inputs.
            assert item["input"][:40] not in seen
        others = {item["input"] for item in items if item["fold"] != number}
        assert all(text in seen for text in others)


def test_crossval_stores_its_adapters_apart_and_labels_them(project: Path) -> None:
    evidence, _ = evaluation_of(project)
    assert list_adapters(project / "adapters") == []
    stored = list_adapters(project / ".tunewright" / "crossval" / "adapters")
    assert {a.digest for a in stored} == {fold["adapter"] for fold in evidence["folds"]}
    assert [a.lineage["fold"]["number"] for a in stored] == [1, 2, 3]
    version = load_version(project / "dataset")
    assert {a.lineage["fold"]["of"] for a in stored} == {version.digest}
    assert version.digest not in {a.lineage["dataset"]["digest"] for a in stored}
    assert len(tunewright("data", "log", "-p", project, "--json").document["versions"]) == 1


def test_crossval_evidence_covers_all_rows(project: Path) -> None:
    evidence, items = evaluation_of(project)
    assert (evidence["design"], evidence["items"], evidence["clusters"]) == ("cross-fitted", 90, 30)
    for arm in evidence["arms"]:
        right = [item["answers"][arm["name"]].strip() == item["reference"] for item in items]
        assert arm["scores"]["exact_match"]["value"] == sum(right) / len(right)
        for fold in evidence["folds"]:
            of_fold = [r for r, item in zip(right, items, strict=True) if item["fold"] == fold["number"]]
            assert fold["scores"][arm["name"]] == sum(of_fold) / len(of_fold)
    assert evidence["contrasts"][0]["control"] == evidence["best_prompting"]


def _start(project: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tunewright", "crossval", "--folds", str(FOLDS), "-p", str(project)]
    return subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_crossval_resumes_to_the_same_evidence_after_a_kill(
    project: Path, tmp_path: Path, tiny_base_folder: Path
) -> None:
    other = family_project(tmp_path / "killed", tiny_base_folder)
    adapters = other / ".tunewright" / "crossval" / "adapters"
    running = _start(other)
    end = time.monotonic() + 300
    while not list(adapters.glob("tiny-*")):
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert [file.name for file in (other / "evaluations").iterdir()] == [ACCESS_LOG]
    before = {p: p.stat().st_mtime_ns for p in adapters.glob("tiny-*/*")}
    assert 0 < len(list_adapters(adapters)) < FOLDS
    assert tunewright("crossval", "--folds", str(FOLDS), "-p", other).code == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    (unstopped, items), (resumed, resumed_items) = evaluation_of(project), evaluation_of(other)
    assert resumed_items == items
    for evidence in (unstopped, resumed):
        del evidence["lineage"]["created"]
        assert evidence.pop("opening")["number"] == 1
    assert resumed == unstopped


def test_crossval_refuses_too_few_pairs_or_clusters_before_training(
    project: Path, tmp_path: Path, tiny_base_folder: Path
) -> None:
    ran = tunewright("crossval", "--folds", "40", "-p", project)
    assert (ran.code, "30 independent clusters are too few for 40 folds" in ran.stderr) == (2, True)
    small = tiny_project(tmp_path / "small", tiny_base_folder, count=60)
    assert tunewright("data", "add", small / "pairs.jsonl", "-p", small).code == 0
    ran = tunewright("crossval", "-p", small)
    assert (ran.code, "42 training pairs in the smallest of 5 folds, fewer than 50" in ran.stderr) == (2, True)
    assert not (small / ".tunewright" / "crossval").exists()
    ran = tunewright("crossval", "--folds", "2", "--force", "-p", small)
    assert (ran.code, "Training anyway because of --force" in ran.stderr) == (0, True)
    forced = list_adapters(small / ".tunewright" / "crossval" / "adapters")
    assert all("24 training pairs" in a.lineage["forced"] for a in forced)
    assert tunewright("crossval", "--folds", "1", "-p", small).code == 2


# Suspects by loss


def _suspects(project: Path, *options: str) -> tuple[dict[str, Any], str]:
    message = tunewright("data", "suspects", "-p", project, *options)
    assert message.code == 0, message.stderr
    return tunewright("data", "suspects", "-p", project, "--json", *options).document, message.stderr


def test_suspects_are_ranked_by_each_rows_out_of_fold_adapter(project: Path, tiny_base_folder: Path) -> None:
    document, message = _suspects(project)
    assert "judged by their loss under 3 cross-fitted adapters" in message
    assert document["judged_by"].startswith("3 cross-fitted adapters")
    assert len(document["suspects"]) == 9
    _, items = evaluation_of(project)
    stored = {a.lineage["fold"]["number"]: a for a in list_adapters(project / ".tunewright" / "crossval" / "adapters")}
    fold_of = {item["key"]: item["fold"] for item in items}
    every = {m.key: m for m in load_version(project / "dataset").members}
    for suspect in document["suspects"][:3]:
        adapter, member = stored[fold_of[suspect["key"]]], every[suspect["key"]]
        messages = member.example.messages
        alone = Example((*(m for m in messages if m.role == "system"), Message("user", "-"), messages[-1]))
        expected = plain_loss(tiny_base_folder, adapter, member)
        expected -= plain_loss(tiny_base_folder, adapter, replace(member, example=alone))
        assert suspect["score"] == pytest.approx(expected, abs=1e-3)


def plain_loss(base: Path, adapter: Adapter, member: Any) -> float:
    """transformers' own loss of one row, no padding, the labels that training would have."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from making.tiny_bases import byte_tokenizer, chat_of

    row = chat_of(byte_tokenizer()).encode(member.example.messages)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter.folder)
    labels = [token if trained else -100 for token, trained in zip(row.ids, row.loss_mask, strict=True)]
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss)


def test_suspects_uses_a_named_adapter_or_the_newest_without_a_crossval(project: Path) -> None:
    shutil.rmtree(project / ".tunewright" / "crossval")
    document, message = _suspects(project)
    assert document["judged_by"] is None
    assert "--adapter NAME" in message
    trained = tunewright("train", "-p", project, "--json").document["adapter"]
    assert _suspects(project)[0]["judged_by"] == trained
    document, message = _suspects(project, "--adapter", trained)
    assert document["judged_by"] == trained
    assert "was trained on 72 of the 90 rows" in message
    unknown = tunewright("data", "suspects", "--adapter", "x", "-p", project)
    assert (unknown.code, "No adapter is named 'x'" in unknown.stderr) == (2, True)


def test_suspects_reuses_stored_losses(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tunewright.evaluation.losses as losses

    before, _ = _suspects(project)
    monkeypatch.setattr(losses, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert _suspects(project)[0] == before
