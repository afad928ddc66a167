"""Several processes train one adapter: the numbers of one process, one report, one end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.command_line import tiny_project, tunewright
from making.forked import Server
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST
from tunewright.training import distributed
from tunewright.training.packing.order import StepBatches, random_order
from tunewright.training.run import micro_batch


@given(
    st.integers(1, 60), st.sampled_from([(1, 4), (2, 2), (2, 4), (3, 1), (4, 1)]), st.integers(1, 3), st.integers(0, 3)
)
def test_processes_share_each_step_and_every_row_is_trained_on_once(
    rows: int, shape: tuple[int, int], passes: int, epoch: int
) -> None:
    """All processes make equally many passes, and a step has the same rows as in one process."""
    count, micro = shape
    step = count * micro * passes
    ids = [[1] * (n % 7 + 1) for n in range(rows)]
    dealt = [
        StepBatches(ids, 3, step_rows=step, micro_batch=micro, process=process, processes=count)
        for process in range(count)
    ]
    for each in dealt:
        each.set_epoch(epoch)
    batches = [list(each) for each in dealt]
    assert {len(each) for each in batches} == {len(each) for each in dealt}
    assert len({len(each) for each in batches}) == 1
    assert max(len(batch) for each in batches for batch in each) <= micro
    order = random_order(rows, 3)
    order.set_epoch(epoch)
    alone = list(order)
    for number, start in enumerate(range(0, rows, step)):
        here = [row for each in batches for batch in each[number * passes : (number + 1) * passes] for row in batch]
        assert sorted(here) == sorted(alone[start : start + step])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("commands")) as running:
        yield running


def _project(folder: Path, base: Path, epochs: int = 2) -> Path:
    tiny_project(folder, base, count=121)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace("batch_size: 8", "batch_size: 8\n  micro_batch_size: 2")
    text = text.replace("epochs: 2", f"epochs: {epochs}")
    config.write_text(text.replace("train:\n", "train:\n  eval_max_samples: 3\n  prefix_sharing: 'on'\n"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> Adapter:
    folder = _project(tmp_path_factory.mktemp("alone") / "project", tiny_base_folder)
    assert server.run("train", "-p", folder).code == 0
    return find_adapter(folder / "adapters")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> tuple[Adapter, str]:
    """Return what two processes trained, and their messages."""
    folder = _project(tmp_path_factory.mktemp("pair") / "project", tiny_base_folder)
    ended = server.run("train", "-p", folder, processes=2)
    assert ended.code == 0, ended.stderr
    return find_adapter(folder / "adapters"), ended.stdout + ended.stderr


@pytest.mark.slow
def test_two_processes_give_the_losses_and_adapter_of_one(alone: Adapter, pair: tuple[Adapter, str]) -> None:
    """Prompts are shared, gradients accumulated, and an epoch's last step has one row: one process gets none."""
    from safetensors.torch import load_file

    together, said = pair
    assert alone.lineage["training"]["rows"] % 8 == 1
    assert together.lineage["training"]["processes"] == 2
    assert [row["step"] for row in together.history] == [row["step"] for row in alone.history]
    for one, two in zip(alone.history, together.history, strict=True):
        # Between an epoch's ends transformers counts micro-batches, of which each process has fewer.
        ours = {"epoch": 0, "tokens_per_s": 0, "memory_bytes": 0}
        assert {**one, **ours} == pytest.approx({**two, **ours}, rel=1e-4)
    weights = [load_file(adapter.folder / "adapter_model.safetensors") for adapter in (alone, together)]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        difference = (values - weights[1][name]).abs().max()
        assert difference <= 1e-3 * values.abs().max(), name
    assert said.count("Trained: ") == said.count("Loading ") == said.count("Epoch 1") == 1


@pytest.mark.slow
def test_two_processes_with_replay_give_the_losses_of_one(
    tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    """All parts are means over tokens, of which the processes have different numbers."""
    adapters = []
    for count in (1, 2):
        folder = _project(tmp_path / f"of-{count}", tiny_base_folder, epochs=1)
        config = folder / "tunewright.yaml"
        config.write_text(config.read_text().replace("train:\n", "train:\n  replay: {samples: 6}\n"))
        ended = server.run("train", "-p", folder, processes=count)
        assert ended.code == 0, ended.stderr
        adapters.append(find_adapter(folder / "adapters"))
    one, two = adapters
    assert two.lineage["training"]["processes"] == 2
    assert one.lineage["replay"]["digest"] == two.lineage["replay"]["digest"]
    assert any("replay_kl" in row for row in one.history)
    for alone, together in zip(one.history, two.history, strict=True):
        ours = {"epoch": 0, "tokens_per_s": 0, "memory_bytes": 0}
        assert {**alone, **ours} == pytest.approx({**together, **ours}, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_stop_reaches_all_processes_at_one_step_and_they_resume(
    pair: tuple[Adapter, str], tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    """The signal reaches only one of them."""
    folder = _project(tmp_path / "project", tiny_base_folder)
    command = server.start("train", "-p", folder, processes=2)
    _reach_checkpoint(folder)
    command.send(signal.SIGTERM)
    stopped = command.wait()
    assert stopped.code == 130, stopped.stderr
    assert (
        stopped.stderr.count("This step is saved.") == stopped.stderr.count("the same command resumes from there") == 1
    )
    assert "Traceback" not in stopped.stderr
    went_on = server.run("train", "-p", folder, processes=2)
    assert went_on.stderr.count("Resuming from step") == 1
    assert find_adapter(folder / "adapters").digest == pair[0].digest


@pytest.mark.slow
def test_killed_processes_resume_together(
    pair: tuple[Adapter, str], tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    """The main process dies while it writes; the other one reports it and exits."""
    folder = _project(tmp_path / "project", tiny_base_folder)
    ended = server.run("train", "-p", folder, processes=2, killed_at=(f"*/checkpoint-15/*{MANIFEST}*", 1))
    assert ended.code == -signal.SIGKILL
    assert "Traceback" not in ended.stderr
    went_on = server.run("train", "-p", folder, processes=2)
    assert went_on.code == 0, went_on.stderr
    assert find_adapter(folder / "adapters").digest == pair[0].digest


@pytest.mark.slow
def test_error_in_one_process_ends_all_with_one_message(tmp_path: Path, tiny_base_folder: Path, server: Server) -> None:
    folder = _project(tmp_path / "project", tiny_base_folder)
    ended = server.run("train", "-p", folder, processes=2, file_limit=100_000)
    assert ended.code == 2
    assert ended.stderr.count("Error: ") == 1, ended.stderr
    assert "the file exceeds the size limit of this system" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("settings", "where", "numbers"),
    [
        ({"batch_size": 7}, "train.batch_size", "7 rows .* 2 processes"),
        (
            {"batch_size": 12, "micro_batch_size": 4},
            "train.micro_batch_size",
            "2 processes has 6 rows .* multiple of 4",
        ),
    ],
)
def test_batch_that_cannot_be_shared_is_refused(settings: dict[str, int], where: str, numbers: str) -> None:
    with pytest.raises(UserError, match=numbers) as caught:
        micro_batch(TrainConfig.model_validate(settings), 2)
    assert caught.value.where == where


@pytest.mark.slow
def test_other_commands_run_in_one_process(tmp_path: Path, tiny_base_folder: Path, server: Server) -> None:
    folder = _project(tmp_path / "project", tiny_base_folder)
    ended = server.run("evaluate", "-p", folder, processes=2)
    assert ended.code == 2
    assert ended.stderr.count("This command runs in one process") == 1


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not supported"):
        distributed.init()


@pytest.mark.slow
def test_torchrun_forwards_a_signal_and_the_step_is_saved(
    pair: tuple[Adapter, str], tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    """Uses the real launcher; processes of the fork server resume from its checkpoint."""
    folder = _project(tmp_path / "project", tiny_base_folder)
    run = [sys.executable, "-m", "torch.distributed.run"]
    source = Path(__file__).parents[2] / "src"
    with (tmp_path / "said").open("w+") as said:
        launcher = subprocess.Popen(
            [*run, "--standalone", "--nproc-per-node", "2", "-m", "tunewright", "train", "-p", folder],
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONPATH": str(source)},
        )
        _reach_checkpoint(folder)
        launcher.send_signal(signal.SIGINT)
        launcher.wait()
        said.seek(0)
        assert said.read().count("This step is saved.") == 1
    assert server.run("train", "-p", folder, processes=2).stderr.count("Resuming from step") == 1
    assert find_adapter(folder / "adapters").digest == pair[0].digest


def _reach_checkpoint(folder: Path) -> None:
    until = time.monotonic() + 300
    while not list(folder.glob(f".tunewright/training/*/checkpoint-*/{MANIFEST}")):
        assert time.monotonic() < until
        time.sleep(0.005)
