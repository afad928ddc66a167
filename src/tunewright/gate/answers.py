"""Answers token by token, next-token distributions, and the reference that gives correct answers.

The reference is the trained model: the base with one adapter at a time, on peft and transformers only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from tunewright.chat import ChatFormat
from tunewright.config import Quantization
from tunewright.engines.protocol import Engine, stream
from tunewright.gate.prompts import Probe, places
from tunewright.gate.results import TOP
from tunewright.generation.generate import generate
from tunewright.generation.requests import Completion, Finish, Request, TokenLogprob
from tunewright.generation.text_stream import TextStream
from tunewright.models.bases import Base
from tunewright.models.loading import load_model, with_adapters

Digest = str | None
"""A model: an adapter's digest, or None for the base."""
Ids = tuple[int, ...]

TOKENS = 8
"""Tokens of an answer in the isolation test: enough for models to differ, few enough for many requests."""
END = -1
"""Placeholder for all tokens that end an answer."""
_LIKELIEST = 64
"""The number of alternatives that are kept for each token of a greedy answer."""


@dataclass(frozen=True)
class ModelAnswer:
    """A model's answer."""

    ids: Ids
    finish: Finish

    @property
    def choices(self) -> Ids:
        """The model's choices: its tokens, and the end if it chose to end."""
        return (*self.ids, END) if self.finish == "stop" else self.ids


@dataclass(frozen=True)
class GreedyAnswer:
    """A model's greedy answer, and the alternatives to each choice."""

    answer: ModelAnswer
    behind: tuple[Mapping[int, float], ...]
    """For each choice, by how many nats other tokens are less likely: the likeliest tokens, and :data:`END`."""

    def shortfall(self, other: ModelAnswer) -> float:
        """Return by how many nats another answer is less likely where it diverges; its later tokens may be worse."""
        for own, theirs, behind in zip(self.answer.choices, other.choices, self.behind, strict=False):
            if own != theirs:
                # An unlisted token is less likely than all listed tokens.
                return behind.get(theirs, max(behind[token] for token in behind if token != END))
        return 0.0


def alternatives(logits: Tensor, stop_ids: Collection[int]) -> dict[int, float]:
    """Return by how many nats the likeliest tokens and the end are less likely than the likeliest one.

    Args:
        logits: logits or log-probabilities of one place, [vocabulary].
        stop_ids: tokens that end an answer; :data:`END` stands for the likeliest of them.
    """
    top = logits.topk(min(_LIKELIEST, len(logits)))
    behind = (top.values[0] - top.values).tolist()
    at = dict(zip(top.indices.tolist(), behind, strict=True))
    if stop_ids:
        at[END] = float(top.values[0] - logits[list(stop_ids)].max())
    return at


def ended(ids: Sequence[int], stop_ids: Collection[int]) -> ModelAnswer:
    """Return an answer without its end token and what follows it."""
    place = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return ModelAnswer(tuple(ids), "length") if place is None else ModelAnswer(tuple(ids[:place]), "stop")


def cut(answer: ModelAnswer, stop: tuple[str, ...], chat: ChatFormat) -> Completion:
    """Return an answer, cut at the first stop string."""
    pieces, text = TextStream(chat.text, stop), ""
    for place, token in enumerate(answer.ids if stop else (), 1):
        text += pieces.push(token)
        if pieces.stopped:
            return Completion(answer.ids[:place], "stop", text)
    return Completion(answer.ids, answer.finish)


def comparable(completion: Completion) -> ModelAnswer:
    """Return an answer for comparison token by token; a stop string ends it without a choice of the model."""
    return ModelAnswer(completion.ids, "length" if completion.before_stop is not None else completion.finish)


async def ask(engine: Engine, request: Request) -> tuple[ModelAnswer, list[TokenLogprob]]:
    """Return an engine's answer, with the engine's report on its tokens."""
    ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    finish: Finish | None = None
    async with aclosing(stream(engine, request)) as deltas:
        async for delta in deltas:
            ids += delta.ids
            logprobs += delta.logprobs
            finish = delta.finish
    assert finish is not None
    return ModelAnswer(tuple(ids), finish), logprobs


_BATCH = 8

Context = tuple[tuple[int, ...], list[int]]
"""Tokens, and for each measured place the number of tokens before it."""


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens at a place, as an engine lists them."""

    ids: Tensor
    """[listed]"""
    log_probs: Tensor
    """[listed], float32; they need not sum to 1, because other tokens are not listed."""


@dataclass(frozen=True)
class Distance:
    """Distances of two sets of distributions at each place; each field is [places]."""

    kl: Tensor
    max_logit: Tensor
    same_top: Tensor


def answer(
    model: Any, probe: Probe, chat: ChatFormat, adapter: str | None, on_answer: Callable[[], None]
) -> list[Completion]:
    """Return the greedy answers to the probe's prompts."""
    return generate(
        model,
        [Request(prompt, adapter, probe.limit, stop=probe.stop) for prompt in probe.prompts],
        stop_ids=chat.stop_ids,
        pad_id=chat.tokenizer.pad_token_id,
        batch_size=_BATCH,
        decode=chat.text,
        on_finished=lambda _index, _completion: on_answer(),
    )


@torch.inference_mode()
def distributions(model: Any, contexts: Sequence[Context]) -> Tensor:
    """Return next-token log-probabilities [places, vocabulary] at every place of every context, float32, on the CPU."""
    found = []
    for ids, before in contexts:
        kept = torch.tensor(before, device=model.device) - 1
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=kept).logits[
            0
        ]
        found.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(found)


def distance(trained: Tensor, seen: Tensor | Sequence[TopTokens]) -> Distance:
    """Return the distances from the trained model's log-probabilities [places, vocabulary] to another model's.

    For unlisted tokens, only the sum counts. The KL divergence of these grouped distributions is at most
    the full ones' (the log sum inequality; Cover and Thomas 2006, theorem 2.7.1), and next to equal when a
    thousand tokens are listed. An unlisted token's own log-probability is at most the lowest listed one.
    """
    listed = [TopTokens(torch.arange(len(row)), row) for row in seen] if isinstance(seen, Tensor) else seen
    kl, moved, same = zip(*(_distance_of(*pair) for pair in zip(trained, listed, strict=True)), strict=True)
    return Distance(torch.stack(kl), torch.stack(moved), torch.tensor(same))


def _distance_of(trained: Tensor, listed: TopTokens) -> tuple[Tensor, Tensor, bool]:
    # KL(trained || other) = sum p (log p - log q) over the listed tokens, and one more term for the rest of both.
    theirs = listed.log_probs.double()
    ours = trained[listed.ids].double()
    kl = (ours.exp() * (ours - theirs)).sum()
    our_rest, their_rest = (1 - ours.exp().sum()), (1 - theirs.exp().sum())
    if len(listed.ids) < len(trained) and our_rest > 0:
        kl = kl + our_rest * (our_rest.log() - their_rest.clamp(min=1e-12).log())
    other = torch.full_like(trained, float(theirs.min()))
    other[listed.ids] = listed.log_probs.to(trained.dtype)
    top = trained.topk(min(TOP, len(trained))).indices
    moved = (trained[top] - other[top]).abs().max()
    return kl.clamp(min=0), moved, bool(trained.argmax() == listed.ids[listed.log_probs.argmax()])


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

    def answers(self, model: Digest, prompts: Sequence[Ids]) -> list[ModelAnswer]:
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
        """Return a model's greedy answers, with their distributions and the adapter's effect on them."""
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

    def _ended(self, made: Any, prompts: Sequence[Ids]) -> list[ModelAnswer]:
        """Return the answers without their ends and the padding behind them."""
        return [ended(ids, self._stop_ids) for ids in made.sequences[:, max(map(len, prompts)) :].tolist()]

    def _greedy(self, answer: ModelAnswer, logits: Tensor) -> GreedyAnswer:
        behind = tuple(alternatives(row, self._stop_ids) for row in logits[: len(answer.choices)])
        return GreedyAnswer(answer, behind)

    @torch.inference_mode()
    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[ModelAnswer]) -> list[float]:
        """Score all answers in one pass; no token of a shorter answer sees the padding behind it."""
        longest = max(len(answer.ids) for answer in answers)
        ids = [[*prompt, *answer.ids, *[0] * (longest - len(answer.ids))] for answer in answers]
        with self._answering(model):
            found = self._model(
                input_ids=torch.tensor(ids, device=self._model.device), use_cache=False, logits_to_keep=longest + 1
            )
        return [self._shortfall(logits, answer) for logits, answer in zip(found.logits.double(), answers, strict=True)]

    def _shortfall(self, logits: Tensor, answer: ModelAnswer) -> float:
        """Return an answer's shortfall, given the logits [places + 1, vocabulary] of its places and the next one."""
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
