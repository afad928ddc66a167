"""Loading a base and its tokenizer, and putting adapters on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.errors import UserError
from tunewright.models.bases import Base
from tunewright.models.quantized import held_in_nf4, nf4_config
from tunewright.models.quiet import quiet_transformers
from tunewright.recipe import Quantize

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def device() -> str:
    """Where models run: this process's CUDA card (the first one's where it is alone), else the processor."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def load_model(
    base: Base, dtype: str, quantize: Quantize, place: str | None = None, *, divisible: bool = False
) -> PreTrainedModel:
    """The base's weights in ``dtype`` ("bfloat16" or "float32"), in evaluation mode, on ``place`` (None: `device()`).

    With ``quantize`` "nf4" the linear layers are held in 4 bits and compute in ``dtype``; embeddings, norms and the
    output layer are in ``dtype`` still. ``divisible``: FSDP can divide the 4-bit weights among processes.

    Raises:
        UserError: NF4 is asked for, and bitsandbytes is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=getattr(torch, dtype),
            quantization_config=nf4_config(dtype, divisible=divisible) if quantize == "nf4" else None,
            device_map=place or device(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        if quantize == "nf4":
            held_in_nf4(model)
            # Embeddings and norms still lie in the mapped file, which would keep the 16-bit layers resident with them.
            for weight in model.parameters():
                if weight.is_floating_point():
                    weight.data = weight.data.clone()
    model.eval()
    return model


def named(base: Base, quantize: Quantize) -> str:
    """What people are told is loaded: the base as the recipe names it, and how it is held where that is not whole."""
    return f"{base.spec} in NF4" if quantize == "nf4" else base.spec


def load_tokenizer(base: Base) -> Any:
    """The base's own tokenizer, with a padding token (the end of text, where it has none)."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the tokenizer cannot be read: {error}", where=str(base.folder)) from error
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end-of-text token (eos_token)", where=str(base.folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_adapters(model: PreTrainedModel | PeftModel, folders: Mapping[str, Path]) -> PeftModel:
    """Put adapters (name to folder; at least one) beside each other, and those there already, on one base."""
    from peft import PeftModel

    with quiet_transformers():
        for name, folder in folders.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    assert isinstance(model, PeftModel), "at least one adapter"
    return model.eval()


def context_length(base: Base) -> int:
    """The longest conversation, prompt and answer together, in tokens."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base.folder, local_files_only=True).max_position_embeddings)


def decoder_layers(base: Base) -> int:
    """How many layers the base has."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base.folder, local_files_only=True).num_hidden_layers)


def hidden_size(base: Base) -> int:
    """The width of the base: numbers in a token's hidden state."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base.folder, local_files_only=True).hidden_size)


def end_token_ids(base: Base) -> frozenset[int]:
    """The tokens that end an answer by the base's generation settings, read without its weights.

    Raises:
        UserError: settings that cannot be read, or that name what is no token.
    """
    from transformers import AutoConfig, GenerationConfig

    path = base.folder / "generation_config.json"
    try:
        if path.exists():
            ends = GenerationConfig.from_pretrained(base.folder, local_files_only=True).eos_token_id
        else:
            config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
            ends = GenerationConfig.from_model_config(config).eos_token_id
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the generation settings cannot be read: {error}", where=str(path)) from error
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(token, int) and token >= 0 for token in listed):
        raise UserError(f"eos_token_id is {ends!r}; it is a token's id, or a list of them", where=str(path))
    return frozenset(listed)
