"""Micro-batch size: chosen by a real pass, halved if memory runs out, with the gradients of the full step."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest
import torch

from making.training_runs import Heard, training_project
from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.generation.generate import in_memory
from tunewright.models.families import Shape
from tunewright.training import trainer as trainer_module
from tunewright.training.memory import MicroBatch, RawRows
from tunewright.training.packing import fused_loss
from tunewright.training.recomputation import RecomputedLayers

SHAPE = Shape(4, 64, 128, 4, 2, 16, 100, tied=True, attention_bias=False, mlp_bias=False)
Losses = Callable[..., torch.Tensor]


def _rows_of(batch: Any) -> int:
    return sum(len(block.suffixes) for block in batch.layout.blocks)


class _Held:
    def __call__(self, _grad: Any) -> None:
        pass


def _memory_for(monkeypatch: pytest.MonkeyPatch, rows: int, after: int = 0) -> list[int]:
    """From the pass numbered ``after`` on, memory holds ``rows`` rows; how many each pass had, those that failed too.

    It runs out in the backward pass, when half of the gradients have been added up already. What that pass held
    is freed before the next one.
    """
    passes: list[int] = []
    failed: list[weakref.ref[_Held]] = []
    original: Losses = fused_loss.batch_token_losses

    def losses_of(model: Any, batch: Any, *others: Any) -> torch.Tensor:
        if not model.training:
            return original(model, batch, *others)
        assert all(held() is None for held in failed)
        passes.append(_rows_of(batch))
        losses = original(model, batch, *others)
        if passes[-1] <= rows or len(passes) <= after:
            return losses
        first_layer = next(w for name, w in model.named_parameters() if "layers.0" in name and w.requires_grad)
        first_layer.register_hook(_out_of_memory)
        held, graph = _Held(), cast(Any, losses)
        graph.register_hook(held)  # it lives as long as what the pass has saved
        failed.append(weakref.ref(held))
        return losses

    def _out_of_memory(_grad: Any) -> None:
        if passes[-1] > rows:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            )

    monkeypatch.setattr(trainer_module, "batch_token_losses", losses_of)
    return passes


def _train(folder: Path, base: Path, **keys: Any) -> tuple[Any, list[str]]:
    heard = Heard()
    project = training_project(folder, base, heard, keys, count=80, epochs=1)
    return project.train().adapter, heard.lines


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Any, list[str]]:
    """The adapter and the messages of a run whose batches fit."""
    return _train(tmp_path_factory.mktemp("whole") / "p", tiny_base_folder)


def test_micro_batch_keeps_a_batch_that_fits_and_reports_it(whole: tuple[Any, list[str]]) -> None:
    adapter, lines = whole
    assert any(re.match(r"Micro-batch: 8 rows; the longest batch, [\d,]+ tokens, fits", line) for line in lines)
    assert adapter.lineage["training"]["micro_batch_size"] == 8
    assert not any("Liger" in line for line in lines), "there is no card"
    assert adapter.lineage["training"]["liger_kernels"] is False


class _Due(Thread):
    """A timer that is due at once."""

    def __init__(self, _seconds: float, function: Callable[..., None], arguments: tuple[str, ...]) -> None:
        super().__init__()
        function(*arguments)

    def cancel(self) -> None:
        pass


def test_slow_work_before_the_second_step_is_named_in_order(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.Timer", _Due)
    _, lines = _train(tmp_path / "p", tiny_base_folder)
    work = [line for line in lines if line.startswith(("Encoding", "Loading", "Computing", "Micro-batch"))]
    assert [line.split()[0] for line in work] == ["Encoding", "Loading", "Computing", "Micro-batch:", "Computing"]
    assert "8 rows" in work[2]
    assert work[4] == "Computing the first step"


@pytest.mark.parametrize(("asked", "after"), [(8, 3), pytest.param(4, 0, marks=pytest.mark.slow)])
def test_halved_micro_batches_give_the_gradients_of_the_step(
    whole: tuple[Any, list[str]],
    tmp_path: Path,
    tiny_base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int,
    after: int,
) -> None:
    """Memory runs out in the second step, or in the pass that probes it."""
    with monkeypatch.context() as patch:
        passes = _memory_for(patch, rows=2, after=after)
        halved, lines = _train(tmp_path / "halved", tiny_base_folder, micro_batch_size=asked)
    assert max(passes[after + 3 :]) <= 2
    assert halved.lineage["training"]["micro_batch_size"] == 2
    shown_text = [
        line for line in lines if "Micro-batch: 2 rows of the" in line or "This step is repeated with 2" in line
    ]
    assert shown_text
    expected, got = _weights(whole[0].folder), _weights(halved.folder)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=2e-3, atol=2e-5, msg=name)
    losses = [[row["loss"] for row in adapter.history if "loss" in row] for adapter in (whole[0], halved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_probing_pass_changes_nothing(tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, which draws random numbers, the adapter is that of a run whose micro-batch was known before."""
    tried, _ = _train(tmp_path / "tried", tiny_base_folder, lora_dropout=0.1)
    keep: Any = MicroBatch.__init__

    def known(self: MicroBatch, asked: int, work: Path, reporter: Any) -> None:
        keep(self, asked, work, reporter)
        self.rows = asked

    monkeypatch.setattr(MicroBatch, "__init__", known)
    untried, _ = _train(tmp_path / "untried", tiny_base_folder, lora_dropout=0.1)
    assert tried.digest == untried.digest


def test_halve_raises_when_one_row_does_not_fit(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _memory_for(monkeypatch, rows=0)
    with pytest.raises(UserError, match="Not enough memory") as caught:
        _train(tmp_path / "p", tiny_base_folder)
    assert "tunewright estimate-memory" in (caught.value.fix or "")


def test_resumed_run_keeps_its_micro_batch(tmp_path: Path) -> None:
    micro = MicroBatch(8, tmp_path, LogReporter())
    assert micro.rows is None
    assert micro.liger is None
    micro.liger = True
    micro.choose(4, 100)
    again, other = (MicroBatch(asked, tmp_path, LogReporter()) for asked in (8, 16))
    assert (again.rows, again.liger) == (4, True)
    assert (other.rows, other.liger) == (None, True)


def test_resumed_run_recomputes_as_many_layers(tmp_path: Path) -> None:
    def layers(asked: Any, *, auto: bool = False) -> RecomputedLayers:
        made = RecomputedLayers(TrainConfig(gradient_checkpointing=asked), SHAPE)
        made.auto = auto  # as on a GPU
        return made

    micro = MicroBatch(8, tmp_path, LogReporter())
    micro.set_layers(layers("none", auto=True))
    assert [micro.shrink(8, 1), micro.shrink(8, 1), micro.shrink(8, 1)] == [8, 8, 8], "2, 3 and 4 of 4 layers"
    assert micro.shrink(8, 2) == 4
    again = MicroBatch(8, tmp_path, LogReporter())
    again.set_layers(layers("none", auto=True))
    assert (again.rows, again.layers and again.layers.count) == (4, 4)
    # A number in the config is not replaced, and more layers than it asks for are not recomputed.
    again.set_layers(layers(1))
    assert again.layers is not None
    assert (again.layers.count, again.shrink(4, 3), again.layers.count) == (1, 2, 1)


def test_pieces_are_even_and_hold_every_row_once() -> None:
    rows = RawRows(tuple({"input_ids": [n], "labels": [n]} for n in range(7)))
    pieces = rows.pieces(3)
    assert [len(piece) for piece in pieces] == [2, 2, 3]
    assert [row for piece in pieces for row in piece] == list(rows.rows)


@pytest.mark.parametrize(
    ("message", "is_memory", "free"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB", True, None),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True, None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True, None),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True, None),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True, None),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", True, None),
        ("Triton Error [CUDA]: out of memory", True, None),
        ("mat1 and mat2 shapes cannot be multiplied", False, None),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False, None),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", False, None),
        # No handle can be made: on a full card for want of memory, else for a broken driver.
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True, 100 << 20),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", False, 4 << 30),
    ],
)
def test_in_memory_tells_exhausted_memory_from_other_errors(
    message: str, is_memory: bool, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError(message)

    if free is not None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 << 30))
    if is_memory:
        assert in_memory(fail) == (False, None)
        assert in_memory(lambda: torch.empty(1 << 50)) == (False, None), "torch's own allocator"
        return
    with pytest.raises(RuntimeError, match=re.escape(message)):
        in_memory(fail)
