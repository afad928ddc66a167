"""GGUF files of a base and its adapters, each written once and cached under its digest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import damage, digest, new_folder, seal
from tunewright.core.progress import Reporter
from tunewright.export.gguf.lora import write_lora
from tunewright.export.gguf.model import write_token_id_model
from tunewright.export.gguf.tensors import FileType
from tunewright.export.weights import Weights, read_deltas
from tunewright.models.bases import Base

_FORMAT = 1
"""Increase it when the same weights are written differently."""


def base_file(place: Path, base: Base, stop_ids: Collection[int], file_type: FileType, reporter: Reporter) -> Path:
    """Return the base's file, with numbers as vocabulary: llama.cpp gets ids and returns ids.

    Args:
        place: the folder of all such files.

    Raises:
        UserError: llama.cpp does not support the base, or the disk is full.
    """

    def write(path: Path) -> None:
        write_token_id_model(path, base.spec, Weights(base, "float32", {}), base, stop_ids, file_type, reporter)

    made_of = {"base": base.digest, "stops": sorted(stop_ids), "type": file_type}
    return _cached(place / f"base-{digest([_FORMAT, made_of])[:24]}-{file_type}", write)


def lora_file(place: Path, base: Base, adapter: str, folder: Path, reporter: Reporter) -> Path:
    """Return an adapter's file in 16 bits; 8 bits would save little of a small file.

    Raises:
        UserError: llama.cpp does not support the adapter, it has another base, or the disk is full.
    """

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
