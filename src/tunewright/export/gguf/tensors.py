"""Weights in GGUF: other names, another row order of queries and keys, and other number types."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.export import FileType as FileType
from tunewright.gate.results import Precision

_Kind = gguf.GGMLQuantizationType
_FALLBACKS = {_Kind.Q4_K: _Kind.Q5_0, _Kind.Q5_K: _Kind.Q5_1, _Kind.Q6_K: _Kind.Q8_0}
"""Types with blocks of 32 for rows that are not a multiple of 256 weights."""
_DEFAULTS = {"q4_k_m": _Kind.Q4_K, "q5_k_m": _Kind.Q5_K}


@dataclass(frozen=True)
class Mixture:
    """The types of a model's matrices, as llama.cpp chooses them (`llama_tensor_get_type`), so that files are alike."""

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
        # In a 70B the value matrices are an eighth of the other matrices, so a bit more is almost free.
        if values and self.layers == 80 and self.shared_heads and default == _Kind.Q4_K:
            return _Kind.Q5_K
        return default

    def _gets_more_bits(self, layer: int) -> bool:
        # llama.cpp's `use_more_bits`: rounding the first and the last layers costs most, and a
        # third of the layers between.
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


def quantize_rows(rows: NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return rows [rows, columns] as llama.cpp converts them: [rows, bytes]."""
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
        raise UserError("llama.cpp is not installed", where="xllamacpp", fix=install_command("gguf"))
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


ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]
FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
}
PRECISIONS: dict[FileType, Precision] = {"f16": "16-bit", "q8_0": "8-bit", "q4_k_m": "4-bit", "q5_k_m": "5-bit"}
"""The limits that a file of each type is compared with."""
_BLOCK, _SUPER_BLOCK = 32, 256
"""Weights of a row that share one scale in Q8_0, and a block of scales in K-quants."""
_UNQUANTIZED = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def gguf_name(name: str, layers: int) -> str:
    """Return a tensor's name in GGUF."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"llama.cpp has no tensor {name} for a Llama", where="GGUF")
    return str(found)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return rows of queries or keys [heads * size, ...] in llama.cpp's rotary order.

    transformers rotates the first half of each head against the second; llama.cpp rotates neighbours, as Meta's own
    code does::

        transformers   x0 x1 .. | y0 y1 ..        llama.cpp   x0 y0 x1 y1 ..
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])  # [heads, 2, size / 2, ...]
    return halves.transpose(1, 2).reshape(rows.shape)


@dataclass
class TensorFile:
    """A GGUF file being written: all names and sizes first, then the tensors one by one, so that one is in memory.

    Vectors are always float32; ``mixture`` has the types of matrices in a file of K-quants.
    """

    path: Path
    file_type: FileType
    mixture: Mixture | None = None
    whole: list[str] = field(default_factory=list)
    """Matrices in float16, because their rows are not a multiple of 32 long, as quantized types need."""
    other: list[str] = field(default_factory=list)
    """Matrices in a larger type, because their rows are not a multiple of 256 long, as K-quants need."""

    def __post_init__(self) -> None:
        self.writer: Any = gguf.GGUFWriter(self.path, ARCHITECTURE)
        self._tensors: list[tuple[str, gguf.GGMLQuantizationType, Callable[[], Tensor]]] = []

    def add(self, name: str, shape: tuple[int, ...], tensor: Callable[[], Tensor]) -> None:
        """Announce a tensor, which ``tensor`` returns later in float32."""
        kind = self._kind(name, shape)
        self._tensors.append((name, kind, tensor))
        if kind not in _UNQUANTIZED:
            byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
            self.writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=kind)
        else:
            dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
            self.writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)

    def write(self, on_tensor: Callable[[], None]) -> None:
        """Write the file; ``writer`` must have its metadata already."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for _, kind, tensor in self._tensors:
            values = tensor().contiguous().numpy()
            # The package gguf converts to the types without K itself.
            python = kind in (*_UNQUANTIZED, gguf.GGMLQuantizationType.Q8_0)
            self.writer.write_tensor_data(gguf.quants.quantize(values, kind) if python else quantize_rows(values, kind))
            on_tensor()
        self.writer.close()

    def _kind(self, name: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
        if len(shape) == 1:
            return gguf.GGMLQuantizationType.F32
        if self.file_type == "f16":
            return gguf.GGMLQuantizationType.F16
        if shape[-1] % _BLOCK:
            self.whole.append(name)
            return gguf.GGMLQuantizationType.F16
        if self.mixture is None:
            return gguf.GGMLQuantizationType.Q8_0
        if shape[-1] % _SUPER_BLOCK:
            self.other.append(name)
        return self.mixture.kind(name, shape[-1])
