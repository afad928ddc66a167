"""An engine of each kind, from a base and adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from tunewright.chat import ChatFormat
from tunewright.config import Config, EngineName, Quantize
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.engines.protocol import Engine
from tunewright.models.bases import Base
from tunewright.models.families import FAMILIES
from tunewright.models.loading import context_length, load_model, named, text_settings
from tunewright.serving.isolation import TOLERANCE

LARGE_CARD = 70 * 10**9
"""Bytes of a card on which vLLM decodes 256 rows by default: an 80 GB card has room for their keys and values."""


@dataclass(frozen=True)
class Wanted:
    """What an engine is to hold.

    Args:
        quantize: how the base is held.
        adapters: folders by digest, loaded from the start.
        to_come: folders of adapters that will be loaded later, as far as they are known.
        spare: how many further adapters there has to be room for.
    """

    base: Base
    chat: ChatFormat
    quantize: Quantize
    adapters: Mapping[str, Path]
    to_come: tuple[Path, ...] = ()
    spare: int = 0


def start_engine(kind: EngineName, config: Config, wanted: Wanted, reporter: Reporter) -> Engine:
    """Return an engine that is ready, with the adapters loaded.

    Raises:
        UserError: the engine is not installed or does not start, or cannot hold this base or these adapters.
    """
    loaded = f" with {len(wanted.adapters)} of its adapters" if wanted.adapters else ""
    reporter.say(f"Loading {named(wanted.base, wanted.quantize)}{loaded}")
    match kind:
        case "peft":
            return _peft(config, wanted)
        case "vllm":
            return _vllm(config, wanted, reporter)
        case "llamacpp":
            return _llamacpp(config, wanted, reporter)


def max_batch(kind: EngineName, config: Config) -> int:
    """Return how many conversations the engine generates at once: the config's number, or the engine's default.

    Raises:
        UserError: the default of vLLM is asked for, and vLLM is not installed.
    """
    if config.serve.max_num_seqs is not None:
        return config.serve.max_num_seqs
    if kind == "vllm":
        import torch

        from tunewright.engines.vllm import environment

        if environment.find().build == "cuda":
            large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= LARGE_CARD
            return 256 if large else 128
    return 16


def tolerance(kind: EngineName, config: Config) -> float:
    """Nats by which an answer of this engine may fall short in the isolation test: by the rougher precision of two."""
    own = TOLERANCE[config.train.dtype]
    return max(own, TOLERANCE[config.serve.gguf]) if kind == "llamacpp" else own


def require_llamacpp() -> None:
    """Check that llama.cpp is installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("xllamacpp") is None:
        raise UserError(
            "the engine llamacpp is not installed", where="serve.engine", fix="pip install 'tunewright[llamacpp]'"
        )


def _peft(config: Config, wanted: Wanted) -> Engine:
    from tunewright.serving.engines.peft import PeftEngine

    engine = PeftEngine(
        load_model(wanted.base, config.train.dtype, wanted.quantize),
        stop_ids=wanted.chat.stop_ids,
        pad_id=wanted.chat.tokenizer.pad_token_id,
        max_batch=max_batch("peft", config),
        context_length=context_length(wanted.base),
    )
    return _with_adapters(engine, wanted.adapters)


def _vllm(config: Config, wanted: Wanted, reporter: Reporter) -> Engine:
    from tunewright.engines.vllm import environment
    from tunewright.engines.vllm.engine import VllmEngine, VllmSettings, kv_cache_bytes, max_rank

    if wanted.quantize == "nf4":
        raise UserError(
            "vLLM holds the base in 16 bits, and it is asked for in NF4",
            where="serve.quantization",
            fix="Serve with the engine peft; or set serve.quantization: none, and measure the adapter on that base "
            "first (evaluate.quantization: none), for it is another model.",
        )
    found = environment.find()
    cpu = found.build == "cpu"
    known = [*wanted.adapters.values(), *wanted.to_come]
    dtype, rows = config.train.dtype, max_batch("vllm", config)
    settings = VllmSettings(
        python=found.python,
        cpu=cpu,
        base=wanted.base.folder,
        dtype=dtype,
        room=max(1, len(known) + wanted.spare),
        # Of the adapters that will be trained, the config tells the rank.
        max_rank=max(max_rank(known), config.train.lora_r if wanted.spare else 1),
        max_batch=rows,
        kv_cache_bytes=kv_cache_bytes(text_settings(wanted.base).to_dict(), dtype, rows) if cpu else None,
        vision=FAMILIES[wanted.base.architecture].vision,
    )
    return _with_adapters(VllmEngine(settings, stop_ids=wanted.chat.stop_ids, reporter=reporter), wanted.adapters)


def _llamacpp(config: Config, wanted: Wanted, reporter: Reporter) -> Engine:
    require_llamacpp()
    if wanted.quantize == "nf4":
        raise UserError(
            "llama.cpp holds the base in f16 or q8_0, and it is asked for in NF4",
            where="serve.quantization",
            fix="Serve with the engine peft; or set serve.quantization: none, and measure the adapter on that base "
            "first (evaluate.quantization: none), for it is another model.",
        )
    import torch

    from tunewright.export.gguf.model import gguf_context, require_gguf
    from tunewright.serving.engines.llamacpp.engine import LlamaCppEngine, LlamaCppSettings, cache_tokens
    from tunewright.serving.engines.llamacpp.files import base_file, lora_file

    base, rows = wanted.base, max_batch("llamacpp", config)
    place = platformdirs.user_cache_path("tunewright") / "gguf"
    require_gguf(base)
    model_config = text_settings(base)
    longest = gguf_context(model_config)
    tokens = cache_tokens(model_config.to_dict(), longest, rows)
    context = min(longest, tokens)
    if context < model_config.max_position_embeddings:
        reporter.warn(f"llama.cpp has room for {context:,} tokens of a conversation; the base could have more")
    settings = LlamaCppSettings(
        base=base_file(place, base, wanted.chat.stop_ids, config.serve.gguf, reporter),
        lora_file=lambda digest, folder: lora_file(place, base, digest, folder, reporter),
        max_batch=rows,
        context=context,
        tokens=tokens,
        threads=torch.get_num_threads(),
    )
    return LlamaCppEngine(settings, wanted.adapters, stop_ids=wanted.chat.stop_ids, reporter=reporter)


def _with_adapters(engine: Engine, adapters: Mapping[str, Path]) -> Engine:
    """Return the engine with these loaded; it is stopped if that fails."""
    try:
        asyncio.run(load_all(engine, adapters))
    except BaseException:
        engine.stop()
        raise
    return engine


async def load_all(engine: Engine, adapters: Mapping[str, Path]) -> None:
    """Load adapters one after the other."""
    for digest, folder in adapters.items():
        await engine.load(digest, folder)
