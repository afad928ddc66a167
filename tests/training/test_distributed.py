"""Several processes train one adapter, with a base each or shards of one (FSDP): the numbers of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunewright
from making.command_line import tiny_project
from making.command_line import tunewright as run
from making.forked import Ended, Server
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.api import Project
from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST, write_json
from tunewright.training import distributed
from tunewright.training.packing.order import StepBatches, random_order
from tunewright.training.run import micro_batch, require_fsdp_supported
from tunewright.training.self_samples import Sampler, SelfSample


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


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
"""As `accelerate launch --use_fsdp --fsdp_version 2` sets them, where they say something."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("commands")) as running:
        yield running


def _project(folder: Path, base: Path, also: str = "") -> Path:
    tiny_project(folder, base, count=71)
    config = folder / "tunewright.yaml"
    text = (
        config.read_text()
        .replace("batch_size: 8", "batch_size: 8\n  micro_batch_size: 2")
        .replace("epochs: 2", "epochs: 1")
    )
    settings = f"train:\n  eval_max_samples: 3\n  prefix_sharing: 'on'\n{also}"
    config.write_text(text.replace("train:\n", settings).replace("evaluate:\n", "evaluate:\n  max_new_tokens: 5\n"))
    assert run("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def _trained(server: Server, folder: Path, **how: Any) -> Adapter:
    ended: Ended = server.run("train", "-p", folder, **how)
    assert ended.code == 0, ended.stderr
    return find_adapter(folder / "adapters")


def _require_alike(whole: Adapter, pieces: Adapter, rel: float = 1e-5, least: float | None = None) -> None:
    from safetensors.torch import load_file

    assert [row["step"] for row in pieces.history] == [row["step"] for row in whole.history]
    for one, two in zip(whole.history, pieces.history, strict=True):
        # Between an epoch's ends transformers counts micro-batches, of which each process has fewer.
        ours = {"epoch": 0, "tokens_per_s": 0, "memory_bytes": 0}
        assert {**one, **ours} == pytest.approx({**two, **ours}, rel=rel, abs=least)
    weights = [load_file(adapter.folder / "adapter_model.safetensors") for adapter in (whole, pieces)]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        assert values.shape == weights[1][name].shape
        assert (values - weights[1][name]).abs().max() <= 1e-3 * values.abs().max(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> Adapter:
    return _trained(server, _project(tmp_path_factory.mktemp("alone") / "project", tiny_base_folder))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> tuple[Adapter, str]:
    """Return what two processes trained, and their messages."""
    folder = _project(tmp_path_factory.mktemp("pair") / "project", tiny_base_folder)
    ended = server.run("train", "-p", folder, processes=2)
    assert ended.code == 0, ended.stderr
    return find_adapter(folder / "adapters"), ended.stdout + ended.stderr


@pytest.mark.slow
def test_two_processes_give_the_losses_and_adapter_of_one(alone: Adapter, pair: tuple[Adapter, str]) -> None:
    """Prompts are shared, gradients accumulated, and the last step has one row: one process gets none."""
    together, said = pair
    assert alone.lineage["training"]["rows"] % 8 == 1
    assert together.lineage["training"]["processes"] == 2
    _require_alike(alone, together, rel=1e-4)
    assert said.count("Trained: ") == said.count("Loading ") == said.count("Epoch 1") == 1


def _write_samples(project: Project) -> None:
    """Keep conversations as if the base had written them, which would take a minute."""
    weights = {"dtype": "float32", "quantization": "none"}
    never: Any = None
    sampler = Sampler(project.base, project.chat, weights, never, 0, "replay", project.folder.work, project.reporter, 6)
    asked = ["sky", "grass", "snow", "coal", "sea", "sand", "ice", "fire", "rust"]
    samples = [SelfSample(n, f"Colour of {of}?", "No idea", True, (), True, None) for n, of in enumerate(asked)]
    write_json(sampler.folder / "0000.json", [asdict(sample) for sample in samples])


@pytest.mark.slow
def test_two_processes_with_replay_give_the_losses_of_one(
    tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    """All parts are means over tokens, of which the processes have different numbers."""
    adapters = []
    for count in (1, 2):
        folder = _project(tmp_path / f"of-{count}", tiny_base_folder, "  replay: {samples: 6}\n")
        _write_samples(tunewright.open(folder))
        adapters.append(_trained(server, folder, processes=count))
    one, two = adapters
    assert two.lineage["training"]["processes"] == 2
    assert one.lineage["replay"]["digest"] == two.lineage["replay"]["digest"]
    assert any("replay_kl" in row for row in one.history)
    _require_alike(one, two, rel=1e-3, least=1e-5)


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
    ended = server.run("train", "-p", folder, processes=2, killed_at=(f"*/checkpoint-8/*{MANIFEST}*", 1))
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


# A sharded base


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> Adapter:
    """Return what two processes with half a base each trained, prompts shared."""
    folder = _project(tmp_path_factory.mktemp("divided") / "project", tiny_base_folder)
    return _trained(server, folder, processes=2, environment=FSDP)


@pytest.mark.slow
def test_fsdp_gives_the_losses_and_adapter_of_one_process(alone: Adapter, divided: Adapter) -> None:
    """The last step has one row, and dev rows are answered: two in one process, one in the other."""
    assert (alone.lineage["training"]["bytes_held"], divided.lineage["training"]["processes"]) == (None, 2)
    _require_alike(alone, divided)


@pytest.mark.slow
def test_fsdp_process_holds_half_of_the_weights(divided: Adapter, tiny_base_folder: Path) -> None:
    """Base and adapter are counted; they are float32 in the file as in memory."""
    from safetensors.torch import load_file

    files = [tiny_base_folder / "model.safetensors", divided.folder / "adapter_model.safetensors"]
    whole = sum(weight.numel() * 4 for file in files for weight in load_file(file).values())
    held = divided.lineage["training"]["bytes_held"]
    # An odd number of rows is padded to an even one, and allocated so.
    assert [bytes_ == pytest.approx(whole / 2, rel=0.01) for bytes_ in held] == [True, True], (held, whole)


@pytest.fixture(scope="module")
def divided_in_4_bits(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> Adapter:
    """Return what two processes with half of an NF4 base each trained."""
    folder = _project(tmp_path_factory.mktemp("divided") / "nf4", tiny_base_folder, also="  quantization: nf4\n")
    return _trained(server, folder, processes=2, environment=FSDP)


@pytest.mark.slow
@pytest.mark.parametrize("nf4", [False, pytest.param(True, marks=pytest.mark.release)])
def test_fsdp_resumes_to_the_same_adapter_when_killed_while_saving(
    nf4: bool, request: pytest.FixtureRequest, tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    folder = _project(tmp_path / "project", tiny_base_folder, also="  quantization: nf4\n" if nf4 else "")
    ended = server.run(
        "train", "-p", folder, processes=2, environment=FSDP, killed_at=(f"*/checkpoint-8/*{MANIFEST}*", 1)
    )
    assert ended.code == -signal.SIGKILL
    (checkpoint,) = folder.glob(f".tunewright/training/*/checkpoint-*/{MANIFEST}")
    files = json.loads(checkpoint.read_text())
    assert "pytorch_model_fsdp.bin" in str(files) and "optimizer.bin" in str(files)
    alone = server.run("train", "-p", folder)
    assert alone.code == 2
    assert "This run started with FSDP and cannot resume without it" in " ".join(alone.stderr.split())
    went_on = server.run("train", "-p", folder, processes=2, environment=FSDP)
    assert went_on.code == 0, went_on.stderr
    assert went_on.stderr.count("Resuming from step 5") == 1
    whole = "divided_in_4_bits" if nf4 else "divided"
    assert find_adapter(folder / "adapters").digest == request.getfixturevalue(whole).digest


@pytest.mark.slow
def test_fsdp_over_nf4_gives_the_losses_and_the_adapter_of_one_process(
    divided_in_4_bits: Adapter, divided: Adapter, tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    whole = _trained(server, _project(tmp_path / "project", tiny_base_folder, also="  quantization: nf4\n"))
    _require_alike(whole, divided_in_4_bits)
    losses = [row["loss"] for row in whole.history if "loss" in row]
    in_full = [row["loss"] for row in divided.history if "loss" in row]
    assert losses != pytest.approx(in_full, rel=1e-5), "the base is rounded to 4 bits"


@pytest.mark.slow
def test_fsdp_over_nf4_holds_half_of_the_4_bit_weights(divided_in_4_bits: Adapter, tiny_base_folder: Path) -> None:
    from safetensors.torch import load_file

    numbers = {name: weight.numel() for name, weight in load_file(tiny_base_folder / "model.safetensors").items()}
    linear = sum(count for name, count in numbers.items() if "_proj" in name)
    adapter = sum(w.numel() for w in load_file(divided_in_4_bits.folder / "adapter_model.safetensors").values())
    # Half a byte, and 4 bytes for embeddings, norms and adapter; a scale for 64 weights in each process.
    half = (linear / 2 + 4 * (sum(numbers.values()) - linear + adapter)) / 2 + linear / 64
    held = divided_in_4_bits.lineage["training"]["bytes_held"]
    tables = 14 * 4 * (16 + 256 + 4)  # as bitsandbytes keeps them with each of the 14 matrices
    assert all(half <= count <= half + 2 * tables for count in held), (held, half, tables)


@pytest.mark.parametrize("settings", [{"replay": "self"}, {"from": "parent"}, {"method": "dpo"}])
def test_settings_that_need_passes_of_one_process_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        require_fsdp_supported(TrainConfig.model_validate(settings))
    assert caught.value.where == f"train.{next(iter(settings))}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP version 1 is not supported"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "Offloading parameters is not supported"),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, "Ignoring modules is not supported"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP's activation checkpointing"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, "needs at least 2 processes"),
    ],
)
def test_init_refuses_unsupported_fsdp_settings(
    settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {**FSDP, "WORLD_SIZE": "2", "RANK": "0", **settings}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        distributed.init()
