"""Answers token by token, and by how many nats one answer is less likely than another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from torch import Tensor

from tunewright.chat import ChatFormat
from tunewright.engines.protocol import Engine, stream
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
    """Return an engine's answer, with what it reports of its tokens.

    Raises:
        RequestFailedError, EngineStoppedError: the engine fails to answer.
    """
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
