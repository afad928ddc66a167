"""Decoding with transformers' own cache: answers are those of the model's forward over the whole text."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from making.lora_models import with_lora
from making.plain_models import HYBRIDS, Hybrid, hybrid_model, targets
from making.wandering_models import PAD, STOPS, llama, mistral, reference, with_adapters
from making.wandering_models import VOCABULARY as WORDS
from tunewright.generation import plain_decoding
from tunewright.generation.decoding import Batch
from tunewright.generation.generate import generate
from tunewright.generation.plain_decoding import PlainBatch, new_batch
from tunewright.generation.requests import Completion, Request


def _requests(count: int, *adapters: str | None, words: int = 256, tokens: int = 8, **how: Any) -> list[Request]:
    draw = random.Random(count)
    return [
        Request(
            tuple(draw.randrange(8, words) for _ in range(draw.choice([1, 3, 9, 14, 14]))),
            adapters[index % len(adapters)] if adapters else None,
            max_new_tokens=draw.randint(1, tokens),
            **how,
        )
        for index in range(count)
    ]


@torch.inference_mode()
def _forward_over_the_whole_text(model: Any, request: Request) -> Completion:
    ids, answer = list(request.prompt_ids), list[int]()
    while len(answer) < request.max_new_tokens:
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in STOPS:
            return Completion(tuple(answer), "stop")
        ids.append(token)
        answer.append(token)
    return Completion(tuple(answer), "length")


def _generate(model: Any, requests: list[Request], batch_size: int) -> list[Completion]:
    return generate(model, requests, stop_ids=STOPS, pad_id=PAD, batch_size=batch_size)


def _plain(model: Any) -> Any:
    model.own_cache = False
    return model


@pytest.mark.parametrize("kind", HYBRIDS)
def test_answers_are_those_of_the_forward_over_the_whole_text(kind: Hybrid) -> None:
    base = _plain(hybrid_model(kind))
    model = with_lora(base, targets(base), name="one").eval()
    assert isinstance(new_batch(model, stop_ids=STOPS, pad_id=PAD), PlainBatch)
    requests = _requests(6, None, "one")
    expected = [_forward_over_the_whole_text(model, request) for request in requests if request.adapter]
    with model.disable_adapter():
        alone = [_forward_over_the_whole_text(model, request) for request in requests if not request.adapter]
    answers = _generate(model, requests, 4)
    assert answers[1::2] == expected
    assert answers[::2] == alone


def test_model_decodes_with_our_cache_unless_its_base_cannot() -> None:
    batch = new_batch(llama(), stop_ids=STOPS, pad_id=PAD)
    assert type(batch) is Batch


@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_join_and_leave_answer_as_alone(window: int | None) -> None:
    """Adapters, prompts of different lengths, and a window shorter than the answers."""
    model = with_adapters(_plain(mistral(window)))
    requests = _requests(10, None, "one", "two", words=WORDS, tokens=24)
    expected = [reference(model, request) for request in requests]
    for batch_size in (3, 10):
        assert _generate(model, requests, batch_size) == expected


def test_chunked_attention_counts_chunks_from_each_text_when_rows_of_other_lengths_join() -> None:
    """Llama 4: the chunks of a padded row begin at its text, and these texts are up to five chunks long."""
    model = _plain(hybrid_model("llama4_text"))
    assert model.config.attention_chunk_size == 16
    for layer in model.model.layers:
        layer.self_attn.floor_scale = 8192  # as published: transformers counts padding among these positions
    requests = [Request(tuple(range(3, 3 + length)), None, 25) for length in (9, 46, 60, 17, 15, 16)]
    expected = [_forward_over_the_whole_text(model, request) for request in requests]
    for batch_size in (2, 4):
        assert _generate(model, requests, batch_size) == expected


def test_cache_keeps_the_columns_of_the_longest_text() -> None:
    batch = PlainBatch(_plain(llama()), stop_ids=(), pad_id=PAD)
    prompts = [tuple(range(8, 8 + length)) for length in (30, 4, 6)]
    long, short, late = (Request(prompt, None, 40) for prompt in prompts)
    first, second = batch.admit([long, short])
    batch.step()
    batch.cancel(first)
    (third,) = batch.admit([late])
    for _ in range(3):
        batch.step()
    (group,) = batch._groups.values()
    assert (
        group.cache.columns == max(len(late.prompt_ids) + len(third.ids), len(short.prompt_ids) + len(second.ids)) - 1
    )
    keys: Any = group.cache.layers[0]
    assert keys.keys.shape[-2] == group.cache.columns
    while batch.rows:
        batch.step()
    assert [row.completion for row in (second, third)] == [reference(llama(), request) for request in (short, late)]


def test_caches_of_unknown_layers_are_computed_again_when_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_decoding, "_MERGEABLE", ())
    model = _plain(llama())
    requests = _requests(9, words=WORDS, tokens=12)
    assert _generate(model, requests, 4) == [reference(model, request) for request in requests]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}, {"logit_bias": ((9, 4.0),)}])
def test_settings_of_requests_give_the_answers_of_our_cache(how: dict[str, Any]) -> None:
    requests = _requests(6, words=WORDS, tokens=16, frequency_penalty=0.5, **how)
    assert _generate(_plain(llama()), requests, 3) == _generate(llama(), requests, 3)


def test_failing_row_leaves_and_the_others_answer() -> None:
    model = _plain(llama())
    requests = _requests(5, words=WORDS, tokens=12)
    batch = PlainBatch(model, stop_ids=STOPS, pad_id=PAD)
    rows = batch.admit(requests)
    fault = next(row for row in rows if row.finish is None)
    fault.ids[-1] = WORDS  # a token that the model has no embedding for
    ((failed, error),) = batch.step()
    assert failed is fault and isinstance(error, IndexError)
    while batch.rows:
        assert batch.step() == []
    for row, request in zip(rows, requests, strict=True):
        assert row is fault or row.completion == reference(model, request)


def test_newest_row_leaves_when_only_the_whole_batch_fails() -> None:
    model = _plain(llama())
    batch = PlainBatch(model, stop_ids=(), pad_id=PAD)
    old = batch.admit([Request((8, 9), None, 9)] * 2)
    batch.step()
    (new,) = batch.admit([Request((8, 9, 10), None, 9)])

    def fail(_model: Any, _arguments: Any, named: Any) -> None:
        if len(named["input_ids"]) > 2:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        ((failed, _),) = batch.step()
    finally:
        hook.remove()
    assert failed is new
    assert batch.rows == old
    while batch.rows:
        batch.step()
    assert old[0].completion.ids == old[1].completion.ids == reference(model, Request((8, 9), None, 9)).ids


def test_rows_that_cannot_be_prefilled_leave_the_batch_unchanged() -> None:
    model = _plain(llama())
    batch = PlainBatch(model, stop_ids=(), pad_id=PAD)
    first = Request((8, 9), None, 6)
    (row,) = batch.admit([first])
    with pytest.raises(IndexError):
        batch.admit([Request((10, 11), None, 6), Request((WORDS,), None, 3)])
    assert batch.rows == [row]
    with pytest.raises(ValueError, match="no adapter four"):
        batch.admit([Request((8,), "four", 3)])
    while batch.rows:
        batch.step()
    assert row.completion == reference(model, first)
