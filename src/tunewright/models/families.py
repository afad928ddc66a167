"""Supported model families, refused ones with the reason, and the names of a base's text weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.config import Quantization
from tunewright.core.errors import UserError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One architecture, as ``architectures`` in a ``config.json`` names it."""

    name: str
    """The display name."""
    config: str
    """Its configuration class in transformers."""
    text_types: tuple[str, ...]
    """The ``model_type`` values of its text model."""
    vision: bool = False
    """The text model is the ``text_config`` of a model that also reads images."""
    experts: bool = False
    """The feed-forward blocks are mixtures of experts, not linear layers (see docs/how-to/models.md)."""

    @property
    def linear(self) -> tuple[str, ...]:
        """The linear layers of a decoder layer that LoRA and NF4 apply to, by the last part of their names."""
        return ATTENTION if self.experts else (*ATTENTION, *MLP)


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("Llama", "LlamaConfig", ("llama",)),
    "MistralForCausalLM": Family("Mistral", "MistralConfig", ("mistral",)),
    "Mistral3ForConditionalGeneration": Family("Mistral 3", "Mistral3Config", ("mistral", "ministral3"), vision=True),
    "Ministral3ForCausalLM": Family("Ministral 3", "Ministral3Config", ("ministral3",)),
    "MixtralForCausalLM": Family("Mixtral", "MixtralConfig", ("mixtral",), experts=True),
}

_LLAMA_4 = (
    "Llama 4 is not supported: its experts cannot be quantized to 4 bits, so its smallest model needs 218 GB, and "
    "training here does not support its chunked attention"
)
REFUSED: Mapping[str, str] = {"Llama4ForConditionalGeneration": _LLAMA_4, "Llama4ForCausalLM": _LLAMA_4}
"""Llamas and Mistrals that are refused, with the reason (docs/how-to/models.md)."""

VISION = ("vision_tower", "multi_modal_projector")
"""Parts of a Mistral 3 that read images."""

OUTSIDE_TEXT = r".*(vision_tower|multi_modal_projector).*"
"""peft's ``exclude_modules`` for a family with vision: the vision tower also has layers called q_proj."""

_TEXT_PREFIXES = (
    # Files on the hub, and those that transformers writes.
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    # Modules of the model as transformers builds it, and adapters on them.
    ("model.language_model.", "model."),
)


def text_name(name: str) -> str | None:
    """Return the name of a tensor or module in a model of text alone; None for a part of the vision tower.

    ``language_model.model.layers.0.mlp.up_proj.weight`` is ``model.layers.0.mlp.up_proj.weight``.
    """
    if name.removeprefix("model.").startswith(VISION):
        return None
    for prefix, own in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def module_name(architecture: str, text: str) -> str:
    """Return the name of a text module in the full model: the inverse of `text_name`."""
    if FAMILIES[architecture].vision and text.startswith("model."):
        return "model.language_model." + text.removeprefix("model.")
    return text


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text model's part of a ``config.json``: ``text_config`` if it exists, else all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def family_of(config: Mapping[str, Any], where: str) -> tuple[str, Family]:
    """Return the architecture that a ``config.json`` names, and its family."""
    architectures = config.get("architectures") or []
    named = ", ".join(map(str, architectures)) or "unknown"
    supported = f"Supported are {', '.join(FAMILIES)} (docs/how-to/models.md)."
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        for architecture in architectures:
            if architecture in REFUSED:
                raise UserError(REFUSED[architecture], where=where, fix=supported)
        raise UserError(f"The architecture {named} is not supported", where=where, fix=supported)
    family = FAMILIES[architectures[0]]
    text = text_config(config)
    kind = text.get("model_type", family.text_types[0])
    if family.vision and text is config:
        raise UserError("No text_config: the text model is not described", where=where)
    if kind not in family.text_types:
        raise UserError(
            f"The text model of this {architectures[0]} is {kind}; supported is {' or '.join(family.text_types)}",
            where=where,
            fix=supported,
        )
    return str(architectures[0]), family


def require_targets(targets: Sequence[str], architecture: str) -> None:
    """Check that a family has the linear layers that ``train.target_modules`` names."""
    family = FAMILIES[architecture]
    missing = [name for name in targets if name not in family.linear]
    if missing:
        raise UserError(
            f"{family.name} has no linear layer {', '.join(missing)}: its experts are one tensor per layer, which "
            "LoRA does not adapt",
            where="train.target_modules",
            fix=f"Set train.target_modules to [{', '.join(family.linear)}], or to a subset.",
        )


def require_quantizable(quantization: Quantization, architecture: str, key: str = "quantization") -> None:
    """Check that NF4 covers most of a family's weights."""
    family = FAMILIES[architecture]
    if quantization == "nf4" and family.experts:
        raise UserError(
            f"{family.name} cannot be quantized to NF4: bitsandbytes quantizes linear layers, and nearly all weights "
            "of this family are experts, which are not linear layers",
            where=key,
            fix=f"Set {key} to none.",
        )
