"""A tiny base and an adapter on it, by plain transformers and peft; and turns that such a base completes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.training import self_samples


@contextmanager
def short_turns(answer_tokens: int) -> Iterator[None]:
    """A base of random weights ends a turn about every 260 tokens, wherever that is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_samples, "_CHUNK", 24)
        patch.setattr(self_samples, "INSTRUCTION_TOKENS", 200)
        patch.setattr(self_samples, "ANSWER_TOKENS", answer_tokens)
        yield


def only_adapter(project: Project) -> Adapter:
    """The one that a project has."""
    (trained,) = (Adapter(folder) for folder in project.folder.adapters.iterdir())
    return trained


def plain_base(base: Path) -> Any:
    """The base by transformers alone, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def plain_tuned(base: Path, adapter: Path) -> Any:
    """The base with an adapter's folder on it, by peft alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(plain_base(base), adapter).eval()


def likeliest_choice(model: Any, tokenizer: Any, text: str, choices: tuple[str, ...]) -> int:
    """One choice at a time, by the sum of its tokens' log-probabilities for each of its characters."""
    scores = []
    start = len(tokenizer(f"{text}\nAnswer:")["input_ids"])
    for choice in choices:
        ids = tokenizer(f"{text}\nAnswer: {choice}")["input_ids"]
        with torch.inference_mode():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = sum(float(log_p[place - 1, ids[place]]) for place in range(start, len(ids)))
        scores.append(total / len(choice))
    return scores.index(max(scores))
