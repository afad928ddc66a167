"""The right answers: the base with one adapter at a time, by peft and transformers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tunewright.models.bases import Base
from tunewright.models.loading import load_model, with_adapters
from tunewright.recipe import Quantize
from tunewright.serving.isolation import TOKENS, Answer, Digest, Ids


class PeftOracle:
    """A model of its own beside the engine's; nothing that serving uses is used here.

    Args:
        base: the base, which is held as the engine holds it.
        folders: adapters by digest; loaded one by one when asked for.
        stop_ids: tokens that end an answer.
    """

    def __init__(
        self, base: Base, dtype: str, quantize: Quantize, folders: Mapping[str, Path], *, stop_ids: Collection[int]
    ) -> None:
        model: Any = load_model(base, dtype, quantize)
        self._model = with_adapters(model, folders) if folders else model
        self._stop_ids = sorted(stop_ids)

    @torch.inference_mode()
    def answer(self, model: Digest, prompt: Ids) -> Answer:
        """transformers' own greedy answer."""
        ids = torch.tensor([prompt], device=self._model.device)
        with self._answering(model):
            whole = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=self._stop_ids or None,
                pad_token_id=0,
            )
        said = tuple(whole[0, len(prompt) :].tolist())
        if said and said[-1] in self._stop_ids:
            return Answer(said[:-1], "stop")
        return Answer(said, "length")

    @torch.inference_mode()
    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[Answer]) -> list[float]:
        """One pass for each answer: rows of one length need no padding, and are computed as they would be alone."""
        with self._answering(model):
            return [self._shortfall(prompt, answer) for answer in answers]

    def _shortfall(self, prompt: Ids, answer: Answer) -> float:
        ids = torch.tensor([[*prompt, *answer.ids]], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].double()
        best = logits.max(-1).values  # [answer + 1]
        count = len(answer.ids)
        chosen = logits[range(count), list(answer.ids)]
        short = (best[:count] - chosen).tolist()
        if answer.finish == "stop":
            short.append(float(best[count] - logits[count, self._stop_ids].max()))
        return max(short, default=0.0)

    @contextmanager
    def _answering(self, model: Digest) -> Iterator[None]:
        if model is not None:
            self._model.set_adapter(model)
            yield
        elif hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                yield
        else:
            yield
