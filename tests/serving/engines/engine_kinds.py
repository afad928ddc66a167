"""Each kind of engine over the small base, started the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from small_models import CONTEXT
from tiny import byte_tokenizer
from tunewright.progress import LogReporter
from tunewright.serving.engines.protocol import Engine
from tunewright.serving.engines.vllm import environment
from tunewright.serving.engines.vllm.engine import VllmEngine, VllmSettings

TOKENIZER = byte_tokenizer()
STOPS = frozenset({TOKENIZER.eos_token_id})
ROOM = 3


@contextmanager
def peft_engine(base: Path) -> Iterator[Engine]:
    """The embedded engine."""
    from transformers import LlamaForCausalLM

    from tunewright.serving.engines.peft import PeftEngine

    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    engine = PeftEngine(model, stop_ids=STOPS, pad_id=TOKENIZER.pad_token_id, max_batch=16, context_length=CONTEXT)
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def vllm_engine(base: Path, kind: type[VllmSettings] = VllmSettings, **settings: Any) -> Iterator[VllmEngine]:
    """vLLM in its own environment, which `make test-vllm` makes."""
    found = environment.find()
    asked: dict[str, Any] = {
        "dtype": "float32",
        "room": ROOM,
        "max_rank": 4,
        "max_batch": 16,
        "kv_cache_bytes": 64 << 20,
        **settings,
    }
    of = kind(python=found.python, cpu=found.build == "cpu", base=base, **asked)
    engine = VllmEngine(of, stop_ids=STOPS, reporter=LogReporter())
    try:
        yield engine
    finally:
        engine.stop()


KINDS = [pytest.param(peft_engine, id="peft"), pytest.param(vllm_engine, id="vllm", marks=pytest.mark.vllm)]
