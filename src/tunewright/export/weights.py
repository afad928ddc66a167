"""A base's weights with an adapter's change added in float32, tensor by tensor: one layer is in memory at a time.

Where the base was held in NF4 while the adapter was trained, there are two right ways to merge (Dettmers et al. 2023
leave it open; huggingface/peft issue 2105 discusses it):

original     W + s B A               the weights that the base was published with, which the adapter has never seen
dequantized  deq(NF4(W)) + s B A     what the adapter was trained on, its quantization errors included
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter
from tunewright.adapters.vllm_compat import vllm_refusals
from tunewright.core.errors import UserError
from tunewright.models.bases import Base, tensor_files
from tunewright.models.families import ATTENTION, MLP, text_name

Way = Literal["original", "dequantized"]

_PREFIX = "base_model.model."
_LINEAR = (*ATTENTION, *MLP)


@dataclass(frozen=True)
class Change:
    """What LoRA adds to one linear layer: ``scale * b @ a``; with DoRA the sum is then brought to ``magnitude``."""

    a: Tensor
    """[rank, inputs], float32."""
    b: Tensor
    """[outputs, rank], float32."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023)."""
    magnitude: Tensor | None
    """DoRA's length of each output's weights (Liu et al. 2024), [outputs]; None of plain LoRA."""

    def applied(self, weight: Tensor) -> Tensor:
        """Return the layer's weights [outputs, inputs] with the change; float32 in, float32 out."""
        changed: Tensor = weight + self.scale * (self.b @ self.a)
        if self.magnitude is None:
            return changed
        directed: Tensor = changed * (self.magnitude / changed.norm(dim=1))[:, None]
        return directed


def read_changes(folder: Path) -> dict[str, Change]:
    """What the adapter in ``folder`` does to each layer, by the weight's name in a text model alone (`text_name`).

    Raises:
        UserError: an adapter that is more than LoRA over the decoder's linear layers.
    """
    from peft.utils.other import get_pattern_key
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    refused = {key: why for key, why in vllm_refusals(config).items() if key not in ("use_dora", "r")}
    for key, why in refused.items():
        raise UserError(f"{why} cannot be merged", where=f"{folder / CONFIG}, {key}", fix="Train plain LoRA or DoRA.")
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (no mapping)
            layer, part = _place(name, folder)
            parts.setdefault(layer, {})[part] = weights.get_tensor(name).float()
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    changes = {}
    for layer, found in parts.items():
        if not {"lora_A", "lora_B"} <= found.keys():
            raise UserError(f"{layer} has only {', '.join(sorted(found))}", where=str(folder / WEIGHTS))
        rank = found["lora_A"].shape[0]
        alpha = alphas.get(get_pattern_key(list(alphas), layer), config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        changes[f"{layer}.weight"] = Change(found["lora_A"], found["lora_B"], scale, found.get("lora_magnitude_vector"))
    return changes


def _place(name: str, folder: Path) -> tuple[str, str]:
    """Return the layer and the part of it that a tensor of an adapter is."""
    module, _, part = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
    layer = text_name(module)
    if (
        part not in ("lora_A", "lora_B", "lora_magnitude_vector")
        or layer is None
        or layer.rpartition(".")[2] not in _LINEAR
    ):
        raise UserError(
            f"{name} is no LoRA weight of a linear layer of the decoder",
            where=str(folder / WEIGHTS),
            fix=f"What is exported are changes of {', '.join(_LINEAR)}.",
        )
    return layer, part


class BaseWeights:
    """A base's tensors by name, each read from its file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """Each weights file's tensors, in the order in which they lie there."""
        from safetensors import safe_open

        found = {}
        for name in sorted(set(tensor_files(self.folder).values())):
            with safe_open(self.folder / name, framework="pt") as weights:
                found[name] = list(weights.keys())
        return found

    @cached_property
    def _file_of(self) -> dict[str, str]:
        return {name: file for file, names in self.files.items() for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.folder / self._file_of[name], framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(name)
        return tensor


class Weights:
    """The weights of a model to be, in float32.

    Args:
        base: the base.
        dtype: what it was held in for training ("bfloat16" or "float32"), which NF4 is made from.
        changes: the adapter's, by the weight's name in a text model alone (see `read_changes`); none gives the base.
        dequantized: start from what NF4 makes of the linear layers.

    Raises:
        UserError: a change of a weight that the base does not have, or of another shape.
    """

    def __init__(self, base: Base, dtype: str, changes: Mapping[str, Change], *, dequantized: bool = False) -> None:
        self.base = BaseWeights(base.folder)
        own = {text_name(name): name for name in self.base}
        self.changes = {own.get(name, name): change for name, change in changes.items()}
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._dequantized = dequantized
        for name, change in self.changes.items():
            if name not in self.base:
                raise UserError(f"the adapter changes {name}, which {base.spec} does not have", where=base.spec)
            wanted, found = (change.b.shape[0], change.a.shape[1]), tuple(self.base[name].shape)
            if wanted != found:
                raise UserError(
                    f"the adapter changes {name} as a matrix of {wanted}, and it is one of {found}", where=base.spec
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __getitem__(self, name: str) -> Tensor:
        """Return one weight with its change, in float32."""
        whole = self._dequantized and is_quantized(name)
        weight = self.held(name) if whole else self.base[name]
        change = self.changes.get(name)
        return weight.float() if change is None else change.applied(weight.float())

    def held(self, name: str) -> Tensor:
        """Return one weight as training held the base, without the change."""
        weight = self.base[name].to(self._dtype)
        return dequantized(weight) if self._dequantized and is_quantized(name) else weight

    def stored(self, name: str) -> Tensor:
        """Return one weight in the type that the base has it in: cast once, or as it was where nothing changes it."""
        weight = self.base[name]
        if name not in self.changes and not (self._dequantized and is_quantized(name)):
            return weight
        return self[name].to(weight.dtype)


def is_quantized(name: str) -> bool:
    """Return whether NF4 holds this weight in 4 bits: those of the decoder's linear layers."""
    return text_name(name) is not None and name.endswith(tuple(f".{layer}.weight" for layer in _LINEAR))


def dequantized(weight: Tensor) -> Tensor:
    """Return what training computed with where it held these weights in NF4 (see `tunewright.models.quantized`)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    values: Tensor = dequantize_4bit(held, state)
    return values


def trained_dtype(adapter: Adapter) -> str:
    """Return what the base was held in (or computed in, over NF4) while the adapter was trained."""
    return str(adapter.lineage["config"]["train"]["dtype"])


def put_into(model: Any, names: Iterable[str], value: Callable[[str], Tensor]) -> None:
    """Give a loaded model other weights, in the model's own precision; it keeps those that have another form in files.

    Files also hold a tied output layer, the vision tower that was dropped, and each expert on its own.
    """
    parameters = {text_name(name): weight for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name in names:
            text = text_name(name)
            if text is not None and text in parameters:
                parameters[text].copy_(value(name))
