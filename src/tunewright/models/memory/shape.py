"""The shape of a base, from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core.errors import UserError
from tunewright.models import quiet_transformers
from tunewright.models.bases import check_architecture, read_config
from tunewright.models.families import ATTENTION, FAMILIES, MLP


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
        """The width of all heads' queries, which is also that of the attention's output."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """The width of all heads' keys, which is also that of the values."""
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
        """The parameters of the linear layers' weights, which 4-bit quantization covers; biases are not among
        them.
        """
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
            config = whole.get_text_config()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"Not a valid configuration of {architecture}: {error}", where=str(path)) from error
    shape = Shape(
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
    sizes = [getattr(shape, name) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head")]
    sizes += [shape.vocabulary, *([shape.experts, shape.chosen] if family.experts else [])]
    if not all(size > 0 for size in sizes) or shape.heads % shape.kv_heads or shape.chosen > shape.experts:
        raise UserError(f"Invalid model sizes: {json.dumps(shape.__dict__)}", where=str(path))
    return shape
