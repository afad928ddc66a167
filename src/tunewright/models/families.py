"""The facts in a base's config.json: its architecture, the shape of its text model and its weights' names.

Any causal decoder of transformers is opened. Its linear layers are found by walking the model on torch's meta device,
which computes and holds nothing. What training and decoding compute of it is proved by `tunewright.training.proofs`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs

from tunewright.config import PRESETS, Quantization, TrainConfig
from tunewright.config.train import EXPERTS
from tunewright.core.errors import UserError, require_torch
from tunewright.core.io import digest, write_json
from tunewright.models import quiet_transformers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama's decoder layer, by the last part of their names."""

DOCS = "docs/how-to/models.md"

TOWERS = (
    "vision_tower",
    "multi_modal_projector",
    "visual",
    "vision_model",
    "audio_tower",
    "embed_vision",
    "embed_audio",
)
"""Parts of models with a `language_model` that read images or sound."""

OUTSIDE_TEXT = r".*(vision_tower|multi_modal_projector).*"
"""peft's ``exclude_modules`` for Mistral 3: the vision tower also has layers called q_proj."""

_TEXT_PREFIXES = (
    # Files on the hub, and files that transformers writes.
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    # Modules of the model as transformers builds it, and adapters on them.
    ("model.language_model.", "model."),
)


def text_name(name: str) -> str | None:
    """Return the name of a tensor or module in a text-only model; None for a part that reads images or sound.

    ``language_model.model.layers.0.mlp.up_proj.weight`` is ``model.layers.0.mlp.up_proj.weight``.
    """
    if name.removeprefix("model.").startswith(TOWERS):
        return None
    for prefix, own in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def reads_images(architecture: str) -> bool:
    """Return whether the text model is a part of a model that also reads images or sound."""
    return architecture.endswith("ForConditionalGeneration")


def module_name(architecture: str, text: str) -> str:
    """Return the name of a text module in the full model: the inverse of `text_name`."""
    if reads_images(architecture) and text.startswith("model."):
        return "model.language_model." + text.removeprefix("model.")
    return text


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text model's part of a ``config.json``: ``text_config`` if it exists, else all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def check_architecture(path: Path) -> str:
    """Return the architecture that a base's ``config.json`` names; refuse what is no causal decoder, without torch."""
    config, where = read_config(path), str(path)
    if config.get("auto_map"):
        raise UserError(
            "This base needs custom code (auto_map)", where=where, fix="Use a base without: its code is never run."
        )
    named = config.get("architectures") or []
    architecture = str(named[0]) if len(named) == 1 else ""
    supported = f"Use a causal decoder that transformers has, such as a Llama, Mistral, Qwen or Gemma ({DOCS})."
    if config.get("is_encoder_decoder"):
        raise UserError(f"{architecture or 'This base'} is an encoder-decoder", where=where, fix=supported)
    if not architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise UserError(
            f"The architecture {', '.join(map(str, named)) or 'unknown'} is not supported", where=where, fix=supported
        )
    if reads_images(architecture) and text_config(config) is config:
        raise UserError(
            f"{architecture} has no text_config: its text model is not described", where=where, fix=supported
        )
    quantization = config.get("quantization_config") or text_config(config).get("quantization_config")
    if quantization and not is_mxfp4(config):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        fix = "Use the original base in bfloat16, float16 or float32."
        if method == "fp8":
            # Ministral 3 and Devstral 2 are published in FP8; Ministral 3 also in bfloat16, under another name.
            fix += " For Ministral 3 that is the repository whose name ends in -BF16."
        raise UserError(f"The weights are already quantized ({method})", where=where, fix=fix)
    return architecture


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is of a gpt-oss whose experts are stored in MXFP4, as OpenAI publishes it."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    return method == "mxfp4" and config.get("architectures") == ["GptOssForCausalLM"]


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


_WRITING = ("o_proj", "out_proj", "dense", "c_proj", "wo", "down_proj", "fc2", "w2", "output_linear")
"""Linear layers whose output is added to the hidden state."""

_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that peft reads as experts in a base with experts, also where a dense layer or a shared expert has them."""
_ROUTERS = ("gate", "router", "shared_expert_gate", "classifier")
_FEED_FORWARD = ("mlp", "feed_forward", "expert", "moe", "ffn")
"""Parts of the names of feed-forward blocks."""


@dataclass(frozen=True)
class Linear:
    """The linear layers of one name and size in the decoder layers."""

    name: str
    """The last part of their names."""
    inputs: int
    outputs: int
    count: int
    """Linear layers of this name and size in the whole model."""
    attention: bool
    """Part of the layer's first half; else of its feed-forward block."""
    bias: bool


LLAMA = {"LlamaForCausalLM": "LlamaConfig", "MistralForCausalLM": "MistralConfig"}
"""Architectures with the linear layers of a Llama, to the classes of their configurations."""


@dataclass(frozen=True)
class Walk:
    """The facts found by walking a model on the meta device."""

    linears: tuple[Linear, ...]
    others: int
    """Parameters that are no weights of these linear layers."""
    towers: tuple[str, ...]
    """Parts of the full model that read images or sound; they are dropped after loading."""
    experts: tuple[Linear, ...] = ()
    """The experts' stacked matrices, of which each expert is one; empty if peft cannot adapt them as `EXPERTS`."""
    transposed: bool = False
    """True if the experts' matrices are stored as [inputs, outputs]."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a base's text model."""

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
    walk: Walk | None = None
    """The facts from walking the model; None: those of a Llama of these dimensions."""

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers that LoRA and NF4 apply to; experts are not among them."""
        if self.walk is not None:
            return self.walk.linears
        h, q, k, m = self.hidden, self.queries, self.keys, self.intermediate
        sizes = dict(zip(ATTENTION, ((h, q), (h, k), (h, k), (q, h)), strict=True))
        if not self.experts:
            sizes |= dict(zip(MLP, ((h, m), (h, m), (m, h)), strict=True))
        return tuple(
            Linear(
                name, *size, self.layers, name in ATTENTION, self.attention_bias if name in ATTENTION else self.mlp_bias
            )
            for name, size in sizes.items()
        )

    @cached_property
    def others(self) -> int:
        """The parameters that are never quantized: embeddings, norms, biases and experts."""
        if self.walk is not None:
            return self.walk.others
        biases = sum(each.outputs for each in self.linears if each.bias)
        experts = self.experts * (3 * self.hidden * self.intermediate + self.hidden)
        norms = (2 * self.layers + 1) * self.hidden
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + norms + self.layers * (biases + experts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the linear layers, each once."""
        return tuple(dict.fromkeys(each.name for each in self.linears))

    @property
    def queries(self) -> int:
        """The width of all heads' queries, which is also the width of the attention's output."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """The width of all heads' keys, which is also the width of the values."""
        return self.kv_heads * self.head

    def half(self, attention: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the linear layers of a decoder layer's half that read its input, and those that write its output."""
        names = dict.fromkeys(each.name for each in self.linears if each.attention == attention)
        return tuple(n for n in names if n not in _WRITING), tuple(n for n in names if n in _WRITING)

    def linear(self, name: str) -> tuple[int, int]:
        """Return inputs and outputs of the largest linear layer of this name."""
        sizes = [(each.inputs, each.outputs) for each in self.linears if each.name == name]
        return max(sizes, key=sum)

    @property
    def linear_parameters(self) -> int:
        """The weights of the linear layers, without biases: what 4-bit quantization covers."""
        return sum(each.count * each.inputs * each.outputs for each in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters of the base."""
        return self.linear_parameters + self.others

    def adapter_parameters(self, targets: Iterable[str], rank: int) -> int:
        """Return the LoRA parameters: A [rank, inputs] and B [outputs, rank] for each target in each layer."""
        wanted = set(targets)
        adapted = [each for each in self.linears if each.name in wanted]
        adapted += self.walk.experts if self.walk and EXPERTS in wanted else ()
        return sum(each.count * rank * (each.inputs + each.outputs) for each in adapted)


def resolve_targets(settings: TrainConfig, shape: Shape, architecture: str) -> TrainConfig:
    """Return the settings with linear layers that the base has; the preset `all-linear` means all of the base's own.

    Raises:
        UserError: ``train.target_modules`` names a layer that the base lacks.
    """
    stacked = shape.walk is not None and bool(shape.walk.experts)
    known = (*shape.names, EXPERTS) if stacked else shape.names
    missing = [name for name in settings.target_modules if name not in known]
    if not missing:
        return settings
    if settings.target_modules == PRESETS["all-linear"]["target_modules"]:
        return settings.model_copy(update={"target_modules": shape.names})
    experts = ": its experts are stacked in one tensor per layer" if shape.experts else ""
    raise UserError(
        f"{architecture} has no linear layer {', '.join(missing)}{experts}",
        where="train.target_modules",
        fix=f"Set train.target_modules to [{', '.join(known)}], or to a subset.",
    )


def require_quantizable(quantization: Quantization, shape: Shape, architecture: str, key: str = "quantization") -> None:
    """Check that NF4 covers most of a base's weights."""
    if quantization == "nf4" and shape.experts:
        share = shape.linear_parameters / shape.parameters
        raise UserError(
            f"{architecture} cannot be quantized to NF4: bitsandbytes quantizes linear layers, which are only "
            f"{share:.0%} of its weights. Its experts are not linear layers",
            where=key,
            fix=f"Set {key} to none.",
        )


def read_shape(path: Path) -> Shape:
    """Return the shape of the text model in a ``config.json``, with transformers' defaults for absent values.

    The dimensions of a Llama or Mistral are enough. Any other model is walked, once for each config, which needs torch.
    """
    architecture = check_architecture(path)
    if architecture in LLAMA:
        with quiet_transformers():
            return _dimensions(load_config(path, architecture), architecture, str(path))
    # As text, because some configurations have infinite numbers.
    kept = digest([version("transformers"), json.dumps(read_config(path), sort_keys=True)])
    cache = platformdirs.user_cache_path("tunewright") / "shapes" / f"{kept[:32]}.json"
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        walk = known.pop("walk")
        linears = tuple(Linear(**each) for each in walk["linears"])
        experts = tuple(Linear(**each) for each in walk["experts"])
        walked = Walk(linears, walk["others"], tuple(walk["towers"]), experts, walk["transposed"])
        return Shape(**known, walk=walked)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not walked yet, or by another version
    require_torch()
    with quiet_transformers():
        shape = shape_of(load_config(path, architecture), architecture, str(path))
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json(cache, asdict(shape))
    return shape


def load_config(path: Path, architecture: str) -> Any:
    """Return transformers' configuration of a base; refuse an architecture that this transformers does not have."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if architecture in LLAMA:  # without torch there is no class of the model
        wanted: Any = getattr(transformers, LLAMA[architecture])
    else:
        wanted = getattr(getattr(transformers, architecture, None), "config_class", None)
    if wanted is None:
        raise UserError(
            f"The installed transformers ({transformers.__version__}) has no {architecture}",
            where=str(path),
            fix=f"Update transformers, or use a base that it has ({DOCS}).",
        )
    try:
        # transformers writes an infinite number as an object.
        config = wanted.from_dict(wanted._decode_special_floats(read_config(path)))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"Not a valid configuration of {architecture}: {error}", where=str(path)) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the loaded model is dequantized
    return config


def shape_of(whole: Any, architecture: str, where: str = "") -> Shape:
    """Return the shape of the text model in transformers' configuration of a base, from walking the model."""
    return _walked(_dimensions(whole, architecture, where), whole, architecture, where)


def _dimensions(whole: Any, architecture: str, where: str) -> Shape:
    config = whole.get_text_config()
    try:
        heads, hidden = config.num_attention_heads, config.hidden_size
        found = Shape(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=_one(config, "moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "n_inner")
            or 4 * hidden,
            heads=heads,
            kv_heads=_largest(config, "num_key_value_heads") or heads,
            head=_largest(config, "head_dim") or hidden // heads,
            vocabulary=config.vocab_size,
            # For a model with vision the top-level value counts, not the text model's own.
            tied=bool(whole.tie_word_embeddings),
            attention_bias=architecture == "LlamaForCausalLM" and bool(config.attention_bias),
            mlp_bias=architecture == "LlamaForCausalLM" and bool(config.mlp_bias),
            experts=_one(config, "num_local_experts", "num_experts", "n_routed_experts"),
            chosen=_one(config, "num_experts_per_tok", "top_k_experts", "moe_top_k"),
        )
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"Not a valid configuration of {architecture}: {error}", where=where) from error
    sizes = [getattr(found, name) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head")]
    if (
        not all(size > 0 for size in (*sizes, found.vocabulary))
        or heads % found.kv_heads
        or found.chosen > found.experts > 0
    ):
        raise UserError(f"Invalid model sizes: {json.dumps(asdict(found))}", where=where)
    return found


def _largest(config: Any, name: str) -> int:
    """Return a value of the configuration, or the largest of its layers; 0 if there is no such value."""
    try:
        return int(getattr(config, name, None) or 0)
    except RuntimeError:  # transformers refuses the value of all layers where they differ
        return max(int(getattr(config.per_layer_config[layer], name)) for layer in range(config.num_hidden_layers))


def _one(config: Any, *names: str) -> int:
    """Return the first of these values that is a number above 0; 0 if there is no such value."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value), 0)


def _walked(found: Shape, whole: Any, architecture: str, where: str) -> Shape:
    """Return the shape with the linear layers and parameters of the model, built on the meta device."""
    import torch
    import transformers
    from torch import nn

    try:
        with torch.device("meta"):
            model: Any = getattr(transformers, architecture)(whole)
        layers = decoder_layers(model)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"{architecture} cannot be opened as a causal decoder: {error}", where=where) from error
    towers = drop_towers(model)
    linears: Counter[tuple[str, int, int, bool, bool]] = Counter()
    experts = 0
    stacked: Counter[tuple[str, int, int]] = Counter()
    transposed = False
    for layer in layers:
        for name, part in layer.named_modules():
            last = name.rpartition(".")[2]
            # Routers stay frozen, and an indexer's choice of keys has no gradient.
            if isinstance(part, nn.Linear) and last not in _ROUTERS and "indexer" not in name:
                half = not any(each in name for each in _FEED_FORWARD)
                linears[last, part.in_features, part.out_features, half, part.bias is not None] += 1
            if last == EXPERTS and {"gate_up_proj", "down_proj"} <= dict(part.named_parameters(recurse=False)).keys():
                transposed = getattr(part, "is_transposed", False)  # as peft reads it
                for key in ("gate_up_proj", "down_proj"):
                    count, *sizes = getattr(part, key).shape
                    inputs, outputs = sizes if transposed else reversed(sizes)
                    stacked[key, inputs, outputs] += count
        experts = max([experts, *(p.shape[0] for n, p in layer.named_parameters() if p.dim() == 3 and "expert" in n)])
    if not linears:
        raise UserError(f"The decoder layers of {architecture} have no linear layer", where=where)
    kept = {key: count for key, count in linears.items() if not (experts and key[0] in _EXPERTS)}
    rows = tuple(Linear(n, i, o, count, half, bias) for (n, i, o, half, bias), count in kept.items())
    total = sum(weight.numel() for weight in model.parameters())
    others = total - sum(each.count * each.inputs * each.outputs for each in rows)
    stacks = tuple(Linear(n, i, o, count, attention=False, bias=False) for (n, i, o), count in stacked.items())
    walk = Walk(rows, others, towers, stacks, transposed)
    return replace(found, walk=walk, experts=experts, chosen=found.chosen if experts else 0)


def decoder_layers(model: Any) -> Any:
    """Return the decoder layers of a causal model."""
    decoder = model.get_decoder()
    # Llama 4's text model does not find its own decoder.
    return (decoder.model if hasattr(decoder, "lm_head") else decoder).layers


def drop_towers(model: Any) -> tuple[str, ...]:
    """Free the parts that read images or sound, and return their names.

    The text layers keep their names in the full model, which peft and vLLM look for in an adapter.
    """
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "language_model"):
        return ()
    towers = tuple(name for name, _ in inner.named_children() if name in TOWERS)
    for name in towers:
        setattr(inner, name, None)
    return towers


def outside_text(shape: Shape) -> str | None:
    """Return peft's ``exclude_modules`` for a base with towers, which may have layers of the text model's names."""
    return rf".*({'|'.join(shape.walk.towers)}).*" if shape.walk and shape.walk.towers else None
