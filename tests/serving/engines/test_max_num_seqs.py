"""The default of ``serve.max_num_seqs`` of each engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunewright.chat import open_chat
from tunewright.config import ChatConfig, Config, EngineName, ServeConfig
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.environment import Build, Environment
from tunewright.engines.vllm import engine as vllm_engine
from tunewright.models.bases import resolve_base
from tunewright.serving.engine_start import EngineSpec, max_num_seqs, start_engine


def _machine(monkeypatch: pytest.MonkeyPatch, build: Build, card: int | None) -> None:
    """vLLM is installed in this build; a card with ``card`` bytes."""
    found = Environment("vllm", Path("vllm"), build, {})
    monkeypatch.setattr(environment, "find", lambda tool: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=card))


@pytest.mark.parametrize(
    ("engine", "build", "card", "expected"),
    [
        ("peft", "cuda", 80 << 30, 16),
        ("llamacpp", "cuda", 80 << 30, 16),
        ("vllm", "cpu", None, 16),
        ("vllm", "cuda", 24 << 30, 128),
        ("vllm", "cuda", 80 << 30, 256),
        ("vllm", "cuda", None, 128),  # torch here is built without CUDA, vLLM's own is not
    ],
)
def test_max_batch_is_the_engines_default_when_the_config_has_none(
    engine: EngineName, build: Build, card: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, build, card)
    assert max_num_seqs(engine, Config()) == expected
    assert max_num_seqs(engine, Config(serve=ServeConfig(max_num_seqs=3))) == 3


def test_start_engine_passes_max_batch_to_vllm(monkeypatch: pytest.MonkeyPatch, tiny_base_folder: Path) -> None:
    _machine(monkeypatch, "cuda", 80 << 30)
    started: list[Any] = []

    def engine(settings: vllm_engine.VllmSettings, **_: Any) -> Any:
        started.append(settings.options())
        return SimpleNamespace()

    monkeypatch.setattr(vllm_engine, "VllmEngine", engine)
    base = resolve_base(str(tiny_base_folder), None, tiny_base_folder.parent, LogReporter())
    spec = EngineSpec(base, open_chat(base, ChatConfig(), LogReporter()), "none", {})
    start_engine("vllm", Config(), spec, LogReporter())
    (options,) = started
    assert options[options.index("--max-num-seqs") + 1] == "256"


def test_start_engine_starts_peft_with_sixteen(tiny_base_folder: Path) -> None:
    base = resolve_base(str(tiny_base_folder), None, tiny_base_folder.parent, LogReporter())
    spec = EngineSpec(base, open_chat(base, ChatConfig(), LogReporter()), "none", {})
    engine = start_engine("peft", Config(), spec, LogReporter())
    engine.stop()
    assert engine.max_num_seqs == 16
