"""Bases with random weights and a tokenizer that needs no download: nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models.bases import Base
from tunewright.models.families import ATTENTION, MLP, Shape
from tunewright.models.loading import device

SHAPES = {
    # Of 2 billion parameters, for what writes a base to disk.
    "2b": Shape(24, 2048, 8192, 32, 8, 64, 128256, tied=False, attention_bias=False, mlp_bias=False),
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False, attention_bias=False, mlp_bias=False),
    "70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False, attention_bias=False, mlp_bias=False),
}
TOY = Shape(2, 64, 128, 4, 2, 16, 512, tied=False, attention_bias=False, mlp_bias=False)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def shape_of(name: str, toy: bool, layers: int | None = None) -> Shape:
    """Return the shape of this name, or the toy one in its place."""
    shape = TOY if toy else SHAPES[name]
    return shape if layers is None else replace(shape, layers=layers)


def tokenizer() -> Any:
    """Return a tokenizer with one token per byte and ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({byte: place for place, byte in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHATML
    return fast


def config_of(shape: Shape) -> Any:
    """Return transformers' configuration of a Llama with this shape."""
    from transformers import LlamaConfig

    tokens = tokenizer()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.dtype = torch.bfloat16
    return config


def build(shape: Shape, *, nf4: bool, place: str | None = None) -> Any:
    """Return a bfloat16 Llama with random weights on ``place`` (None: where training runs).

    With ``nf4`` the linear layers are quantized one at a time: the 16-bit ones are never in memory together.
    """
    from transformers import LlamaForCausalLM

    place = place or device()
    config = config_of(shape)
    with torch.device("meta"):
        whole: Any = LlamaForCausalLM(config)
        model = whole.to(torch.bfloat16)
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
            for name in names:
                linear = getattr(part, name)
                weight = _drawn(linear.weight, place)
                if nf4:
                    setattr(part, name, _in_nf4(linear, weight, place))
                else:
                    linear.weight = nn.Parameter(weight, requires_grad=False)
    for part in (model.model.embed_tokens, model.lm_head):
        part.weight = nn.Parameter(_drawn(part.weight, place), requires_grad=False)
    for name, part in model.named_modules():
        if name.endswith("norm"):
            ones = torch.ones(shape.hidden, dtype=torch.bfloat16, device=place)
            part.weight = nn.Parameter(ones, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(place)
    if nf4:
        from tunewright.models.loading import disable_repacking

        # The mark that transformers leaves on a base that it quantized itself.
        model.is_loaded_in_4bit = True
        disable_repacking(model)
    assert not any(weight.is_meta for weight in model.parameters())
    return model.eval()


def _drawn(weight: Tensor, place: str) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bfloat16, device=place).normal_(std=0.02)


def _in_nf4(linear: Any, weight: Tensor, place: str) -> Any:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    packed: Any = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.weight = packed.to(place)
    return layer


def write_folder(shape: Shape, folder: Path, std: float = 0.02) -> Path:
    """Write a base with random weights to disk, one shard per layer; no more than one shard is in memory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config_of(shape).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(shape, std)):
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _shards(shape: Shape, std: float) -> Iterator[dict[str, Tensor]]:
    """The weights by name, embeddings and the output layer first, then layer by layer."""
    place = device()

    def drawn(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=place).normal_(std=std).cpu()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": drawn(shape.vocabulary, shape.hidden), "model.norm.weight": ones.clone()}
    yield {"lm_head.weight": drawn(shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        weights = {}
        for part, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            for name in names:
                inputs, outputs = shape.linear(name)
                weights[f"model.layers.{layer}.{part}.{name}.weight"] = drawn(outputs, inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = ones.clone()
        yield weights


def base_in_memory(shape: Shape, folder: Path) -> Base:
    """Return a base of which only the configuration is on disk, for a run on a model from `build`."""
    config_of(shape).save_pretrained(folder)
    return Base("random-weights", folder, None, "LlamaForCausalLM", {})
