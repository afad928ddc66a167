"""A run that is killed, stopped, out of disk space or damaged ends with the adapter of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from making.command_line import tiny_project, tunewright
from making.forked import Command, Server
from tunewright.adapters.registry import find_adapter
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST, damage
from tunewright.training.checkpoints import working_folder

STEPS = 36
"""Of the runs here, but for the one that is killed ten times."""
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("commands")) as running:
        yield running


def _project(folder: Path, base: Path, epochs: int = STEPS // 12) -> Path:
    """A project of 12 steps an epoch, with a checkpoint at each epoch's end and every fifth step."""
    tiny_project(folder, base)
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", f"epochs: {epochs}\n  eval_max_samples: 2"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def _left_alone(folder: Path, server: Server) -> str:
    """Return the adapter's digest of an undisturbed run."""
    assert server.run("train", "-p", folder).code == 0
    return find_adapter(folder / "adapters").digest


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> str:
    return _left_alone(_project(tmp_path_factory.mktemp("unkilled") / "project", tiny_base_folder), server)


def _whole(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    manifests = folder.glob(f".tunewright/training/*/checkpoint-*/{MANIFEST}")
    return sorted(int(m.parent.name.removeprefix("checkpoint-")) for m in manifests)


def _reach(command: Command, folder: Path, step: int) -> None:
    """Wait until there is a complete checkpoint of this step or a later one."""
    until = time.monotonic() + 300
    while max(_whole(folder), default=0) < step:
        assert time.monotonic() < until, command.stderr
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.fault("kill", "train")
def test_run_killed_at_ten_random_moments_ends_with_the_same_adapter(
    tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    """Five kills happen by the clock, five at a change of a file: a checkpoint, an epoch's adapter, the stored one."""
    chance, steps = random.Random(7), 96
    unkilled = _left_alone(_project(tmp_path / "unkilled", tiny_base_folder, epochs=8), server)
    folder = _project(tmp_path / "project", tiny_base_folder, epochs=8)
    kills: list[tuple[str, int] | None] = [None] * 5 + [
        ("*/checkpoint-*", chance.randint(1, 20)),
        ("*/checkpoint-*", chance.randint(1, 20)),
        (f"*/checkpoint-*/*{MANIFEST}*", chance.randint(1, 2)),
        ("*/evaluated/*", chance.randint(1, 8)),
    ]
    chance.shuffle(kills)
    kills.append(("*/adapters/.tiny*", chance.randint(2, 30)))
    struck = set()
    for kill in kills:
        before = max(_whole(folder), default=0)
        command = server.start("train", "-p", folder, killed_at=kill)
        loading = kill is None and chance.random() < 0.2
        if kill is None:
            if not loading:
                _reach(command, folder, before + 1)
            time.sleep(chance.uniform(0, 0.2))
            command.send(signal.SIGKILL)
        ended = command.wait()
        assert ended.code == -signal.SIGKILL, ended
        assert not [p for p in folder.glob("adapters/*") if not p.name.startswith(".")]
        assert loading or not before or f"Resuming from step {before} of {steps}" in ended.stderr
        struck.add(max(_whole(folder), default=0))
    assert len(struck) >= 5  # and so not all at one place
    assert list((folder / "adapters").iterdir())  # cut off by the last kill
    last = server.run("train", "-p", folder, "--json")
    assert last.code == 0
    assert json.loads(last.stdout)["trained"]
    assert f"Resuming from step {steps}" in last.stderr
    assert find_adapter(folder / "adapters").digest == unkilled
    assert len(list((folder / "adapters").iterdir())) == 1
    assert not list((folder / ".tunewright" / "training").iterdir())


@pytest.mark.slow
def test_ctrl_c_saves_the_step_first(tmp_path: Path, tiny_base_folder: Path, server: Server, unkilled: str) -> None:
    folder = _project(tmp_path / "project", tiny_base_folder)
    command = server.start("train", "-p", folder)
    _reach(command, folder, 5)
    command.send(signal.SIGINT)
    ended = command.wait()
    assert ended.code == 130
    step = max(_whole(folder))
    assert f"Stopped at step {step} of {STEPS}. This step is saved." in ended.stderr
    assert "the same command resumes from there" in ended.stderr
    last = server.run("train", "-p", folder)
    assert f"Resuming from step {step} of {STEPS}" in last.stderr
    assert find_adapter(folder / "adapters").digest == unkilled


def _slow_evaluations(folder: Path, base: Path) -> Path:
    """Return a project of 24 steps whose two evaluations answer for a second, since this base never ends one."""
    _project(folder, base, epochs=2)
    config = folder / "tunewright.yaml"
    config.write_text(
        config.read_text()
        .replace("eval_max_samples: 2", "eval_max_samples: 12")
        .replace("evaluate:\n", "evaluate:\n  max_new_tokens: 100\n  batch_size: 1\n")
    )
    return folder


def _history(folder: Path) -> list[dict[str, float]]:
    """Return the run's metrics so far."""
    files = list(folder.glob(".tunewright/training/*/metrics.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_resumed_run_makes_the_evaluation_that_a_stop_cut_off(
    tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    unstopped = _left_alone(_slow_evaluations(tmp_path / "unstopped", tiny_base_folder), server)
    folder = _slow_evaluations(tmp_path / "project", tiny_base_folder)
    for stop in range(2):  # in the evaluation after step 12, and as that is made up for
        command = server.start("train", "-p", folder)
        until = time.monotonic() + 300
        reached = "Resuming from step 12" if stop else "loss"
        while reached not in command.stderr if stop else len(_history(folder)) < 12:
            assert time.monotonic() < until, command.stderr
            time.sleep(0.01)
        time.sleep(0.3)
        command.send(signal.SIGINT)
        ended = command.wait()
        assert ended.code == 130
        assert ended.stderr.count("\nStopping") == 1
        assert ("Stopped at step 12 of 24. This step is saved." in ended.stderr) or stop
        assert [row["step"] for row in _history(folder) if "eval_loss" in row] == []
        assert _whole(folder) == [5, 10, 12][-2:]
    last = server.run("train", "-p", folder)
    assert last.code == 0, last.stderr
    assert "Resuming from step 12 of 24" in last.stderr
    adapter = find_adapter(folder / "adapters")
    assert adapter.digest == unstopped
    assert [epoch["step"] for epoch in adapter.lineage["training"]["epochs"]] == [12, 24]


@pytest.mark.slow
def test_second_signal_interrupts_at_once(
    tmp_path: Path, tiny_base_folder: Path, server: Server, unkilled: str
) -> None:
    folder = _project(tmp_path / "project", tiny_base_folder)
    command = server.start("train", "-p", folder)
    _reach(command, folder, 5)
    command.send(signal.SIGINT, signal.SIGTERM)
    ended = command.wait()
    assert ended.code == 130
    # A second KeyboardInterrupt in the main thread may be quicker than the thread that reads signals.
    assert re.search(r"Stopped( at once)?; what was finished is kept, and the same command resumes", ended.stderr)
    assert server.run("train", "-p", folder).code == 0
    assert find_adapter(folder / "adapters").digest == unkilled


def test_second_process_cannot_train_the_same_adapter(tmp_path: Path) -> None:
    with working_folder(tmp_path / "work"), pytest.raises(UserError, match="Another process is training this adapter"):
        working_folder(tmp_path / "work").__enter__()
    with working_folder(tmp_path / "work"):
        pass


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> Path:
    """Return a project whose run was killed while checkpoint 30 was written: 25 and 24 are complete, and two epochs
    kept.
    """
    folder = _project(tmp_path_factory.mktemp("killed") / "project", tiny_base_folder)
    ended = server.run("train", "-p", folder, killed_at=(f"*/checkpoint-30/*{MANIFEST}*", 1))
    assert ended.code == -signal.SIGKILL
    assert _whole(folder) == [24, 25]
    return folder


def _flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flipped", "missing", "goes_on", "words"),
    [
        ([], [], 25, "Ignoring checkpoint-30: it was cut off while it was written"),
        slow(["checkpoint-25/adapter_model.safetensors"], [], 24, "adapter_model.safetensors has changed"),
        slow([], ["checkpoint-25/trainer_state.json"], 24, "trainer_state.json is missing"),
        slow(
            ["evaluated/step-12/adapter_model.safetensors"],
            [],
            None,
            "evaluated/step-12: adapter_model.safetensors has",
        ),
        (["checkpoint-25/rng_state.pth", "checkpoint-24/scheduler.pt"], [], None, "Training starts from the beginning"),
    ],
)
def test_damaged_checkpoint_is_named_and_an_older_one_is_used(
    flipped: list[str],
    missing: list[str],
    goes_on: int | None,
    words: str,
    tmp_path: Path,
    killed: Path,
    server: Server,
    unkilled: str,
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(killed, folder)
    (work,) = (folder / ".tunewright" / "training").iterdir()
    for name in flipped:
        _flip(work / name)
    for name in missing:
        (work / name).unlink()
    ended = server.run("train", "-p", folder)
    assert ended.code == 0, ended.stderr
    message = " ".join(ended.stderr.split())
    assert words in message
    assert (f"Resuming from step {goes_on} of {STEPS}" if goes_on else "Training starts from the beginning") in message
    assert find_adapter(folder / "adapters").digest == unkilled


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.fault("full disk", "train")
def test_full_disk_loses_no_checkpoint(tmp_path: Path, tiny_base_folder: Path, server: Server, unkilled: str) -> None:
    with _small_disk(tmp_path / "disk", "32m") as disk:
        folder = _project(disk / "project", tiny_base_folder)
        filler = disk / "filler"
        reached = []
        for free in (0, 400_000, 1_000_000):  # it fills up at another write each time
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            os.truncate(filler, filler.stat().st_size - free)
            ended = server.run("train", "-p", folder)
            assert ended.code == 2, ended.stderr
            assert "the disk is full; existing files are unchanged" in " ".join(ended.stderr.split())
            assert "Free some space and run the same command again" in ended.stderr
            begun = list(folder.glob(".tunewright/training/*/checkpoint-*"))
            assert len(begun) == len(_whole(folder))  # what was cut off gave its room back
            assert not any(damage(checkpoint) for checkpoint in begun)
            reached.append(max(_whole(folder), default=0))
            filler.unlink()
        assert reached == sorted(reached)
        assert reached[-1] >= 5
        last = server.run("train", "-p", folder)
        assert f"Resuming from step {reached[-1]} of {STEPS}" in last.stderr
        assert find_adapter(folder / "adapters").digest == unkilled


@pytest.mark.slow
@pytest.mark.fault("read-only disk", "train")
def test_read_only_disk_is_reported_and_loses_nothing(
    tmp_path: Path, killed: Path, server: Server, unkilled: str
) -> None:
    with _small_disk(tmp_path / "disk", "32m") as disk:
        folder = disk / "project"
        shutil.copytree(killed, folder)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        ended = server.run("train", "-p", folder)
        assert ended.code == 2, ended.stderr
        assert "the file system is read-only" in " ".join(ended.stderr.split())
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert "Resuming from step 25" in server.run("train", "-p", folder).stderr
        assert find_adapter(folder / "adapters").digest == unkilled
