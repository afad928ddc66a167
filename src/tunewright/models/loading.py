"""Loading a base and its tokenizer, and putting adapters on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.errors import UserError
from tunewright.models.bases import Base
from tunewright.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def device() -> str:
    """Where models run: the first CUDA card if there is one, else the processor."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def load_model(base: Base, dtype: str) -> PreTrainedModel:
    """The base's weights in ``dtype`` ("bfloat16" or "float32"), in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=getattr(torch, dtype),
            device_map=device(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model.eval()
    return model


def load_tokenizer(base: Base) -> Any:
    """The base's own tokenizer, with a padding token (the end of text, where it has none)."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"the tokenizer cannot be read: {error}", where=str(base.folder)) from error
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end-of-text token (eos_token)", where=str(base.folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> PeftModel:
    """Put adapters (name to folder; at least one) beside each other on one copy of the base."""
    from peft import PeftModel

    with quiet_transformers():
        (first, folder), *others = folders.items()
        tuned = PeftModel.from_pretrained(model, folder, adapter_name=first)
        for name, folder in others:
            tuned.load_adapter(folder, adapter_name=name)
    return tuned.eval()


def context_length(base: Base) -> int:
    """The longest conversation, prompt and answer together, in tokens."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base.folder, local_files_only=True).max_position_embeddings)


def generation_config(base: Base) -> Any:
    """The base's generation settings, read without its weights."""
    from transformers import AutoConfig, GenerationConfig

    if (base.folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(base.folder, local_files_only=True)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(base.folder, local_files_only=True))
