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
    model: Any, adapter: str | None, probe: Probe, chat: ChatFormat, on_answer: Callable[[], None]
) -> list[ReferenceAnswer]:
    """Return the greedy answers of the base, or of the base with an adapter.

    Args:
        model: the base with the adapter, a PEFT model.
        adapter: the adapter's name; None for the base.
    """
    if adapter is not None:
        model.set_adapter(adapter)
    found = []
    for prompt in probe.prompts:
        with nullcontext() if adapter is not None else model.disable_adapter():
            completion = _completion(model, prompt, probe, chat)
        on_answer()
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
def _completion(model: Any, prompt: tuple[int, ...], probe: Probe, chat: ChatFormat) -> Completion:
    """Return transformers' own greedy answer, which shares no code with the engines, cut at a stop string."""
    asked = torch.tensor([prompt], device=model.device)
    made = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=probe.limit,
        do_sample=False,
        eos_token_id=sorted(chat.stop_ids),
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    ids: list[int] = made[0, len(prompt) :].tolist()
    ended = bool(ids) and ids[-1] in chat.stop_ids
    return cut(ids[:-1] if ended else ids, "stop" if ended else "length", probe.stop, chat)


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
