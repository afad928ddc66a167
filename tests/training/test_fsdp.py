"""FSDP: two processes shard the base, and give the numbers of one process with the full base."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tiny_project, tunewright
from making.forked import Ended, Server
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST
from tunewright.training import distributed
from tunewright.training.run import require_fsdp_supported

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
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def _trained(server: Server, folder: Path, **how: Any) -> Adapter:
    ended: Ended = server.run("train", "-p", folder, **how)
    assert ended.code == 0, ended.stderr
    return find_adapter(folder / "adapters")


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, server: Server) -> Adapter:
    """Return what two processes with half a base each trained, prompts shared."""
    folder = _project(tmp_path_factory.mktemp("divided") / "project", tiny_base_folder)
    return _trained(server, folder, processes=2, environment=FSDP)


def _require_alike(whole: Adapter, pieces: Adapter) -> None:
    from safetensors.torch import load_file

    assert [row["step"] for row in pieces.history] == [row["step"] for row in whole.history]
    for one, two in zip(whole.history, pieces.history, strict=True):
        # Between an epoch's ends transformers counts micro-batches, of which each process has fewer.
        ours = {"epoch": 0, "tokens_per_s": 0, "memory_bytes": 0}
        assert {**one, **ours} == pytest.approx({**two, **ours}, rel=1e-5)
    weights = [load_file(adapter.folder / "adapter_model.safetensors") for adapter in (whole, pieces)]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        assert values.shape == weights[1][name].shape
        assert (values - weights[1][name]).abs().max() <= 1e-3 * values.abs().max(), name


@pytest.mark.slow
def test_fsdp_gives_the_losses_and_adapter_of_one_process(
    divided: Adapter, tmp_path: Path, tiny_base_folder: Path, server: Server
) -> None:
    """Prompts are shared, the last step has one row, and dev rows are answered: two in one process, one elsewhere."""
    whole = _trained(server, _project(tmp_path / "project", tiny_base_folder))
    assert whole.lineage["training"]["rows"] % 8 == 1
    assert (whole.lineage["training"]["bytes_held"], divided.lineage["training"]["processes"]) == (None, 2)
    _require_alike(whole, divided)


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
