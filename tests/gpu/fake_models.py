"""Llamas and Mistrals of real size on the fake card, and runs that train them as ``tunewright train`` does."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from fake_card import put_on_card
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from making.tiny_bases import byte_tokenizer
from tunewright.chat import Tokens
from tunewright.config import Config
from tunewright.core.progress import LogReporter
from tunewright.models.bases import Base
from tunewright.models.families import ATTENTION, MLP, Shape
from tunewright.models.memory_estimate import BatchShape
from tunewright.training.run import Run

SHAPES = {
    "tiny": Shape(2, 128, 256, 4, 2, 32, 1024, tied=False, attention_bias=False, mlp_bias=False),
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000, tied=False, attention_bias=False, mlp_bias=False),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 128, 32000, tied=False, attention_bias=False, mlp_bias=False),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False, attention_bias=False, mlp_bias=False),
    "llama-3-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False, attention_bias=False, mlp_bias=False),
}


def build(
    shape: Shape, *, mistral: bool = False, window: int | None = None, nf4: bool = False, dtype: Any = torch.bfloat16
) -> Any:
    """Return a base as `models.loading.load_model` does, but on the fake card and without numbers.

    Args:
        shape: its size.
        mistral: a Mistral, not a Llama.
        window: a Mistral's sliding window.
        nf4: hold the linear layers in 4 bits.
        dtype: of all other weights.
    """
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 1 << 17,
        "dtype": dtype,
    }
    with torch.device("meta"):
        model_config: Any = MistralConfig(**sizes, sliding_window=window) if mistral else LlamaConfig(**sizes)
        model: Any = (MistralForCausalLM if mistral else LlamaForCausalLM)(model_config).to(dtype)
    if nf4:
        for layer in model.model.layers:
            for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
                for name in names:
                    setattr(part, name, _in_4_bits(getattr(part, name), dtype))
        model.is_loaded_in_4bit = True
    put_on_card(model)
    # As from_pretrained(device_map=...) leaves it.
    model.hf_device_map = {"": torch.device("cuda", 0)}
    return model.eval()


def _in_4_bits(linear: Any, dtype: Any) -> Any:
    return Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )


def rows(load: BatchShape, seed: int = 0) -> list[Tokens]:
    """Return rows of random ids that begin alike, as many and as long as ``load`` says."""
    luck = random.Random(seed)
    prefix = [luck.randrange(3, 250) for _ in range(load.shared)]
    made = []
    for _ in range(load.rows):
        ids = (*prefix, *(luck.randrange(3, 250) for _ in range(load.own)))
        made.append(Tokens(ids, (False,) * (len(ids) - load.trained) + (True,) * load.trained))
    return made


class Listing(LogReporter):
    """Adds every line to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def say(self, message: str) -> None:
        """Add a message."""
        self.lines.append(message)

    def warn(self, message: str) -> None:
        """Add a warning."""
        self.lines.append(message)


def use_stand_in_for_liger() -> None:
    """Let this process find `stand_ins.liger_kernel` in place of liger-kernel."""
    from transformers.utils.import_utils import is_liger_kernel_available

    sys.path.insert(0, str(Path(__file__).with_name("stand_ins")))
    is_liger_kernel_available.cache_clear()


def train(
    model: Any,
    settings: dict[str, Any],
    train_rows: Sequence[Tokens],
    dev_rows: Sequence[Tokens],
    *,
    replay: Sequence[Tokens] = (),
    lines: list[str] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train by `training.run.Run`, which is what ``tunewright train`` calls once rows and base are there.

    Args:
        model: from `build`.
        settings: the config's train section.
        train_rows, dev_rows, replay: encoded rows.
        lines: gets what the run reports.

    Returns:
        The run's history, and how its rows went through the model (`Run.how`).
    """
    with tempfile.TemporaryDirectory() as folder:
        # By default the same counts where liger-kernel is installed, whose kernels cannot run here.
        config = Config.model_validate({"train": {"use_liger_kernel": False, **settings}})
        reporter = Listing([] if lines is None else lines)
        architecture = type(model).__name__
        (Path(folder) / "config.json").write_text(
            json.dumps({**model.config.to_dict(), "architectures": [architecture], "quantization_config": None})
        )
        run = Run(config, Base("fake", Path(folder), None, architecture, {}), Path(folder), reporter)
        history, _ = run.fit(model, byte_tokenizer(), train_rows, dev_rows, None, None, replay)
        return history, run.details()
