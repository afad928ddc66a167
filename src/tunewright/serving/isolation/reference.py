"""The reference of the isolation test: the base with one adapter at a time, on peft and transformers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from tunewright.config import Quantization
from tunewright.models.bases import Base
from tunewright.models.loading import load_model, with_adapters
from tunewright.serving.isolation.probes import END, TOKENS, Answer, Digest, GreedyAnswer, Ids

_LIKELIEST = 64
"""The number of alternatives that are kept for each token of a greedy answer."""


class PeftReference:
    """Correct answers from a separate model, which shares no code with the engines. It is loaded on first use.

    Args:
        base: the base, in the same precision as in the engine.
        folders: adapters by digest.
        stop_ids: tokens that end an answer.
    """

    def __init__(
        self,
        base: Base,
        dtype: str,
        quantization: Quantization,
        folders: Mapping[str, Path],
        *,
        stop_ids: Collection[int],
    ) -> None:
        self._base = base
        self._dtype = dtype
        self._quantization = quantization
        self._folders = folders
        self._stop_ids = sorted(stop_ids)
        self._loaded: Any = None

    @property
    def _model(self) -> Any:
        """The base with all adapters."""
        if self._loaded is None:
            clear_device_cache(garbage_collection=True)  # an engine that has just stopped may hold memory
            model: Any = load_model(self._base, self._dtype, self._quantization)
            self._loaded = with_adapters(model, self._folders) if self._folders else model
        return self._loaded

    def unload(self) -> None:
        """Free the model until the next call."""
        self._loaded = None
        clear_device_cache(garbage_collection=True)

    def answers(self, model: Digest, prompts: Sequence[Ids]) -> list[Answer]:
        """Return transformers' greedy answers, computed in one batch."""
        return [greedy.answer for greedy in self.greedy(model, prompts)]

    @torch.inference_mode()
    def greedy(self, model: Digest, prompts: Sequence[Ids], tokens: int = TOKENS) -> list[GreedyAnswer]:
        """Return transformers' greedy answers, computed in one batch, with the alternatives to each token."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        with self._answering(model):
            made = self._model.generate(
                input_ids=torch.tensor(ids, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=self._stop_ids or None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.stack(made.logits, dim=1).float()  # [prompts, places, vocabulary]
        answers = [self._ended(ids) for ids in made.sequences[:, longest:].tolist()]
        return [GreedyAnswer(answer, self._behind(row, answer)) for answer, row in zip(answers, logits, strict=True)]

    def _behind(self, logits: torch.Tensor, answer: Answer) -> tuple[dict[int, float], ...]:
        return tuple(alternatives(row, self._stop_ids) for row in logits[: len(answer.choices)])

    def _ended(self, ids: list[int]) -> Answer:
        """Return an answer without its end and the padding behind it."""
        ends = [place for place, token in enumerate(ids) if token in self._stop_ids]
        return Answer(tuple(ids[: ends[0]]), "stop") if ends else Answer(tuple(ids), "length")

    @torch.inference_mode()
    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[Answer]) -> list[float]:
        """Score all answers in one pass; no token of a shorter answer sees the padding behind it."""
        longest = max(len(answer.ids) for answer in answers)
        ids = [[*prompt, *answer.ids, *[0] * (longest - len(answer.ids))] for answer in answers]
        with self._answering(model):
            found = self._model(
                input_ids=torch.tensor(ids, device=self._model.device), use_cache=False, logits_to_keep=longest + 1
            )
        return [self._shortfall(logits, answer) for logits, answer in zip(found.logits.double(), answers, strict=True)]

    def _shortfall(self, logits: torch.Tensor, answer: Answer) -> float:
        """Return an answer's shortfall, given the logits [places + 1, vocabulary] of its places and the one behind."""
        best = logits.max(-1).values
        count = len(answer.ids)
        chosen = logits[range(count), list(answer.ids)]
        short = (best[:count] - chosen).tolist()
        if answer.finish == "stop":
            short.append(float(best[count] - logits[count, self._stop_ids].max()))
        return max(short, default=0.0)

    @contextmanager
    def _answering(self, model: Digest) -> Iterator[None]:
        if model is not None:
            # PEFT visits all layers and adapters for this. With many adapters, it takes as long as a token.
            if self._model.active_adapter != model:
                self._model.set_adapter(model)
            yield
        elif hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                yield
        else:
            yield


def alternatives(logits: torch.Tensor, stop_ids: Collection[int]) -> dict[int, float]:
    """Return by how many nats the likeliest tokens and the end are less likely than the likeliest one.

    Args:
        logits: logits or log-probabilities of one place, [vocabulary].
        stop_ids: tokens that end an answer; :data:`.probes.END` stands for the likeliest of them.
    """
    top = logits.topk(min(_LIKELIEST, len(logits)))
    behind = (top.values[0] - top.values).tolist()
    at = dict(zip(top.indices.tolist(), behind, strict=True))
    if stop_ids:
        at[END] = float(top.values[0] - logits[list(stop_ids)].max())
    return at
