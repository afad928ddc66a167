"""GGUF files of a base and its adapters, each written once and cached under its digest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import damage, digest, new_folder, seal
from tunewright.core.progress import Reporter
from tunewright.export.gguf.model import write_lora, write_token_id_model
from tunewright.export.gguf.tensors import FileType
from tunewright.export.weights import Weights, read_deltas
from tunewright.models.bases import Base

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
    """Return the base's file, with a vocabulary for grammars only: llama.cpp gets ids and returns ids.

    Args:
        place: the folder of all such files.
        pieces: see :func:`tunewright.export.gguf.tokenizer.add_token_ids`.
        end_id: the one of ``stop_ids`` that ends a constrained answer.

    Raises:
        UserError: llama.cpp does not support the base, or the disk is full.
    """
    ends = [end_id, *sorted(set(stop_ids) - {end_id})]

    def write(path: Path) -> None:
        write_token_id_model(path, base.spec, Weights(base, "float32", {}), base, pieces, ends, file_type, reporter)

    tokens = digest([None if piece is None else piece.hex() for piece in pieces])
    made_of = {"base": base.digest, "stops": ends, "tokens": tokens, "type": file_type}
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
