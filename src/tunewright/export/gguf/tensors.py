"""Weights in GGUF: other names, another row order of queries and keys, and other number types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from torch import Tensor

from tunewright.core.errors import UserError
from tunewright.export.gguf.mixtures import Mixture, quantize_rows
from tunewright.gate.parity import Precision

FileType = Literal["f16", "q8_0", "q4_k_m", "q5_k_m"]

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
    """Return a tensor's name in GGUF.

    Raises:
        UserError: the architecture "llama" has no such tensor.
    """
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

    Args:
        path: the file.
        file_type: type of the matrices; vectors are always float32.
        mixture: their types in a file of K-quants.
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
