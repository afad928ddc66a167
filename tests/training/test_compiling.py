"""torch.compile: when it is tried, that what is decided is repeated after a stop, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiny import build_base
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
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
    monkeypatch.setattr(compiling, "missing", lambda _: [])
    monkeypatch.setattr(compiling, "failure", lambda _: None)
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
    monkeypatch.setattr(compiling, "missing", lambda _: ["a C++ compiler (g++)"])
    assert not any(_run(Compile("auto", tmp_path, LogReporter()), model, clock, [1.0] * 30, steps=20_000))
    assert "for want of a C++ compiler" in caplog.text
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        _run(Compile("on", tmp_path / "on", LogReporter()), model, clock, [1.0], steps=3)


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A C++ compiler that is there and compiles nothing, and a clock for `_run`."""
    import torch._inductor.config

    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("tunewright.training.compiling.time.monotonic", lambda: now.s)
    monkeypatch.setattr(compiling, "missing", lambda _: [])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/bin/false",)}):
        yield now
    torch._dynamo.reset()


def test_auto_trains_on_without_compiling_when_the_compiler_fails(
    tmp_path: Path, model: Any, broken_compiler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "run"
    assert not any(_run(Compile("auto", work, LogReporter()), model, broken_compiler, [1.0] * 30, steps=20_000))
    assert "Not compiled, since torch.compile fails here: " in caplog.text
    assert compiling.decided_in(work) == {"from_step": None, "until_step": None}
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_on_is_refused_before_the_first_step_when_the_compiler_fails(
    tmp_path: Path, model: Any, broken_compiler: Any
) -> None:
    with pytest.raises(UserError, match=r"train\.torch_compile: torch\.compile fails here"):
        _run(Compile("on", tmp_path / "run", LogReporter()), model, broken_compiler, [1.0], steps=3)


def test_auto_does_not_compile_on_a_card_and_says_so(tmp_path: Path) -> None:
    hears = _Hears()
    card = SimpleNamespace(device=torch.device("cuda"), get_decoder=lambda: SimpleNamespace(layers=[]))
    callback = Compile("auto", tmp_path, hears)
    for _ in range(2):
        callback.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=10**6), None, model=card)
    assert hears.said == [
        "Not compiled: what compiling saves on a card has not been measured. train.torch_compile: 'on' compiles."
    ]


@pytest.mark.parametrize(
    ("lacks", "expected"),
    [
        ("triton", ["Triton"]),
        ("gcc clang", ["a C compiler (gcc)"]),
        ("Python.h", ["Python's header files (Python.h)"]),
        ("nothing", []),
    ],
)
def test_missing_names_what_a_card_needs(
    lacks: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling, "find_spec", lambda name: None if name in lacks else object())
    monkeypatch.setattr("shutil.which", lambda name: None if name in lacks.split() else name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    if lacks != "Python.h":
        (tmp_path / "Python.h").touch()
    assert compiling.missing("cuda") == expected


@pytest.mark.skipif(bool(compiling.missing("cpu")), reason="no C++ compiler is installed")
def test_failure_finds_nothing_when_the_compiler_works(model: Any) -> None:
    assert compiling.failure(model) is None
    assert not _compiled(model)


@pytest.mark.skipif(bool(compiling.missing("cpu")), reason="no C++ compiler is installed")
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
