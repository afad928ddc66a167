"""Starts an engine of each kind with a base and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.config import Config, EngineName, Quantization
from tunewright.core.errors import UserError
from tunewright.core.interrupts import run_async
from tunewright.core.progress import Reporter
from tunewright.engines.protocol import AdapterFailedError, Engine, EngineStoppedError
from tunewright.models.bases import Base
from tunewright.models.families import FAMILIES
from tunewright.models.loading import context_length, load_model, named, text_settings
from tunewright.serving.engines.pool import EnginePool

LARGE_CARD = 70 * 10**9
"""GPU memory from which vLLM decodes 256 rows by default: an 80 GB card has room for their keys and values."""


@dataclass(frozen=True)
class EngineSpec:
    """The models of an engine.

    Args:
        quantization: the precision of the base's weights.
        adapters: folders by digest, loaded at the start.
        to_come: known folders of adapters that will be loaded later.
        spare: the number of further adapters to reserve room for.
    """

    base: Base
    chat: ChatFormat
    quantization: Quantization
    adapters: Mapping[str, Path]
    to_come: tuple[Path, ...] = ()
    spare: int = 0


def start_engine(kind: EngineName, config: Config, spec: EngineSpec, reporter: Reporter) -> Engine:
    """Return the server's engine with the adapters loaded: one here, or those at ``serve.engines``.

    Raises:
        UserError: the engine is not installed, does not start, or cannot hold this base or these adapters; or as for
            :class:`tunewright.serving.engines.pool.EnginePool`.
    """
    if config.serve.engines:
        reporter.say(f"Asking the engines at {', '.join(config.serve.engines)}")
        pool = EnginePool(config.serve.engines, spec.base.digest, spec.quantization, reporter)
        return _with_adapters(pool, spec.adapters)
    loaded = f" with {len(spec.adapters)} of its adapters" if spec.adapters else ""
    reporter.say(f"Loading {named(spec.base, spec.quantization)}{loaded}")
    match kind:
        case "peft":
            return _peft(config, spec)
        case "vllm":
            return _vllm(config, spec, reporter)
        case "llamacpp":
            return _llamacpp(config, spec, reporter)


def max_num_seqs(kind: EngineName, config: Config) -> int:
    """Return the number of rows that the engine decodes at once: the config's number, or the engine's default.

    Raises:
        UserError: the default depends on vLLM, and vLLM is not installed.
    """
    if config.serve.max_num_seqs is not None:
        return config.serve.max_num_seqs
    if kind == "vllm":
        import torch

        from tunewright.engines import environment

        if environment.find(environment.VLLM).build == "cuda":
            large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= LARGE_CARD
            return 256 if large else 128
    return 16


def require_llamacpp() -> None:
    """Check that llama.cpp is installed.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("xllamacpp") is None:
        raise UserError(
            "The engine llamacpp is not installed", where="serve.engine", fix="pip install 'tunewright[llamacpp]'"
        )


def _peft(config: Config, spec: EngineSpec) -> Engine:
    from tunewright.serving.engines.peft import PeftEngine

    engine = PeftEngine(
        load_model(spec.base, config.train.dtype, spec.quantization),
        stop_ids=spec.chat.stop_ids,
        pad_id=spec.chat.tokenizer.pad_token_id,
        max_num_seqs=max_num_seqs("peft", config),
        context_length=context_length(spec.base),
    )
    return _with_adapters(engine, spec.adapters)


def _vllm(config: Config, spec: EngineSpec, reporter: Reporter) -> Engine:
    from tunewright.engines import environment
    from tunewright.engines.vllm.engine import VllmEngine, VllmSettings, kv_cache_bytes, max_rank

    if spec.quantization == "nf4":
        raise UserError(
            "vLLM cannot hold the base in NF4, only in 16 bits",
            where="serve.quantization",
            fix="Use the engine peft. Or set serve.quantization: none, after evaluating the adapter on that base "
            "(evaluate.quantization: none): it is a different model.",
        )
    found = environment.find(environment.VLLM)
    cpu = found.build == "cpu"
    known = [*spec.adapters.values(), *spec.to_come]
    dtype, rows = config.train.dtype, max_num_seqs("vllm", config)
    settings = VllmSettings(
        python=found.python,
        cpu=cpu,
        base=spec.base.folder,
        dtype=dtype,
        room=max(1, len(known) + spec.spare),
        # Adapters trained later have the config's rank.
        max_rank=max(max_rank(known), config.train.lora_r if spec.spare else 1),
        max_num_seqs=rows,
        kv_cache_bytes=kv_cache_bytes(text_settings(spec.base).to_dict(), dtype, rows) if cpu else None,
        vision=FAMILIES[spec.base.architecture].vision,
    )
    return _with_adapters(VllmEngine(settings, stop_ids=spec.chat.stop_ids, reporter=reporter), spec.adapters)


def _llamacpp(config: Config, spec: EngineSpec, reporter: Reporter) -> Engine:
    require_llamacpp()
    if spec.quantization == "nf4":
        raise UserError(
            "llama.cpp cannot hold the base in NF4, only in f16 or q8_0",
            where="serve.quantization",
            fix="Use the engine peft. Or set serve.quantization: none, after evaluating the adapter on that base "
            "(evaluate.quantization: none): it is a different model.",
        )
    import torch

    from tunewright.chat.answers import constraint_end, grammar_compiler
    from tunewright.export.gguf.model import gguf_context, require_gguf
    from tunewright.serving.engines.llamacpp.engine import LlamaCppEngine, LlamaCppSettings, cache_tokens
    from tunewright.serving.engines.llamacpp.files import base_file, lora_file

    base, rows = spec.base, max_num_seqs("llamacpp", config)
    place = platformdirs.user_cache_path("tunewright") / "gguf"
    require_gguf(base)
    model_config = text_settings(base)
    longest = gguf_context(model_config)
    tokens = cache_tokens(model_config.to_dict(), longest, rows)
    context = min(longest, tokens)
    if context < model_config.max_position_embeddings:
        reporter.warn(f"The context is limited to {context:,} tokens, less than the base's, by llama.cpp's cache")
    settings = LlamaCppSettings(
        base=base_file(
            place,
            base,
            grammar_compiler(spec.chat).token_bytes,
            spec.chat.stop_ids,
            constraint_end(spec.chat),
            config.serve.gguf,
            reporter,
        ),
        lora_file=lambda digest, folder: lora_file(place, base, digest, folder, reporter),
        max_num_seqs=rows,
        context=context,
        tokens=tokens,
        threads=torch.get_num_threads(),
    )
    try:
        # All of them in one start: a load restarts llama.cpp.
        adapters = {**spec.adapters, **{adapter_digest(folder): folder for folder in spec.to_come}}
        return LlamaCppEngine(settings, adapters, stop_ids=spec.chat.stop_ids, reporter=reporter)
    except (UserError, OSError):
        if not spec.to_come:
            raise
        # Loaded one by one, so that the releases with a bad adapter are named and the others served.
        return LlamaCppEngine(settings, spec.adapters, stop_ids=spec.chat.stop_ids, reporter=reporter)


def _with_adapters(engine: Engine, adapters: Mapping[str, Path]) -> Engine:
    """Return the engine with these adapters loaded; stop it if that fails."""
    try:
        run_async(load_all(engine, adapters))
    except BaseException as error:
        engine.stop()
        if isinstance(error, EngineStoppedError | AdapterFailedError):
            raise UserError(f"The adapters could not be loaded: {error}", fix="Read the engine's log.") from error
        raise
    return engine


async def load_all(engine: Engine, adapters: Mapping[str, Path]) -> None:
    """Load adapters one by one."""
    for digest, folder in adapters.items():
        await engine.load(digest, folder)
