"""torch.compile: when it is tried, that what is decided is repeated after a stop, and that the numbers stay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiny import build_base
from tunewright.errors import UserError
from tunewright.progress import LogReporter
from tunewright.training import compiling
from tunewright.training.compiling import FIRST_STEPS, Compile, _parts


class _Hears(LogReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("tunewright.training.compiling.time.monotonic", lambda: now.s)
    monkeypatch.setattr(compiling, "_has_compiler", lambda: True)
    return now


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(build_base(tmp_path_factory.mktemp("base") / "tiny"))


def _compiled(model: Any) -> bool:
    (state,) = {part._compiled_call_impl is not None for part in _parts(model)}
    return state


def _run(callback: Compile, model: Any, clock: Any, seconds: list[float], steps: int, first: int = 0) -> list[bool]:
    """Pretend steps of so many seconds; whether each was compiled."""
    callback.on_train_begin(None, SimpleNamespace(global_step=first, max_steps=steps), None, model=model)
    compiled = []
    for step, duration in enumerate(seconds, start=first + 1):
        compiled.append(_compiled(model))
        clock.s += duration
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=steps), None, model=model)
    return compiled


def test_a_short_run_is_not_compiled_and_says_why(tmp_path: Path, model: Any, clock: Any) -> None:
    hears = _Hears()
    assert not any(_run(Compile("auto", tmp_path, hears), model, clock, [1.0] * 30, steps=200))
    assert hears.said == [
        "Not compiled: 3 min of training are left, of which compiling would save about 4%, less than the 90 s that it "
        "costs."
    ]


def test_a_long_run_is_compiled_after_its_first_steps_and_again_after_a_stop(
    tmp_path: Path, model: Any, clock: Any
) -> None:
    hears = _Hears()
    seconds = [1.0] * (FIRST_STEPS + 1) + [60.0] + [0.9] * 20
    compiled = _run(Compile("auto", tmp_path, hears), model, clock, seconds, steps=20_000)
    assert compiled.index(True) == FIRST_STEPS + 1
    assert all(compiled[FIRST_STEPS + 1 :])
    assert hears.said[-1] == "Compiled: 1.00 s a step before, 0.90 s now."
    # Goes on from a checkpoint before and one after that step.
    assert _run(Compile("auto", tmp_path, hears), model, clock, [1.0] * 8, steps=20_000, first=4) == [
        step >= FIRST_STEPS + 1 for step in range(4, 12)
    ]
    assert all(_run(Compile("auto", tmp_path, hears), model, clock, [1.0] * 30, steps=20_000, first=40))


def test_what_does_not_pay_is_undone_and_stays_so(tmp_path: Path, model: Any, clock: Any) -> None:
    hears = _Hears()
    seconds = [1.0] * (FIRST_STEPS + 1) + [60.0] + [1.2] * 20
    compiled = _run(Compile("auto", tmp_path, hears), model, clock, seconds, steps=20_000)
    assert compiled[FIRST_STEPS + 1] is True
    assert compiled[-1] is False
    assert hears.said[-1] == "Compiling did not pay (1.00 s a step before, 1.20 s now): it is off again."
    undone = compiled.index(False, FIRST_STEPS + 1)
    again = _run(Compile("auto", tmp_path, hears), model, clock, [1.0] * 30, steps=20_000)
    assert again == [FIRST_STEPS + 1 <= step < undone for step in range(30)]


def test_off_is_off_and_on_is_on_from_the_first_step(tmp_path: Path, model: Any, clock: Any) -> None:
    assert not any(_run(Compile("off", tmp_path / "off", _Hears()), model, clock, [9e9] * 30, steps=10**6))
    assert all(_run(Compile("on", tmp_path / "on", _Hears()), model, clock, [1.0] * 3, steps=3))
    _run(Compile("off", tmp_path / "end", _Hears()), model, clock, [], steps=3)
    assert not _compiled(model)


def test_without_a_compiler_auto_says_so_and_on_is_refused(
    tmp_path: Path, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "_has_compiler", lambda: False)
    assert not any(_run(Compile("auto", tmp_path, LogReporter()), model, clock, [1.0] * 30, steps=20_000))
    assert "for want of a C++ compiler" in caplog.text
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        _run(Compile("on", tmp_path / "on", LogReporter()), model, clock, [1.0], steps=3)


@pytest.mark.skipif(not compiling._has_compiler(), reason="no C++ compiler is installed")
def test_compiled_blocks_compute_what_plain_ones_do(model: Any) -> None:
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
    for part in _parts(model):
        part.compile(dynamic=True)
    with torch.inference_mode():
        compiled = model(input_ids=ids).logits
    for part in _parts(model):
        part._compiled_call_impl = None
    torch.testing.assert_close(compiled, plain)
