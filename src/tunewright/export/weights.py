"""A base's weights with an adapter's delta added in float32, tensor by tensor: one layer is in memory at a time.

If the base was held in NF4 while the adapter was trained, there are two valid ways to merge (Dettmers et al. 2023
leave it open; huggingface/peft issue 2105 discusses it):

original     W + s B A               the published weights, which the adapter has never seen
dequantized  deq(NF4(W)) + s B A     the weights that the adapter was trained on, including their quantization errors
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunewright.adapters.lora_weights import EXPERT_PARAMETERS, PREFIX, rank_and_scale, vllm_refusals
from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter
from tunewright.core.errors import UserError
from tunewright.models.bases import Base, tensor_files
from tunewright.models.families import read_shape, text_name

MergeMethod = Literal["original", "dequantized"]


@dataclass(frozen=True)
class LoraDelta:
    """LoRA's delta of one linear layer: ``scale * b @ a``; with DoRA the sum is then scaled to ``magnitude``.

    Of stacked experts, both matrices have the expert as their first dimension.
    """

    a: Tensor
    """[rank, inputs], float32."""
    b: Tensor
    """[outputs, rank], float32."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023)."""
    magnitude: Tensor | None
    """DoRA's norm of each output's weights (Liu et al. 2024), [outputs]; None for plain LoRA."""

    def applied(self, weight: Tensor) -> Tensor:
        """Return the layer's weights [outputs, inputs] with the delta; float32 in, float32 out."""
        changed: Tensor = weight + self.scale * (self.b @ self.a)
        if self.magnitude is None:
            return changed
        directed: Tensor = changed * (self.magnitude / changed.norm(dim=1))[:, None]
        return directed


def read_deltas(folder: Path) -> dict[str, LoraDelta]:
    """Return the adapter's delta of each layer, by the weight's name in a text-only model (`text_name`)."""
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    stacked = sorted(config.get("target_parameters") or ())
    mergeable = {"use_dora", "r"} | ({"target_parameters"} if stacked == [*EXPERT_PARAMETERS] else set())
    refused = {key: why for key, why in vllm_refusals(config).items() if key not in mergeable}
    for key, why in refused.items():
        raise UserError(f"{why} cannot be merged", where=f"{folder / CONFIG}, {key}", fix="Train plain LoRA or DoRA.")
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (no mapping)
            module, layer, part = _place(name, folder)
            parts.setdefault((module, layer), {})[part] = weights.get_tensor(name).float()
    changes = {}
    for (module, layer), found in parts.items():
        if not {"lora_A", "lora_B"} <= found.keys():
            raise UserError(f"{layer} has only {', '.join(sorted(found))}", where=str(folder / WEIGHTS))
        # The keys of rank_pattern and alpha_pattern match the module's name in the full model, as in peft.
        rank, scale = rank_and_scale(config, module)
        a, b = found["lora_A"], found["lora_B"]
        if stacked and layer.removesuffix(".base_layer").endswith(".experts"):
            # peft wraps the experts once for each tensor, the inner time for gate and up. Its A is
            # [experts * rank, inputs], its B [outputs, rank * experts] (ParamWrapper in peft/tuners/lora/layer.py).
            name = layer.removesuffix(".base_layer") + (".gate_up_proj" if layer.endswith("layer") else ".down_proj")
            experts = len(a) // rank
            a, b = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts).permute(2, 0, 1)
            changes[name] = LoraDelta(a, b, scale, None)
        else:
            changes[f"{layer}.weight"] = LoraDelta(a, b, scale, found.get("lora_magnitude_vector"))
    return changes


_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w[123])\.weight")


def _changes_by_expert(own: Mapping[str | None, str], changes: Mapping[str, LoraDelta]) -> dict[str, LoraDelta]:
    """Return each expert's part of the changes of stacked experts, if files hold each expert's tensors separately.

    ``own`` are the names in the files by `text_name`. transformers stacks gate (w1) on up (w3), and reads Mixtral's
    ``block_sparse_moe`` as ``mlp``.
    """
    parts = {}
    for text, name in own.items():
        found = _EXPERT.fullmatch(text or "")
        if found is None:
            continue
        down, expert = found["part"] in ("down_proj", "w2"), int(found["number"])
        stack = found["experts"].replace(".block_sparse_moe.", ".mlp.") + (".down_proj" if down else ".gate_up_proj")
        if (change := changes.get(stack)) is not None:
            b = change.b[expert] if down else change.b[expert].chunk(2)[found["part"] in ("up_proj", "w3")]
            parts[name] = replace(change, a=change.a[expert], b=b)
    return parts


def _place(name: str, folder: Path) -> tuple[str, str, str]:
    """Return a tensor's module, its name in a text-only model, and its part: lora_A, lora_B or the magnitude."""
    module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    layer = text_name(module)
    if (
        part not in ("lora_A", "lora_B", "lora_magnitude_vector")
        or layer is None
        or not layer.startswith("model.layers.")
    ):
        raise UserError(
            f"{name} is not a LoRA weight of a linear layer of the decoder",
            where=str(folder / WEIGHTS),
            fix="Only adapters of linear layers under model.layers can be exported.",
        )
    return module, layer, part


class BaseWeights:
    """A base's tensors by name, each read from its file on access."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = tensor_files(folder)
        self.files: dict[str, list[str]] = {}
        """Each weights file's tensors."""
        for name, file in self._file_of.items():
            self.files.setdefault(file, []).append(name)

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
    """The weights of a merged model, in float32.

    ``dtype`` is the base's in training, which NF4 is quantized from; ``dequantized`` starts from
    dequantized NF4 weights of the linear layers. ``changes`` are from `read_deltas`; empty for the base.
    """

    def __init__(self, base: Base, dtype: str, changes: Mapping[str, LoraDelta], *, dequantized: bool = False) -> None:
        self.base = BaseWeights(base.folder)
        own = {text_name(name): name for name in self.base}
        stacked = {name for name, change in changes.items() if change.a.dim() == 3}
        self.changes = _changes_by_expert(own, changes) if stacked else {}
        if self.changes:
            changes = {name: change for name, change in changes.items() if name not in stacked}
        elif stacked and (walk := read_shape(base.folder / "config.json").walk) is not None and walk.transposed:
            turned = {name: replace(changes[name], a=changes[name].b.mT, b=changes[name].a.mT) for name in stacked}
            changes = {**changes, **turned}
        self.changes |= {own.get(name, name): change for name, change in changes.items()}
        self._dtype: torch.dtype = getattr(torch, dtype)
        names = read_shape(base.folder / "config.json").names if dequantized else ()
        self._quantized = tuple(f".{layer}.weight" for layer in names)
        for name, change in self.changes.items():
            if f"{name}_blocks" in self.base:
                raise UserError(
                    "LoRA on experts cannot be merged into weights in MXFP4",
                    where=base.spec,
                    fix="Use the adapter with peft, or train on a checkpoint in bfloat16.",
                )
            if name not in self.base:
                raise UserError(f"The adapter changes {name}, which {base.spec} does not have", where=base.spec)
            wanted, found = (*change.b.shape[:-1], change.a.shape[-1]), tuple(self.base[name].shape)
            if wanted != found:
                raise UserError(
                    f"The adapter changes {name} as a matrix of shape {wanted}, but its shape is {found}",
                    where=base.spec,
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __getitem__(self, name: str) -> Tensor:
        """Return one weight with its delta, in float32."""
        weight = self.held(name) if self._quantizes(name) else self.base[name]
        change = self.changes.get(name)
        return weight.float() if change is None else change.applied(weight.float())

    def _quantizes(self, name: str) -> bool:
        """Return whether this weight starts as dequantized NF4, as those of the decoder's linear layers do."""
        return text_name(name) is not None and name.endswith(self._quantized)

    def held(self, name: str) -> Tensor:
        """Return one weight as training held the base, without the delta."""
        weight = self.base[name].to(self._dtype)
        return dequantized(weight) if self._quantizes(name) else weight

    def stored(self, name: str) -> Tensor:
        """Return one weight in the base's own dtype: cast once, or the original if nothing changes it."""
        weight = self.base[name]
        if name not in self.changes and not self._quantizes(name):
            return weight
        return self[name].to(weight.dtype)


def dequantized(weight: Tensor) -> Tensor:
    """Return the values that training used if it held these weights in NF4 (see `tunewright.models.loading`)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    values: Tensor = dequantize_4bit(held, state)
    return values


def trained_dtype(adapter: Adapter) -> str:
    """Return the base's dtype (over NF4, its compute dtype) in the adapter's training.

    A foreign adapter does not state it: bfloat16, the type that Llama and Mistral are published in, is assumed.
    """
    return str(adapter.lineage["config"]["train"]["dtype"]) if "config" in adapter.lineage else "bfloat16"


def put_into(model: Any, names: Iterable[str], value: Callable[[str], Tensor]) -> None:
    """Replace a loaded model's weights, in the model's own precision; weights of another form in files stay.

    Files also hold a tied output layer, the vision tower that was dropped, and each expert separately.
    """
    parameters = {text_name(name): weight for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name in names:
            text = text_name(name)
            if text is not None and text in parameters:
                parameters[text].copy_(value(name))
