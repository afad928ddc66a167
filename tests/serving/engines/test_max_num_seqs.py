"""The default of ``serve.max_num_seqs`` of each engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunewright.config import Config, EngineName, ServeConfig
from tunewright.engines import environment
from tunewright.engines.environment import Build, Environment
from tunewright.serving.engine_start import max_num_seqs


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
