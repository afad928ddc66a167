"""Micro-batch size: chosen by a real pass, halved if memory runs out, with the gradients of the full step."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tunewright
from command_line import tiny_project
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.generation.generate import in_memory
from tunewright.training import trainer as trainer_module
from tunewright.training.micro_batch import MicroBatch, RawRows
from tunewright.training.packing import fused_loss

Losses = Callable[..., torch.Tensor]


class _Heard(LogReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(message)


def _rows_of(batch: Any) -> int:
    return sum(len(block.suffixes) for block in batch.layout.blocks)


def _memory_for(monkeypatch: pytest.MonkeyPatch, rows: int, after: int = 0) -> list[int]:
    """From the pass numbered ``after`` on, memory holds ``rows`` rows; how many each pass had, those that failed too.

    It runs out in the backward pass, when half of the gradients have been added up already.
    """
    passes: list[int] = []
    original: Losses = fused_loss.batch_token_losses

    def losses_of(model: Any, batch: Any, *others: Any) -> torch.Tensor:
        if not model.training:
            return original(model, batch, *others)
        passes.append(_rows_of(batch))
        losses = original(model, batch, *others)
        if passes[-1] <= rows or len(passes) <= after:
            return losses
        first_layer = next(w for name, w in model.named_parameters() if "layers.0" in name and w.requires_grad)
        first_layer.register_hook(_out_of_memory)
        return losses

    def _out_of_memory(_grad: Any) -> None:
        if passes[-1] > rows:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            )

    monkeypatch.setattr(trainer_module, "batch_token_losses", losses_of)
    return passes


def _project(folder: Path, base: Path, **train: Any) -> Path:
    tiny_project(folder, base, count=80)
    config = folder / "tunewright.yaml"
    keys = "".join(f"  {key}: {value}\n" for key, value in train.items())
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 1").replace("train:\n", f"train:\n{keys}"))
    tunewright.open(folder).data.add([folder / "pairs.jsonl"])
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def _train(folder: Path) -> tuple[Any, list[str]]:
    heard = _Heard()
    return tunewright.open(folder, heard).train().adapter, heard.lines


def test_micro_batch_keeps_a_batch_that_fits_and_reports_it(tmp_path: Path, tiny_base_folder: Path) -> None:
    adapter, lines = _train(_project(tmp_path / "p", tiny_base_folder))
    assert any(re.match(r"Micro-batch: 8 rows; the longest batch, [\d,]+ tokens, fits", line) for line in lines)
    assert adapter.lineage["training"]["micro_batch_size"] == 8


@pytest.fixture(scope="module", params=[8, 4])
def in_one_pass(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path
) -> Any:
    """Return an adapter whose micro-batches, of this size, fit."""
    folder = tmp_path_factory.mktemp("whole") / "project"
    return _train(_project(folder, tiny_base_folder, micro_batch_size=request.param))[0]


@pytest.mark.parametrize("after", [0, 3])
def test_halved_micro_batches_give_the_gradients_of_the_step(
    in_one_pass: Any, tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole, asked = in_one_pass, in_one_pass.lineage["training"]["micro_batch_size"]
    with monkeypatch.context() as patch:
        passes = _memory_for(patch, rows=2, after=after)
        halved, lines = _train(_project(tmp_path / "halved", tiny_base_folder, micro_batch_size=asked))
    assert max(passes[after + 3 :]) <= 2
    assert halved.lineage["training"]["micro_batch_size"] == 2
    shown_text = [
        line for line in lines if "Micro-batch: 2 rows of the" in line or "This step is repeated with 2" in line
    ]
    assert shown_text
    expected, got = _weights(whole.folder), _weights(halved.folder)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=2e-3, atol=2e-5, msg=name)
    losses = [[row["loss"] for row in adapter.history if "loss" in row] for adapter in (whole, halved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_probing_pass_changes_nothing(tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, which draws random numbers, the adapter is that of a run whose micro-batch was known before."""
    tried, _ = _train(_project(tmp_path / "tried", tiny_base_folder, lora_dropout=0.1))
    keep: Any = MicroBatch.__init__

    def known(self: MicroBatch, asked: int, work: Path, reporter: Any) -> None:
        keep(self, asked, work, reporter)
        self.rows = asked

    monkeypatch.setattr(MicroBatch, "__init__", known)
    untried, _ = _train(_project(tmp_path / "untried", tiny_base_folder, lora_dropout=0.1))
    assert tried.digest == untried.digest


def test_halve_raises_when_one_row_does_not_fit(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _project(tmp_path / "p", tiny_base_folder)
    _memory_for(monkeypatch, rows=0)
    with pytest.raises(UserError, match="Not enough memory") as caught:
        _train(folder)
    assert "tunewright estimate-memory" in (caught.value.fix or "")


def test_resumed_run_keeps_its_micro_batch(tmp_path: Path) -> None:
    micro = MicroBatch(8, tmp_path, LogReporter())
    assert micro.rows is None
    micro.choose(4, 100)
    assert MicroBatch(8, tmp_path, LogReporter()).rows == 4
    assert MicroBatch(16, tmp_path, LogReporter()).rows is None


def test_pieces_are_even_and_hold_every_row_once() -> None:
    rows = RawRows(tuple({"input_ids": [n], "labels": [n]} for n in range(7)))
    pieces = rows.pieces(3)
    assert [len(piece) for piece in pieces] == [2, 2, 3]
    assert [row for piece in pieces for row in piece] == list(rows.rows)


def _fail(message: str) -> None:
    raise RuntimeError(message)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_in_memory_reports_exhausted_memory_when_a_library_says_so(message: str) -> None:
    assert in_memory(partial(_fail, message)) == (False, None)


@pytest.mark.parametrize(
    "message",
    [
        "mat1 and mat2 shapes cannot be multiplied",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_in_memory_raises_other_errors(message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        in_memory(partial(_fail, message))


@pytest.mark.parametrize(("free", "is_full"), [(100 << 20, True), (4 << 30, False)])
def test_in_memory_reports_exhausted_memory_when_no_handle_can_be_made_on_a_full_card(
    free: int, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 << 30))
    work = partial(_fail, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    if not is_full:
        with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
            in_memory(work)
        return
    assert in_memory(work) == (False, None)
