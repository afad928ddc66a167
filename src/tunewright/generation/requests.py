"""Requests of the decoding loop: a prompt and its settings, its row while it decodes, and its completion.

A gateway to engines elsewhere makes requests without torch, so only rows that sample import it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tunewright.generation.constraints import Constraint
from tunewright.generation.text_stream import Decode, TextStream

if TYPE_CHECKING:
    import torch

Finish = Literal["stop", "length"]
BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""


@dataclass(frozen=True)
class TokenLogprob:
    """The model's log probability of a token of an answer, and the likeliest tokens in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Tokens with their log probabilities, the likeliest first."""


@dataclass(frozen=True)
class Request:
    """One prompt and its generation settings.

    Args:
        prompt_ids: the prompt, at least one token.
        adapter: the adapter that answers, or None for the base.
        max_new_tokens: maximum number of tokens of the answer, at least 1.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: sample among the likeliest tokens that together hold this probability (Holtzman et al. 2020).
        seed: the same seed samples the same answer, regardless of the batch; None draws a new seed.
        stop: non-empty texts; the first that is complete ends the answer before it.
        constraint: the grammar of the answer; an answer cut at the limit may not match it yet.
        presence_penalty: subtracted from the logit of each token that the answer has.
        frequency_penalty: subtracted from a token's logit for each time that the answer has it.
        logit_bias: tokens with the values added to their logits.
        logprobs: report each token's log probability, with this many of the likeliest; None means no report.
    """

    prompt_ids: tuple[int, ...]
    adapter: str | None
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a prompt has at least one token"
        assert self.max_new_tokens >= 1
        assert self.temperature >= 0
        assert 0 < self.top_p <= 1
        assert self.adapter != BASE_ROW, "the base is asked for with None"
        assert all(self.stop), "an empty text would end every answer"


@dataclass(frozen=True)
class Completion:
    """A complete answer: its tokens without the stop token, and why it ended."""

    ids: tuple[int, ...]
    finish: Finish
    before_stop: str | None = None
    """The text before the stop string that ended the answer; the tokens include the stop string."""


class Row:
    """A request that is decoding; ``ids`` grows with each step until ``finish`` says why it ended."""

    def __init__(self, request: Request, decode: Decode | None = None) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._counts: Counter[int] = Counter()
        self.finish: Finish | None = None
        self.guide = request.constraint.start() if request.constraint else None
        self._before_stop: str | None = None
        self._text, self._stream = "", None
        if request.stop:
            assert decode is not None, "stop strings are found in text"
            self._stream = TextStream(decode, request.stop)
        self._generator: torch.Generator | None = None
        if request.temperature > 0:
            import torch

            self._generator = torch.Generator()
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)

    @property
    def completion(self) -> Completion:
        """The completion of a finished row."""
        assert self.finish is not None
        return Completion(tuple(self.ids), self.finish, self._before_stop)

    def uniform(self) -> float:
        """Return the next number in [0, 1) of the row's generator: one for each sampled token.

        The generator is on the CPU, so that a seed means the same on every device.
        """
        import torch

        assert self._generator is not None, "a greedy row draws nothing"
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def logit_changes(self) -> Iterator[tuple[int, float]]:
        """Yield tokens with the changes of their logits: biases and penalties. A token may occur twice."""
        yield from self.request.logit_bias
        presence, frequency = self.request.presence_penalty, self.request.frequency_penalty
        if presence or frequency:
            for token, count in self._counts.items():
                yield token, -presence - count * frequency

    def take(self, token: int, stop_ids: Collection[int], logprob: TokenLogprob | None = None) -> None:
        """Append the next token with its log probability, or finish on it."""
        if token in stop_ids:
            self._end("stop")
            return
        self.ids.append(token)
        self._counts[token] += 1
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.guide is not None:
            self.guide.advance(token)
        if self._stream is not None:
            self._text += self._stream.push(token)
            if self._stream.stopped:
                self._end("stop")
                return
        if self.guide is not None and self.guide.complete:
            self._end("stop")
        elif len(self.ids) == self.request.max_new_tokens:
            self._end("length")

    def _end(self, finish: Finish) -> None:
        self.finish = finish
        if self._stream is None:
            return
        if not self._stream.stopped:
            # The unfinished character in the last tokens may still complete a stop string.
            self._text += self._stream.flush()
        if self._stream.stopped:
            self.finish, self._before_stop = "stop", self._text
