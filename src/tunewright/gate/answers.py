"""Answers token by token, and by how many nats one answer is less likely than another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunewright.chat import ChatFormat
from tunewright.engines.protocol import Engine, stream
from tunewright.gate.parity import TOP
from tunewright.gate.prompts import Probe
from tunewright.generation.generate import generate
from tunewright.generation.requests import Completion, Finish, Request, TokenLogprob
from tunewright.generation.text_stream import TextStream

Digest = str | None
"""A model: an adapter's digest, or None for the base."""
Ids = tuple[int, ...]

END = -1
"""Placeholder for all tokens that end an answer."""
_LIKELIEST = 64
"""The number of alternatives that are kept for each token of a greedy answer."""


@dataclass(frozen=True)
class Answer:
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

    answer: Answer
    behind: tuple[Mapping[int, float], ...]
    """For each choice, by how many nats other tokens are less likely: the likeliest tokens, and :data:`END`."""

    def shortfall(self, other: Answer) -> float:
        """Return by how many nats another answer is less likely where it diverges; its later tokens may be worse."""
        for own, theirs, behind in zip(self.answer.choices, other.choices, self.behind, strict=False):
            if own != theirs:
                # An unlisted token is less likely than all listed ones.
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


def ended(ids: Sequence[int], stop_ids: Collection[int]) -> Answer:
    """Return an answer without its end token and what follows it."""
    place = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return Answer(tuple(ids), "length") if place is None else Answer(tuple(ids[:place]), "stop")


def cut(answer: Answer, stop: tuple[str, ...], chat: ChatFormat) -> Completion:
    """Return an answer, cut at the first stop string."""
    pieces, text = TextStream(chat.text, stop), ""
    for place, token in enumerate(answer.ids if stop else (), 1):
        text += pieces.push(token)
        if pieces.stopped:
            return Completion(answer.ids[:place], "stop", text)
    return Completion(answer.ids, answer.finish)


def comparable(completion: Completion) -> Answer:
    """Return an answer for comparison token by token; a stop string ends it without a choice of the model."""
    return Answer(completion.ids, "length" if completion.before_stop is not None else completion.finish)


async def ask(engine: Engine, request: Request) -> tuple[Answer, list[TokenLogprob]]:
    """Return an engine's answer, with what it reports of its tokens."""
    ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    finish: Finish | None = None
    async with aclosing(stream(engine, request)) as deltas:
        async for delta in deltas:
            ids += delta.ids
            logprobs += delta.logprobs
            finish = delta.finish
    assert finish is not None
    return Answer(tuple(ids), finish), logprobs


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

    Of tokens that are not listed only the sum counts. The KL divergence of these grouped distributions is at most that
    of the full ones (the log sum inequality; Cover and Thomas 2006, theorem 2.7.1), and next to equal when a thousand
    tokens are listed. An unlisted token's own log-probability is at most the lowest listed one.
    """
    if isinstance(seen, Tensor):
        rows = [(row, other) for row, other in zip(trained, seen, strict=True)]
        parts = [_full(row, other) for row, other in rows]
    else:
        parts = [_listed(row, listed) for row, listed in zip(trained, seen, strict=True)]
    kl, moved, same = zip(*parts, strict=True)
    return Distance(torch.stack(kl), torch.stack(moved), torch.tensor(same))


def _full(trained: Tensor, other: Tensor) -> tuple[Tensor, Tensor, bool]:
    # KL(trained || other) = sum p (log p - log q), of two rows [vocabulary]
    kl = (trained.double().exp() * (trained.double() - other.double())).sum().clamp(min=0)
    top = trained.topk(min(TOP, len(trained))).indices
    return kl, (trained[top] - other[top]).abs().max(), bool(trained.argmax() == other.argmax())


def _listed(trained: Tensor, listed: TopTokens) -> tuple[Tensor, Tensor, bool]:
    # The same sum over the listed tokens, and one more term for the rest of both distributions.
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
