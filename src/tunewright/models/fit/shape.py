"""The sizes of a base, from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tunewright.errors import UserError
from tunewright.models.bases import check_architecture, read_config
from tunewright.models.quiet import quiet_transformers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama or Mistral in numbers; every layer is alike."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    """Numbers in one head's query, key or value."""
    vocabulary: int
    tied: bool
    """Whether the output embedding is the input embedding."""
    attention_bias: bool
    mlp_bias: bool

    @property
    def queries(self) -> int:
        """Numbers in one token's queries, all heads together; as many are in the attention's output."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Numbers in one token's keys; as many are in its values."""
        return self.kv_heads * self.head

    def linear(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of one of a layer's seven linear layers."""
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
        """Parameters in the linear layers' weights, which 4-bit quantises; their biases are not among them."""
        return self.layers * sum(inputs * outputs for inputs, outputs in map(self.linear, (*ATTENTION, *MLP)))

    @property
    def other_parameters(self) -> int:
        """Parameters that stay in 16 bits in any case: embeddings, norms and biases."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = self.attention_bias * sum(self.linear(name)[1] for name in ATTENTION)
        biases += self.mlp_bias * sum(self.linear(name)[1] for name in MLP)
        return embeddings + self.layers * (2 * self.hidden + biases) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters of the base."""
        return self.linear_parameters + self.other_parameters

    def adapter_parameters(self, targets: Iterable[str], rank: int) -> int:
        """LoRA parameters: A [rank, inputs] and B [outputs, rank] for each target in each layer."""
        return self.layers * sum(rank * sum(self.linear(name)) for name in targets)


def read_shape(path: Path) -> Shape:
    """The shape that a ``config.json`` describes, absent values as transformers fills them in.

    Raises:
        UserError: no such file, not a Llama or Mistral, already quantised, or values that make no model.
    """
    architecture = check_architecture(path)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig, MistralConfig

    kind = LlamaConfig if architecture == "LlamaForCausalLM" else MistralConfig
    try:
        with quiet_transformers():
            config = kind.from_dict(read_config(path))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"not a configuration of {architecture}: {error}", where=str(path)) from error
    shape = Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head=config.head_dim or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
    )
    sizes = (getattr(shape, name) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head"))
    if not all(size > 0 for size in (*sizes, shape.vocabulary)) or shape.heads % shape.kv_heads:
        raise UserError(f"its sizes make no model: {json.dumps(shape.__dict__)}", where=str(path))
    return shape
