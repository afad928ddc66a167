"""The embedded engine on the fake card, at the size of an 8B: devices, launches, copies and host syncs of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from card_process import CardError, CardProcess

pytestmark = pytest.mark.slow

LAYERS = 2

BASE, ONE, ONE_IN_4_BITS, SEVERAL, SEVERAL_AND_BASE = 40, 65, 72, 76, 80
"""Launches for each layer and token: of the base alone, with one adapter on all linear layers for all rows (also over
NF4), with several, and with several for some rows and none for others."""
AROUND = 46
"""Launches of a greedy pass outside of its layers: two make the mask, four find rows whose logits are not finite."""


@dataclass
class _Pass:
    """Counts of one pass."""

    launches: int
    copies: list[str]
    syncs: list[str]
    in_layers: list[str]
    mask_conversions: int
    """Launches by which attention changes the pass's mask in its layers."""


def _measured(work: Any) -> _Pass:
    from fake_card import FakeCard

    with FakeCard() as card:
        work()
    return _counts(card)


def _counts(card: Any) -> _Pass:
    return _Pass(
        sum(card.launches.values()),
        [copy.where for copy in card.copies],
        [sync.where for sync in card.syncs],
        [each.where for each in (*card.copies, *card.syncs) if each.in_layer],
        sum(count for (name, _), count in card.launches.items() if name == "mask conversion"),
    )


def _loras(model: Any) -> dict[str, Any]:
    """One adapter's float32 matrices on all linear layers, on the card."""
    import torch

    from tunewright.generation.batched_lora import Lora

    return {
        name: Lora(
            torch.empty(part.in_features, 16, device="cuda"), torch.empty(16, part.out_features, device="cuda"), 2.0
        )
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and name != "lm_head"
    }


def decode(names: Sequence[str | None], layers: int = LAYERS, mistral: bool = False, **how: Any) -> dict[str, _Pass]:
    """Read ragged prompts in two pieces and decode tokens, with these rows' adapters; a prefix is shared by some."""
    from fake_card import FakeCard
    from fake_models import SHAPES, build

    from tunewright.generation.decoding import PREFILL_CHUNK, Batch
    from tunewright.generation.requests import Request

    shape = replace(SHAPES["mistral-7b" if mistral else "llama-3-8b"], layers=layers)
    model = build(shape, mistral=mistral, window=16 if mistral else None)
    with FakeCard():
        batch = Batch(model, stop_ids=[], pad_id=0)
        assert batch.prefill_chunk == PREFILL_CHUNK
        for name in set(names) - {None}:
            batch.add_adapter(str(name), _loras(model))
    requests = [Request(tuple(range(5, 25 + index)), name, 50, **how) for index, name in enumerate(names)]
    with batch.attached():
        seen = {"prefix": _measured(lambda: batch.prefix(requests[0].prompt_ids[:9], names[0]))}
        reading = batch.start_prefill(requests)
        seen["piece"] = _measured(lambda: batch.prefill(reading, 8 * len(requests)))
        seen["prefill"] = _measured(lambda: batch.prefill(reading))
        _measured(batch.step)  # makes what the following ones have
        seen["token"] = _measured(batch.step)
        others = [replace(request, adapter=names[0]) for request in requests[:2]]
        with FakeCard():
            shared = batch.prefix(requests[0].prompt_ids[:9], names[0])
        seen["join"] = _measured(lambda: batch.admit(others, shared))
        seen["together"] = _measured(batch.step)
        seen["leave"] = _measured(lambda: batch.cancel(batch.rows[0]))
    return seen


MIXES: dict[str, tuple[list[str | None], int]] = {
    "base": ([None] * 4, BASE),
    "one": (["a"] * 4, ONE),
    "four": (["a", "b", "c", "d"], SEVERAL),
    "two and the base": (["a", None, "b", None], SEVERAL_AND_BASE),
}


@pytest.mark.parametrize("mix", MIXES)
def test_decoding_an_8b_takes_a_bounded_number_of_launches_copies_and_syncs(card: CardProcess, mix: str) -> None:
    names, a_layer = MIXES[mix]
    seen = card.run(decode, names)
    assert seen["token"].launches <= LAYERS * a_layer + AROUND
    for each in seen.values():
        assert each.in_layers == []
        assert each.mask_conversions == 0
    # Tokens and where they begin go to the card in one copy; the next tokens are read once.
    assert len(seen["token"].copies) == 1
    assert len(seen["token"].syncs) == 1
    assert (len(seen["prefill"].copies), len(seen["prefill"].syncs)) == (1, 1)
    assert seen["piece"].syncs == seen["prefix"].syncs == []


def test_sampling_on_the_gpu_adds_one_copy_and_no_sync(card: CardProcess) -> None:
    greedy = card.run(decode, ["a"] * 4, 2)
    for top_p in (1.0, 0.9):
        sampled = card.run(decode, ["a"] * 4, 2, temperature=0.7, seed=1, top_p=top_p)
        assert len(sampled["token"].copies) == len(greedy["token"].copies) + 1
        assert len(sampled["token"].syncs) == len(greedy["token"].syncs) == 1
        assert sampled["token"].launches - greedy["token"].launches <= 40


def test_decoding_with_a_sliding_window_stays_on_the_gpu(card: CardProcess) -> None:
    seen = card.run(decode, ["a", None, "b"], 2, True)
    assert all((each.in_layers, each.mask_conversions) == ([], 0) for each in seen.values())
    assert (len(seen["token"].copies), len(seen["token"].syncs)) == (1, 1)


@dataclass
class _DevAnswers:
    """Answers of two evaluations of a training run, counts of the first, and bytes on the card."""

    answers: list[list[str]]
    first: _Pass
    weights: int
    peak: int
    warned: list[str]


def _answers_while_training(
    quantization: str, dropout: float, batch_size: int = 4, memory: int | None = None
) -> _DevAnswers:
    """Answer dev rows twice as evaluations do, with the layers that training has, under its autocast.

    ``memory``: bytes of the card next to the weights.
    """
    import torch
    from fake_card import FakeCard
    from fake_models import SHAPES, build
    from peft import get_peft_model

    from making.tiny_bases import byte_tokenizer, chat_of
    from making.vllm_child import StopAfter
    from tunewright.config import TrainConfig
    from tunewright.data.examples import Example, Message
    from tunewright.generation.generate import BatchSize
    from tunewright.generation.requests import Request
    from tunewright.training.lora import keep_float32, lora_config
    from tunewright.training.monitoring import DevTask

    settings: Any = {"preset": "all-linear", "quantization": quantization, "lora_dropout": dropout}
    requests = tuple(Request(tuple(range(5, 15 + row)), "default", 6) for row in range(4))
    scorer: Any = None  # answers are made here, and not valued
    examples = tuple(Example((Message("user", f"question {row}"), Message("assistant", "yes"))) for row in range(4))
    size, reporter = BatchSize(batch_size), StopAfter()
    task = DevTask(scorer, requests, examples, tuple(range(4)), examples, size, chat_of(byte_tokenizer()), reporter, ())
    with FakeCard():
        model = build(replace(SHAPES["llama-3-8b"], layers=2), nf4=quantization == "nf4")
        model = get_peft_model(model, lora_config(TrainConfig(**settings)))
        keep_float32(model)
        model.eval()
    with FakeCard() as card, torch.autocast("cuda", torch.bfloat16):
        card.count_weights(model)
        weights = card.now
        card.limit = None if memory is None else weights + memory
        answers = [task.answers(model, range(4))]
        first = _counts(card)
        answers.append(task.answers(model, range(4)))
    return _DevAnswers(answers, first, weights, card.peak - weights, reporter.warnings)


@pytest.mark.parametrize(("quantization", "dropout"), [("nf4", 0.0), ("none", 0.1)])
def test_dev_answers_during_training_stay_on_the_gpu(card: CardProcess, quantization: str, dropout: float) -> None:
    found = card.run(_answers_while_training, quantization, dropout)
    seen = found.first
    assert len(found.answers[0]) == 4
    assert seen.in_layers == []
    # Six passes: the prompts' and five tokens' each copy once and wait once.
    assert (len(seen.copies), len(seen.syncs)) == (6, 6)
    a_layer = ONE_IN_4_BITS if quantization == "nf4" else ONE
    assert seen.launches <= 6 * (2 * a_layer + AROUND) + 20


def test_dev_answers_fit_a_full_card_with_the_answers_of_a_smaller_batch(card: CardProcess) -> None:
    whole, small = (card.run(_answers_while_training, "none", 0.0, rows) for rows in (4, 2))
    assert small.peak < whole.peak
    memory = (small.peak + whole.peak) // 2
    full = card.run(_answers_while_training, "none", 0.0, 4, memory)
    assert full.answers == small.answers
    assert full.peak <= memory
    assert len(full.warned) == 1, "the second evaluation begins with the rows that fitted"
    with pytest.raises(CardError, match="Not enough memory to decode a single answer"):
        card.run(_answers_while_training, "none", 0.0, 4, 1 << 10)
