"""K-quants: which type each matrix gets in a Q4_K_M or Q5_K_M file, and llama.cpp's own conversion to it.

The wheel of llama.cpp has the conversion of rows (``ggml_quantize_chunk``) but not the tool around it, which chooses
the types. The choice here is that of ``llama_tensor_get_type`` in llama.cpp's ``src/llama-quant.cpp``, for dense Llamas
and without an importance matrix. Files therefore have the same types as published ones.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tunewright.core.errors import UserError

_Kind = gguf.GGMLQuantizationType
_FALLBACKS = {_Kind.Q4_K: _Kind.Q5_0, _Kind.Q5_K: _Kind.Q5_1, _Kind.Q6_K: _Kind.Q8_0}
"""Types with blocks of 32 for rows that are not a multiple of 256 weights."""
_DEFAULTS = {"q4_k_m": _Kind.Q4_K, "q5_k_m": _Kind.Q5_K}


@dataclass(frozen=True)
class Mixture:
    """The types of a model's matrices."""

    file_type: str
    """q4_k_m or q5_k_m."""
    layers: int
    tied: bool
    """The input embedding is also the output matrix."""
    shared_heads: bool
    """Several query heads share a value head."""

    def kind(self, name: str, columns: int) -> gguf.GGMLQuantizationType:
        """Return the type of the matrix ``name`` (as GGUF names it) with rows of this length."""
        wanted = self._wanted(name, columns)
        if columns % gguf.GGML_QUANT_SIZES[wanted][0] == 0:
            return wanted
        other = _FALLBACKS.get(wanted, wanted)
        return other if columns % gguf.GGML_QUANT_SIZES[other][0] == 0 else _Kind.F16

    def _wanted(self, name: str, columns: int) -> gguf.GGMLQuantizationType:
        default = _DEFAULTS[self.file_type]
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return _Kind.Q6_K if columns % gguf.GGML_QUANT_SIZES[default][0] == 0 else _Kind.Q8_0
        values = name.endswith(".attn_v.weight")
        if (values or name.endswith(".ffn_down.weight")) and self._gets_more_bits(int(name.split(".")[1])):
            return _Kind.Q6_K
        # In a 70B the value matrices are an eighth of the others, so that a bit more is almost free.
        if values and self.layers == 80 and self.shared_heads and default == _Kind.Q4_K:
            return _Kind.Q5_K
        return default

    def _gets_more_bits(self, layer: int) -> bool:
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


def quantize_rows(rows: NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return rows [rows, columns] as llama.cpp converts them: [rows, bytes].

    Raises:
        UserError: llama.cpp is not installed, or its library has no such function.
    """
    convert = _library()
    block, size = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = source.shape
    assert columns % block == 0, (columns, kind)
    out = np.empty((count, columns // block * size), dtype=np.uint8)
    threads = os.cpu_count() or 1
    cuts = [count * part // threads for part in range(threads + 1)]

    def convert_part(part: int) -> int:
        first, number = cuts[part], cuts[part + 1] - cuts[part]
        # Arguments: type, all rows, all output, first weight, rows, weights a row, no importance matrix.
        return int(convert(int(kind), source.ctypes.data, out.ctypes.data, first * columns, number, columns, None))

    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(convert_part, range(threads)))
    assert written == out.nbytes, (written, out.nbytes)
    return out


@cache
def _library() -> Any:
    found = find_spec("xllamacpp.xllamacpp") if find_spec("xllamacpp") else None
    if found is None or found.origin is None:
        raise UserError("llama.cpp is not installed", where="xllamacpp", fix="pip install 'tunewright[gguf]'")
    try:
        convert = ctypes.CDLL(found.origin).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise UserError(
            f"This llama.cpp cannot convert weights: {error}", where=found.origin, fix="Use --type q8_0."
        ) from error
    convert.restype = ctypes.c_size_t
    whole = ctypes.c_int64
    convert.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, whole, whole, whole, ctypes.c_void_p]
    return convert
