"""The reference: the trained model's answers, by the base with one adapter at a time on peft and transformers alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from tunewright.chat import ChatFormat
from tunewright.config import Quantization
from tunewright.gate.answers import (
    Answer,
    Digest,
    GreedyAnswer,
    Ids,
    alternatives,
    comparable,
    cut,
    distance,
    distributions,
    ended,
)
from tunewright.gate.isolation import TOKENS
from tunewright.gate.prompts import Probe, places
from tunewright.generation.requests import Completion
from tunewright.models.bases import Base
from tunewright.models.loading import load_model, with_adapters

_BATCH = 8


@dataclass(frozen=True)
class ReferenceAnswer:
    """A greedy answer, and the distributions at some of its places."""

    completion: Completion
    greedy: GreedyAnswer
    places: tuple[int, ...]
    """Numbers of answer tokens before each place; empty for an empty answer."""
    log_probs: Tensor
    """[places, vocabulary], float32, on the CPU."""
    effect: Tensor
    """[places]: KL divergence from this model to the base, in nats; 0 for the base itself."""


class PeftReference:
    """Correct answers from a separate model, which shares no code with the engines. It is loaded on first use."""

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

    def greedy(self, model: Digest, prompts: Sequence[Ids], tokens: int = TOKENS) -> list[GreedyAnswer]:
        """Return transformers' greedy answers, computed in one batch, with the alternatives to each token."""
        with self._answering(model):
            made = self._generate(prompts, tokens, output_logits=True)
        logits = torch.stack(made.logits, dim=1).float()  # [prompts, places, vocabulary]
        answers = self._ended(made, prompts)
        return [self._greedy(answer, row) for answer, row in zip(answers, logits, strict=True)]

    def measured(
        self, model: Digest, probe: Probe, chat: ChatFormat, on_answers: Callable[[int], None]
    ) -> list[ReferenceAnswer]:
        """Return a model's greedy answers, with their distributions and what the adapter changes of them."""
        completions: list[Completion] = []
        for first in range(0, len(probe.prompts), _BATCH):
            prompts = probe.prompts[first : first + _BATCH]
            with self._answering(model):
                made = self._generate(prompts, probe.limit)
            completions += [cut(answer, probe.stop, chat) for answer in self._ended(made, prompts)]
            on_answers(len(prompts))
        return [self._measured(model, *answered) for answered in zip(probe.prompts, completions, strict=True)]

    def _measured(self, model: Digest, prompt: Ids, completion: Completion) -> ReferenceAnswer:
        ids, count = (*prompt, *completion.ids), len(completion.ids)
        chosen = list(places(count, ended=False)) if count else []
        with self._answering(model):
            every = distributions(self._model, [(ids, [len(prompt) + place for place in range(count + 1)])])
        effect = torch.zeros(len(chosen), dtype=torch.float64)
        if model is not None and chosen:
            with self._answering(None):
                base = distributions(self._model, [(ids, [len(prompt) + place for place in chosen])])
            effect = distance(every[chosen], base).kl
        greedy = self._greedy(comparable(completion), every)
        return ReferenceAnswer(completion, greedy, tuple(chosen), every[chosen].clone(), effect)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Ids], tokens: int, *, output_logits: bool = False) -> Any:
        """Return what transformers' own ``generate`` computes, which shares no code with the engines."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        return self._model.generate(
            input_ids=torch.tensor(ids, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=self._stop_ids or None,
            pad_token_id=0,
            output_logits=output_logits,
            return_dict_in_generate=True,
        )

    def _ended(self, made: Any, prompts: Sequence[Ids]) -> list[Answer]:
        """Return the answers without their ends and the padding behind them."""
        return [ended(ids, self._stop_ids) for ids in made.sequences[:, max(map(len, prompts)) :].tolist()]

    def _greedy(self, answer: Answer, logits: Tensor) -> GreedyAnswer:
        behind = tuple(alternatives(row, self._stop_ids) for row in logits[: len(answer.choices)])
        return GreedyAnswer(answer, behind)

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

    def _shortfall(self, logits: Tensor, answer: Answer) -> float:
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
