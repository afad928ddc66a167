"""``train --sweep`` through the command line, on a tiny base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tiny_project, tunewright
from tunewright.adapters.registry import list_adapters
from tunewright.config.io import load_config
from tunewright.data.versions import load_version

pytestmark = pytest.mark.slow

NOTE = "  # Ada's rate; see the log\n"


def _project(folder: Path, base: Path) -> Path:
    tiny_project(folder, base)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace("preset: all-linear\n", "preset: classic\n").replace("0.003", "0.0007")
    config.write_text(text.replace("  epochs", NOTE + "  epochs") + "# the end\n")
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def _ledger(project: Path) -> list[dict[str, Any]]:
    (file,) = project.glob("sweeps/*/ledger.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """A project that was swept, what the command printed, and the texts that training and dev passes were given."""
    import tunewright.training.run as running
    from making.tiny_bases import byte_tokenizer
    from tunewright.training.rows import as_columns

    project = _project(tmp_path_factory.mktemp("sweep") / "project", tiny_base_folder)
    tokenizer = byte_tokenizer()
    given: list[str] = []

    def recording(rows: Any, *replay: Any) -> Any:
        given.extend(tokenizer.decode(row.ids) for row in rows)
        return as_columns(rows, *replay)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(running, "as_columns", recording)
        ran = tunewright("train", "--sweep", "--write", "--json", "-p", project)
    assert ran.code == 0, ran.stderr
    return project, ran.document, given


Swept = tuple[Path, dict[str, Any], list[str]]


def test_sweep_halves_six_trials_to_one_finished_winner(swept: Swept) -> None:
    project, document, _ = swept
    assert document["rungs"] == [6, 12, 24]
    assert len(document["trials"]) == 6
    assert sorted(len(trial["rungs"]) for trial in document["trials"]) == [1, 1, 1, 2, 2, 3]
    for rung, goes_on in ((0, 3), (1, 1)):
        here = [t for t in document["trials"] if len(t["rungs"]) > rung]
        by_dev = sorted(here, key=lambda t: (-t["rungs"][rung].get("dev_metric", 0), t["rungs"][rung]["dev_loss"]))
        better = {t["name"] for t in by_dev[:goes_on]}
        assert {t["name"] for t in here if len(t["rungs"]) > rung + 1} == better
    assert [a.name for a in list_adapters(project / "adapters")] == [document["adapter"]]
    assert not list((project / ".tunewright" / "sweeps").iterdir())


def test_sweep_writes_the_winner_to_the_config_and_keeps_the_rest(swept: Swept) -> None:
    project, document, _ = swept
    text = (project / "tunewright.yaml").read_text()
    train = load_config(project / "tunewright.yaml").train
    assert f"{train.preset}-{train.learning_rate:g}" == document["winner"]
    assert set(document["written"]) <= {"preset", "learning_rate"}
    assert NOTE in text and text.endswith("# the end\n")
    assert (train.epochs, train.batch_size) == (2, 8)


def test_sweep_never_uses_test_rows(swept: Swept) -> None:
    project, _, given = swept
    version = load_version(project / "dataset")
    seen = "\n".join(given)
    assert all(m.example.input_text in seen for split in ("train", "dev") for m in version.examples(split))
    assert not any(m.example.input_text in seen for m in version.examples("test"))


def test_sweep_refuses_a_budget_below_one_trial_and_states_the_minimum(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = _project(tmp_path / "project", tiny_base_folder)
    ran = tunewright("train", "--sweep", "--minutes", "0.001", "-p", project)
    assert ran.code == 2
    assert "too small for a single trial" in ran.stderr
    assert "--minutes" in ran.stderr
    assert [line["event"] for line in _ledger(project)[1:]] == ["measured"]
    assert not (project / "adapters").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, str]:
    """A small sweep that nothing stopped, and its adapter."""
    project = _project(tmp_path_factory.mktemp("whole") / "project", tiny_base_folder)
    ran = tunewright("train", "--sweep", "--rate", "0.003", "--json", "-p", project)
    assert ran.code == 0, ran.stderr
    return project, ran.document["adapter"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_sweep_resumes_to_the_same_adapter_after_a_stop(
    number: int, whole: tuple[Path, str], tmp_path: Path, tiny_base_folder: Path
) -> None:
    project = _project(tmp_path / "project", tiny_base_folder)
    arguments = ["train", "--sweep", "--rate", "0.003", "-p", str(project)]
    running = subprocess.Popen(
        [sys.executable, "-m", "tunewright", *arguments],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    end = time.monotonic() + 240
    while len(list(project.glob(".tunewright/sweeps/*/*"))) < 2:  # both trials have a folder: the second has begun
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    running.send_signal(number)
    assert running.wait(timeout=120) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    before = _ledger(project)
    assert [line["event"] for line in before[1:]] == ["measured", *["stopped"] * (number == signal.SIGINT)]
    assert not (project / "adapters").exists()
    ran = tunewright(*arguments, "--json")
    assert ran.code == 0, ran.stderr
    after = _ledger(project)
    assert after[: len(before)] == before
    assert ran.document["adapter"] == whole[1]
    assert _numbers(after) == _numbers(_ledger(whole[0]))


def _numbers(lines: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    return [(e["trial"], e["rung"], e["dev_loss"]) for e in lines[1:] if "dev_loss" in e]
