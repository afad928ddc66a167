"""Bases with adapters that have an effect, and references for exported files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tunewright.adapters.registry import Adapter, adapter_digest
from tunewright.config import PRESETS
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.models.bases import Base, resolve_base

TEXTS = (
    "What's  new,\n\nZoë? 1234567 d'été — naïve  café",
    "Łódź 中文字 🙂🙂 \t tab; it's 3.14 and we'll see",
    "def f(x):\n    return x ** 2  # done\n\n\n",
    "A",
)
"""Texts that distinguish tokenizers' rules: digits, contractions, white space, other scripts."""

CHATS: tuple[tuple[Message, ...], ...] = tuple(
    messages
    for text in TEXTS
    for messages in (
        (Message("user", text.strip()),),
        (Message("user", "hello"), Message("assistant", "yes"), Message("user", text.strip())),
    )
)


def open_base(folder: Path) -> Base:
    """A base in a folder."""
    return resolve_base(str(folder), None, folder.parent, LogReporter())


def in_bfloat16(folder: Path) -> Path:
    """The base in ``folder`` with its weights rounded to bfloat16 and stored so, as bases are published."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, change: Callable[[Any], None] | None = None, **settings: Any) -> Adapter:
    """An adapter of every linear layer with random weights that move the base's logits, and a lineage."""
    torch.manual_seed(1)
    model_config: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(PRESETS["all-linear"]["target_modules"]),
    }
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**(model_config | settings), task_type="CAUSAL_LM"))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        if "lora_magnitude" in name:
            weight.data *= 1.1
    if change is not None:
        change(tuned)
    tuned.save_pretrained(str(folder))
    config = {"train": {"dtype": "bfloat16", "quantization": "none"}}
    write_json(folder / "lineage.json", {"digest": adapter_digest(folder), "config": config})
    return Adapter(folder)


def logits(model: Any, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each row, float32."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([list(row)])).logits[0].float() for row in ids]


def peft_logits(base: Path, adapter: Path, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return peft's own logits, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter).eval(), ids)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
