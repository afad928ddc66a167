"""Supported model families, and the facts in a base's config.json: its family, its shape and its weights' names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.models import quiet_transformers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One architecture, as ``architectures`` in a ``config.json`` names it."""

    name: str
    """The display name."""
    config: str
    """The architecture's configuration class in transformers."""
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
    # Files on the hub, and files that transformers writes.
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    # Modules of the model as transformers builds it, and adapters on them.
    ("model.language_model.", "model."),
)


def text_name(name: str) -> str | None:
    """Return the name of a tensor or module in a text-only model; None for a part of the vision tower.

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
    supported = f"tunewright supports {', '.join(FAMILIES)} (docs/how-to/models.md)."
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
            f"The text model of this {architectures[0]} is {kind}, not {' or '.join(family.text_types)}",
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


def check_architecture(path: Path) -> str:
    """Return the architecture that a base's ``config.json`` names."""
    config = read_config(path)
    where = str(path)
    if config.get("auto_map"):
        raise UserError(
            "This base needs custom code (auto_map)", where=where, fix="Use a base without: its code is never run."
        )
    architecture, _ = family_of(config, where)
    quantization = config.get("quantization_config") or text_config(config).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        fix = "Use the original base in bfloat16, float16 or float32."
        if method == "fp8":
            # Ministral 3 and Devstral 2 are published in FP8; Ministral 3 also in bfloat16, under another name.
            fix += " For Ministral 3 that is the repository whose name ends in -BF16."
        raise UserError(f"The weights are already quantized ({method})", where=where, fix=fix)
    return architecture


def read_config(path: Path) -> dict[str, Any]:
    """Return a base's ``config.json``."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("No config.json: this folder is not a base", where=str(path.parent)) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"Not valid JSON: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise UserError(f"A model configuration must be a JSON object (got {type(config).__name__})", where=str(path))
    return config


@dataclass(frozen=True)
class Shape:
    """The dimensions of a base's text model, whose layers are all alike."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    """Size of one head's query, key or value."""
    vocabulary: int
    tied: bool
    """True if the output embedding is the input embedding."""
    attention_bias: bool
    mlp_bias: bool
    experts: int = 0
    """Experts of each layer's feed-forward block; 0 if it is dense."""
    chosen: int = 0
    """Experts that compute each token."""

    @property
    def names(self) -> tuple[str, ...]:
        """The linear layers of each decoder layer; experts are not among them."""
        return ATTENTION if self.experts else (*ATTENTION, *MLP)

    @property
    def queries(self) -> int:
        """The width of all heads' queries, which is also the width of the attention's output."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """The width of all heads' keys, which is also the width of the values."""
        return self.kv_heads * self.head

    def linear(self, name: str) -> tuple[int, int]:
        """Return inputs and outputs of a linear layer, or of one expert's part of that name."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[name]

    @property
    def linear_parameters(self) -> int:
        """The weights of the linear layers, without biases: what 4-bit quantization covers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in map(self.linear, self.names))

    @property
    def expert_parameters(self) -> int:
        """The parameters of all experts, and of the routers that choose among them."""
        one = sum(inputs * outputs for inputs, outputs in map(self.linear, MLP))
        return self.layers * self.experts * (one + self.hidden)

    @property
    def other_parameters(self) -> int:
        """The parameters that are never quantized: embeddings, norms, biases and experts."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = self.attention_bias * sum(self.linear(name)[1] for name in ATTENTION)
        biases += self.mlp_bias * sum(self.linear(name)[1] for name in MLP)
        return embeddings + self.layers * (2 * self.hidden + biases) + self.hidden + self.expert_parameters

    @property
    def parameters(self) -> int:
        """All parameters of the base."""
        return self.linear_parameters + self.other_parameters

    def adapter_parameters(self, targets: Iterable[str], rank: int) -> int:
        """Return the LoRA parameters: A [rank, inputs] and B [outputs, rank] for each target in each layer."""
        return self.layers * sum(rank * sum(self.linear(name)) for name in targets)


def read_shape(path: Path) -> Shape:
    """Return the shape of the text model in a ``config.json``, with transformers' defaults for absent values."""
    architecture = check_architecture(path)
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    family = FAMILIES[architecture]
    try:
        with quiet_transformers():
            whole: Any = getattr(transformers, family.config).from_dict(read_config(path))
            shape = shape_of(whole, family)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"Not a valid configuration of {architecture}: {error}", where=str(path)) from error
    sizes = [getattr(shape, name) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head")]
    sizes += [shape.vocabulary, *([shape.experts, shape.chosen] if family.experts else [])]
    if not all(size > 0 for size in sizes) or shape.heads % shape.kv_heads or shape.chosen > shape.experts:
        raise UserError(f"Invalid model sizes: {json.dumps(shape.__dict__)}", where=str(path))
    return shape


def shape_of(whole: Any, family: Family) -> Shape:
    """Return the shape of the text model in transformers' configuration of a base of this family."""
    config = whole.get_text_config()
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        # For a model with vision the top-level value counts, not the text model's own.
        tied=bool(whole.tie_word_embeddings),
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        experts=config.num_local_experts if family.experts else 0,
        chosen=config.num_experts_per_tok if family.experts else 0,
    )
