"""Starts an engine of each kind with a base and adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.config import Config, EngineName, Quantization
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.interrupts import run_async
from tunewright.core.io import damage, digest, new_folder, seal
from tunewright.core.progress import Reporter
from tunewright.engines.pool import EnginePool
from tunewright.engines.protocol import AdapterFailedError, Engine, EngineStoppedError
from tunewright.models.bases import Base
from tunewright.models.families import reads_images
from tunewright.models.loading import context_length, load_model, named, text_settings

if TYPE_CHECKING:
    from tunewright.export.gguf.tensors import FileType

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
    """Return the server's engine with the adapters loaded: a local engine, or the engines at ``serve.engines``."""
    if config.serve.engines:
        reporter.say(f"Asking the engines at {', '.join(config.serve.engines)}")
        pool = EnginePool(config.serve.engines, spec.base.digest, spec.quantization, reporter)
        return _with_adapters(pool, spec.adapters)
    loaded = f" with {len(spec.adapters)} of its adapters" if spec.adapters else ""
    reporter.say(f"Loading {named(spec.base, spec.quantization)}{loaded}")
    match kind:
        case "peft":
            from tunewright.engines.peft import PeftEngine
            from tunewright.training.proving import proved

            engine = PeftEngine(
                load_model(proved(spec.base, reporter), config.train.dtype, spec.quantization),
                stop_ids=spec.chat.stop_ids,
                pad_id=spec.chat.tokenizer.pad_token_id,
                max_num_seqs=max_num_seqs("peft", config),
                context_length=context_length(spec.base),
            )
            return _with_adapters(engine, spec.adapters)
        case "vllm":
            return _vllm(config, spec, reporter)
        case "llamacpp":
            return _llamacpp(config, spec, reporter)


def max_num_seqs(kind: EngineName, config: Config) -> int:
    """Return the number of rows that the engine decodes at once: the config's number, or the engine's default."""
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
    """Check that llama.cpp is installed."""
    if find_spec("xllamacpp") is None:
        what = "The engine llamacpp is not installed"
        raise UserError(what, where="serve.engine", fix=install_command("llamacpp"))


def _vllm(config: Config, spec: EngineSpec, reporter: Reporter) -> Engine:
    from tunewright.engines import environment
    from tunewright.engines.vllm.engine import VllmEngine, VllmSettings, kv_cache_bytes, max_rank

    _refuse_nf4(spec, "vLLM", "16 bits")
    found = environment.find(environment.VLLM)
    cpu = found.build == "cpu"
    known = [*spec.adapters.values(), *spec.to_come]
    dtype, rows = config.train.dtype, max_num_seqs("vllm", config)
    if cpu and config.serve.gpu_adapters is not None:
        reporter.warn("serve.gpu_adapters is ignored: vLLM's build for the CPU has a slot for every adapter")
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
        gpu_adapters=config.serve.gpu_adapters,
        vision=reads_images(spec.base.architecture),
    )
    return _with_adapters(VllmEngine(settings, stop_ids=spec.chat.stop_ids, reporter=reporter), spec.adapters)


def _llamacpp(config: Config, spec: EngineSpec, reporter: Reporter) -> Engine:
    require_llamacpp()
    _refuse_nf4(spec, "llama.cpp", "f16 or q8_0")
    import torch

    from tunewright.chat.answers import constraint_end, grammar_compiler
    from tunewright.engines.llamacpp import LlamaCppEngine, LlamaCppSettings, cache_tokens
    from tunewright.export.gguf.model import gguf_context, require_gguf

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
        # Loaded one by one, so that the releases with a bad adapter are named and the other adapters are served.
        return LlamaCppEngine(settings, spec.adapters, stop_ids=spec.chat.stop_ids, reporter=reporter)


def _refuse_nf4(spec: EngineSpec, engine: str, precisions: str) -> None:
    if spec.quantization == "nf4":
        raise UserError(
            f"{engine} cannot hold the base in NF4, only in {precisions}",
            where="serve.quantization",
            fix="Use the engine peft. Or set serve.quantization: none, after evaluating the adapter on that base "
            "(evaluate.quantization: none): it is a different model.",
        )


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
    for own_digest, folder in adapters.items():
        await engine.load(own_digest, folder)


_FORMAT = 1
"""Increase it when the same weights are written differently."""


def base_file(
    place: Path,
    base: Base,
    pieces: Sequence[bytes | None],
    stop_ids: Collection[int],
    end_id: int,
    file_type: FileType,
    reporter: Reporter,
) -> Path:
    """Return the base's file, with a vocabulary for grammars only: llama.cpp gets ids and returns ids."""
    from tunewright.export.gguf.model import add_token_ids, write_model
    from tunewright.export.weights import Weights

    ends = [end_id, *sorted(set(stop_ids) - {end_id})]

    def write(path: Path) -> None:
        vocabulary = partial(add_token_ids, pieces, ends)
        write_model(path, base.spec, Weights(base, "float32", {}), base, vocabulary, file_type, reporter)

    tokens = digest([None if piece is None else piece.hex() for piece in pieces])
    made_of = {"base": base.digest, "stops": ends, "tokens": tokens, "type": file_type}
    return _cached(place / f"base-{digest([_FORMAT, made_of])[:24]}-{file_type}", write)


def lora_file(place: Path, base: Base, adapter: str, folder: Path, reporter: Reporter) -> Path:
    """Return an adapter's file in 16 bits; 8 bits would save little of a small file."""
    from tunewright.export.gguf.model import write_lora
    from tunewright.export.weights import Weights, read_deltas

    def write(path: Path) -> None:
        write_lora(path, folder.name, Weights(base, "float32", read_deltas(folder)), base, "f16", reporter)

    return _cached(place / f"lora-{digest([_FORMAT, {'base': base.digest, 'adapter': adapter}])[:24]}", write)


def _cached(folder: Path, write: Callable[[Path], None]) -> Path:
    if not folder.exists():
        with new_folder(folder) as temporary:
            write(temporary / "weights.gguf")
            seal(temporary)
    for fault in damage(folder):
        raise UserError(fault, where=str(folder), fix="Remove this folder; it is written again when needed.")
    return folder / "weights.gguf"
