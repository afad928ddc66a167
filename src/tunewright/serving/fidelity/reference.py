"""The reference of the serving check: greedy answers of the base and the adapter under PEFT, with distributions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunewright.chat import ChatFormat
from tunewright.export.distributions import distance, distributions
from tunewright.export.probe import Probe, places
from tunewright.generation.requests import Completion, Finish
from tunewright.generation.text_stream import TextStream
from tunewright.serving.isolation.probes import Answer, GreedyAnswer
from tunewright.serving.isolation.reference import alternatives

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


def comparable(completion: Completion) -> Answer:
    """Return an answer for comparison token by token; a stop string ends it without a choice of the model."""
    return Answer(completion.ids, "length" if completion.before_stop is not None else completion.finish)


def reference_answers(
    model: Any, adapter: str | None, probe: Probe, chat: ChatFormat, on_answers: Callable[[int], None]
) -> list[ReferenceAnswer]:
    """Return the greedy answers of the base, or of the base with an adapter.

    Args:
        model: the base with the adapter, a PEFT model.
        adapter: the adapter's name; None for the base.
        on_answers: called with the number of new answers.
    """
    if adapter is not None:
        model.set_adapter(adapter)
    completions: list[Completion] = []
    for first in range(0, len(probe.prompts), _BATCH):
        prompts = probe.prompts[first : first + _BATCH]
        with nullcontext() if adapter is not None else model.disable_adapter():
            completions += _completions(model, prompts, probe, chat)
        on_answers(len(prompts))
    found = []
    for prompt, completion in zip(probe.prompts, completions, strict=True):
        ids, count = (*prompt, *completion.ids), len(completion.ids)
        chosen = tuple(places(count, ended=False)) if count else ()
        with nullcontext() if adapter is not None else model.disable_adapter():
            every = distributions(model, [(ids, [len(prompt) + place for place in range(count + 1)])])
        effect = torch.zeros(len(chosen), dtype=torch.float64)
        if adapter is not None and chosen:
            with model.disable_adapter():
                base = distributions(model, [(ids, [len(prompt) + place for place in chosen])])
            effect = distance(every[list(chosen)], base).kl
        found.append(
            ReferenceAnswer(
                completion, _greedy(every, completion, chat.stop_ids), chosen, every[list(chosen)].clone(), effect
            )
        )
    return found


@torch.inference_mode()
def _completions(model: Any, prompts: Sequence[tuple[int, ...]], probe: Probe, chat: ChatFormat) -> list[Completion]:
    """Return transformers' own greedy answers, which share no code with the engines, cut at a stop string."""
    longest = max(map(len, prompts))
    padding, pad = [longest - len(prompt) for prompt in prompts], chat.tokenizer.pad_token_id
    made = model.generate(
        input_ids=torch.tensor([[pad] * n + list(p) for n, p in zip(padding, prompts, strict=True)]).to(model.device),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]).to(model.device),
        max_new_tokens=probe.limit,
        do_sample=False,
        eos_token_id=sorted(chat.stop_ids),
        pad_token_id=pad,
    )
    found = []
    for ids in made[:, longest:].tolist():
        ends = [place for place, token in enumerate(ids) if token in chat.stop_ids]
        found.append(cut(ids[: ends[0]] if ends else ids, "stop" if ends else "length", probe.stop, chat))
    return found


def cut(ids: Sequence[int], finish: Finish, stop: tuple[str, ...], chat: ChatFormat) -> Completion:
    """Return an answer without its end token, cut at the first stop string."""
    pieces, text = TextStream(chat.text, stop), ""
    for place, token in enumerate(ids if stop else (), 1):
        text += pieces.push(token)
        if pieces.stopped:
            return Completion(tuple(ids[:place]), "stop", text)
    return Completion(tuple(ids), finish)


def _greedy(log_probs: Tensor, completion: Completion, stop_ids: Collection[int]) -> GreedyAnswer:
    own = comparable(completion)
    rows: Sequence[Mapping[int, float]] = [alternatives(row, stop_ids) for row in log_probs[: len(own.choices)]]
    return GreedyAnswer(own, tuple(rows))
