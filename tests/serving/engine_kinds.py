"""Starts each kind of engine on the small base, and tests its isolation."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from making.engine_models import CONTEXT
from making.tiny_bases import byte_tokenizer
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from tunewright.engines.pool import EnginePool
from tunewright.engines.protocol import Engine
from tunewright.engines.vllm.engine import VllmEngine, VllmSettings
from tunewright.gate.answers import Digest, PeftReference
from tunewright.gate.isolation import TOLERANCE, check_isolation
from tunewright.gate.results import IsolationResult
from tunewright.generation.constraints import GrammarCompiler
from tunewright.models.bases import Base
from tunewright.serving.engine_service import EngineApp, EngineOrigin
from tunewright.serving.engine_start import base_file, lora_file
from tunewright.serving.gateway.server import serving

TOKENIZER = byte_tokenizer()
STOPS = frozenset({TOKENIZER.eos_token_id})
ROOM = 3
COMPILER = GrammarCompiler(TOKENIZER, STOPS)
PIECES = COMPILER.token_bytes
PROMPTS = tuple(
    tuple(TOKENIZER(text).input_ids)
    for text in ("Mobile County", "Where is it?", "a", "The quick brown fox", "Give the citation.", "42 U.S.C.")
)


@contextmanager
def peft_engine(base: Path, *, own_cache: bool = True) -> Iterator[Engine]:
    """The embedded engine, with our key/value cache or with transformers'."""
    from transformers import LlamaForCausalLM

    from tunewright.engines.peft import PeftEngine

    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    model.own_cache = own_cache
    engine = PeftEngine(model, stop_ids=STOPS, pad_id=TOKENIZER.pad_token_id, max_num_seqs=16, context_length=CONTEXT)
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def pool_engine(base: Path) -> Iterator[Engine]:
    """Two embedded engines at addresses, as one engine."""

    def locate(name: str, _digest: str) -> Path:
        return next(place / name for place in (base.parent, base.parent.parent) if (place / name).exists())

    with ExitStack() as started:
        origin = EngineOrigin("base", "none", "float32", {}, "")
        apps = [EngineApp(started.enter_context(peft_engine(base)), origin, locate, COMPILER) for _ in range(2)]
        urls = [started.enter_context(serving(app.app)) for app in apps]
        pool = EnginePool(urls, "base", "none", LogReporter())
        started.callback(pool.stop)
        yield pool


@contextmanager
def vllm_engine(base: Path, kind: type[VllmSettings] = VllmSettings, **settings: Any) -> Iterator[VllmEngine]:
    """vLLM in its own environment, which `make test-vllm` makes."""
    found = environment.find(environment.VLLM)
    asked: dict[str, Any] = {
        "dtype": "float32",
        "room": ROOM,
        "max_rank": 4,
        "max_num_seqs": 16,
        "kv_cache_bytes": 64 << 20,
        **settings,
    }
    of = kind(python=found.python, cpu=found.build == "cpu", base=base, **asked)
    engine = VllmEngine(of, stop_ids=STOPS, reporter=LogReporter())
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def llamacpp_engine(
    base: Path,
    kind: type[LlamaCppEngine] = LlamaCppEngine,
    started: type[LlamaCppSettings] = LlamaCppSettings,
    stop_ids: Collection[int] = STOPS,
    **settings: Any,
) -> Iterator[Engine]:
    """Start llama.cpp on the base in f16, with its files next to the base."""
    opened = Base("small", base, None, "LlamaForCausalLM", {})
    place, reporter = base.parent / "gguf", LogReporter()
    asked: dict[str, Any] = {"max_num_seqs": 16, "context": CONTEXT, "tokens": 16 * CONTEXT, "threads": 1, **settings}
    of = started(
        base=base_file(place, opened, PIECES, stop_ids, min(stop_ids), "f16", reporter),
        lora_file=lambda digest, folder: lora_file(place, opened, digest, folder, reporter),
        **asked,
    )
    engine = kind(of, {}, stop_ids=stop_ids, reporter=reporter)
    try:
        yield engine
    finally:
        engine.stop()


KINDS = [
    pytest.param(peft_engine, id="peft"),
    pytest.param(partial(peft_engine, own_cache=False), id="peft-plain"),
    pytest.param(pool_engine, id="pool"),
    pytest.param(llamacpp_engine, id="llamacpp"),
    pytest.param(vllm_engine, id="vllm", marks=pytest.mark.vllm),
]


def reference_of(base: Path, adapters: dict[str, Path]) -> PeftReference:
    """Return what says how these models answer, apart from any engine."""
    small = Base("small", base, None, "LlamaForCausalLM", {})
    return PeftReference(small, "float32", "none", adapters, stop_ids=STOPS)


async def load_all(engine: Engine, adapters: dict[str, Path]) -> None:
    for digest, folder in adapters.items():
        await engine.load(digest, folder)


def isolation_of(engine: Engine, reference: PeftReference, adapters: dict[str, Path]) -> IsolationResult:
    """Return the isolation test's result; the adapters are loaded at its end."""
    asyncio.run(load_all(engine, adapters))
    names: dict[Digest, str] = {None: "base", **{digest: f"adapter {digest[:6]}" for digest in adapters}}
    return check_isolation(
        lambda: nullcontext(engine),
        reference,
        adapters,
        PROMPTS,
        context=engine.context_length,
        tolerance=TOLERANCE["float32"],
        names=names,
        reporter=LogReporter(),
    )


def failed(result: IsolationResult) -> set[str]:
    """Return the checks that failed."""
    return {check.name for check in result.checks if check.wrong}
