"""An adapter alone as a GGUF file, for llama.cpp's ``--lora`` and Ollama's ``ADAPTER``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
from torch import Tensor

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.export.gguf.model import permuted_heads, require_gguf
from tunewright.export.gguf.tensors import FILE_TYPES, FileType, TensorFile, gguf_name, interleaved
from tunewright.export.weights import Weights
from tunewright.models.bases import Base
from tunewright.models.families import text_name
from tunewright.models.loading import text_settings


def write_lora(
    path: Path, name: str, weights: Weights, base: Base, file_type: FileType, reporter: Reporter
) -> list[str]:
    """Write the adapter's deltas of ``weights`` without the base.

    llama.cpp scales by alpha / rank, with one alpha for all layers. Any other scale of a layer (rsLoRA's, or a
    pattern's) is multiplied into its B.

    Returns:
        Notes for the user.

    Raises:
        UserError: DoRA, which llama.cpp does not support.
    """
    require_gguf(base)
    config = text_settings(base)
    if any(change.magnitude is not None for change in weights.changes.values()):
        raise UserError("llama.cpp does not support DoRA", where=name, fix="Export it merged: --merged.")
    first = next(iter(weights.changes.values()))
    alpha = first.scale * first.a.shape[0]
    file = TensorFile(path, file_type)
    file.writer.add_type(gguf.GGUFType.ADAPTER)
    file.writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    file.writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    file.writer.add_name(name)
    file.writer.add_file_type(FILE_TYPES[file_type])
    file.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor, change in weights.changes.items():
        into = gguf_name(str(text_name(tensor)), config.num_hidden_layers)
        own = change.scale * change.a.shape[0] / alpha
        file.add(f"{into}.lora_a", tuple(change.a.shape), _given(change.a))
        heads = permuted_heads(tensor, config)
        b = own * change.b
        file.add(f"{into}.lora_b", tuple(b.shape), _given(b if heads is None else interleaved(b, heads)))
    with reporter.task(f"writing {path.name}", 2 * len(weights.changes), "tensors") as task:
        file.write(task.advance)
    if not file.whole:
        return []
    return [f"{len(file.whole)} matrices are in f16: q8_0 needs rows of a multiple of 32 weights"]


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
