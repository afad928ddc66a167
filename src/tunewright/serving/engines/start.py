"""An engine of each kind, from a base and adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.chat import ChatFormat
from tunewright.errors import UserError
from tunewright.models.bases import Base, read_config
from tunewright.models.loading import context_length, load_model, named, with_adapters
from tunewright.progress import Reporter
from tunewright.recipe import EngineName, Quantize, Recipe
from tunewright.serving.engines.protocol import Engine


@dataclass(frozen=True)
class Wanted:
    """What an engine is to hold.

    Args:
        quantize: how the base is held.
        adapters: folders by digest, loaded from the start.
        to_come: folders of adapters that will be loaded later, as far as they are known.
        spare: how many further adapters there has to be room for.
        alone: False where an oracle needs half of the memory of the GPU.
    """

    base: Base
    chat: ChatFormat
    quantize: Quantize
    adapters: Mapping[str, Path]
    to_come: tuple[Path, ...] = ()
    spare: int = 0
    alone: bool = True


def start_engine(kind: EngineName, recipe: Recipe, wanted: Wanted, reporter: Reporter) -> Engine:
    """An engine that is ready, with the adapters loaded.

    Raises:
        UserError: the engine is not installed or does not start, or cannot hold this base or these adapters.
    """
    loaded = f" with {len(wanted.adapters)} of its adapters" if wanted.adapters else ""
    reporter.say(f"Loading {named(wanted.base, wanted.quantize)}{loaded}")
    return _vllm(recipe, wanted, reporter) if kind == "vllm" else _peft(recipe, wanted)


def _peft(recipe: Recipe, wanted: Wanted) -> Engine:
    from tunewright.serving.engines.peft import PeftEngine

    model: Any = load_model(wanted.base, recipe.train.dtype, wanted.quantize)
    if wanted.adapters:
        model = with_adapters(model, wanted.adapters)
    return PeftEngine(
        model,
        stop_ids=wanted.chat.stop_ids,
        pad_id=wanted.chat.tokenizer.pad_token_id,
        max_batch=recipe.serve.max_batch,
        context_length=context_length(wanted.base),
    )


def _vllm(recipe: Recipe, wanted: Wanted, reporter: Reporter) -> Engine:
    from tunewright.serving.engines.vllm import environment
    from tunewright.serving.engines.vllm.engine import VllmEngine, VllmSettings, kv_cache_bytes, max_rank

    if wanted.quantize == "nf4":
        raise UserError(
            "vLLM holds the base in 16 bits, and it is asked for in NF4",
            where="serve.quantize",
            fix="Serve with the engine peft; or set serve.quantize: none, and measure the adapter on that base first "
            "(evaluate.quantize: none), for it is another model.",
        )
    found = environment.find()
    cpu = found.build == "cpu"
    known = [*wanted.adapters.values(), *wanted.to_come]
    dtype = recipe.train.dtype
    settings = VllmSettings(
        python=found.python,
        cpu=cpu,
        base=wanted.base.folder,
        dtype=dtype,
        room=max(1, len(known) + wanted.spare),
        # Of the adapters that will be trained, the recipe tells the rank.
        max_rank=max(max_rank(known), recipe.train.rank if wanted.spare else 1),
        max_batch=recipe.serve.max_batch,
        kv_cache_bytes=kv_cache_bytes(read_config(wanted.base.folder / "config.json"), dtype, recipe.serve.max_batch)
        if cpu
        else None,
        gpu_share=None if cpu or wanted.alone else 0.45,
    )
    engine = VllmEngine(settings, stop_ids=wanted.chat.stop_ids, reporter=reporter)
    try:
        asyncio.run(load_all(engine, wanted.adapters))
    except BaseException:
        engine.stop()
        raise
    return engine


async def load_all(engine: Engine, adapters: Mapping[str, Path]) -> None:
    """Load adapters one after the other."""
    for digest, folder in adapters.items():
        await engine.load(digest, folder)
