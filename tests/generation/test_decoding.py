"""The decoding loop against Hugging Face's own, one prompt at a time, for any other rows in the batch."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from making.property_examples import examples
from making.wandering_models import ADAPTERS, PAD, STOPS, VOCABULARY, llama, mistral, reference
from tunewright.adapters.lora_weights import load_lora_weights
from tunewright.core.errors import UserError
from tunewright.generation import decoding
from tunewright.generation.decoding import Batch, PrefillState
from tunewright.generation.generate import generate, prefill_groups
from tunewright.generation.requests import Completion, Request, Row


def _requests(count: int, *adapters: str | None, longest: int = 40, **how: Any) -> list[Request]:
    draw = random.Random(count)
    return [
        Request(
            tuple(draw.randrange(8, VOCABULARY) for _ in range(draw.randint(1, longest))),
            adapters[index % len(adapters)] if adapters else None,
            max_new_tokens=draw.randint(1, 24),
            **how,
        )
        for index in range(count)
    ]


def _generate(model: Any, requests: list[Request], batch_size: int) -> list[Completion]:
    return generate(model, requests, stop_ids=STOPS, pad_id=PAD, batch_size=batch_size)


def test_batch_of_ragged_prompts_answers_each_as_alone(plain: Any) -> None:
    requests = _requests(14)
    expected = [reference(plain, request) for request in requests]
    assert {completion.finish for completion in expected} == {"stop", "length"}
    for batch_size in (1, 5, 14):
        assert _generate(plain, requests, batch_size) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_of_numbers_gives_the_logits_of_a_boolean_mask_bit_by_bit(plain: Any, dtype: torch.dtype) -> None:
    """transformers' own masks are boolean, and SDPA makes numbers of them in each layer."""

    def logits(attention: str) -> list[Tensor]:
        model, seen, place = copy.deepcopy(plain).to(dtype), list[Tensor](), decoding._ATTENTION
        model.register_forward_hook(lambda _model, _arguments, out: seen.append(out.logits))
        decoding._ATTENTION = attention
        try:
            _generate(model, _requests(5), 5)
        finally:
            decoding._ATTENTION = place
        return seen

    boolean, numbers = logits("sdpa"), logits(decoding._ATTENTION)
    assert len(boolean) > 5
    assert all(torch.equal(a, b) for a, b in zip(boolean, numbers, strict=True))


def test_head_gets_one_contiguous_column(plain: Any) -> None:
    """For a view into all columns torch copies the head for each row: two thirds of a prefill's time."""
    seen: list[tuple[tuple[int, ...], bool]] = []
    hook = plain.lm_head.register_forward_pre_hook(lambda _, x: seen.append((x[0].shape, x[0].is_contiguous())))
    try:
        _generate(plain, _requests(3), 3)
    finally:
        hook.remove()
    assert len(seen) > 1
    assert all(shape[1] == 1 and whole for shape, whole in seen)


def test_attention_implementation_is_restored_after_each_pass(plain: Any) -> None:
    before = plain.config._attn_implementation
    batch = Batch(plain, stop_ids=STOPS, pad_id=PAD)
    batch.admit(_requests(2))
    assert plain.config._attn_implementation == before
    with pytest.raises(IndexError):
        batch.admit([Request((VOCABULARY,), None, 3)])
    assert plain.config._attn_implementation == before


def test_sliding_window_changes_these_answers() -> None:
    narrow, wide = mistral(8), mistral(None)
    requests = _requests(14)
    assert _generate(narrow, requests, 8) != _generate(wide, requests, 8)


@pytest.mark.parametrize("adapters", [(None,), ("two",), (None, "one", "two", "three"), ("three", "one")])
def test_rows_with_different_adapters_answer_as_each_adapter_alone(tenants: Any, adapters: tuple[str | None]) -> None:
    requests = _requests(12, *adapters)
    assert _generate(tenants, requests, 8) == [reference(tenants, request) for request in requests]


def test_adapters_and_base_answer_differently(tenants: Any) -> None:
    (prompt,) = _requests(1)
    requests = [Request(prompt.prompt_ids, name, 20) for name in (None, *ADAPTERS)]
    assert len(set(_generate(tenants, requests, 4))) == 4


POOL = _requests(12, None, *ADAPTERS, longest=20)


@pytest.fixture(scope="module")
def expected(tenants: Any) -> list[Completion]:
    return [reference(tenants, request) for request in POOL]


# Actions: admit requests, or start and continue a chunked prefill, cancel a row, or decode a token.
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(1, 4)),
        st.tuples(st.just("begin"), st.integers(1, 4)),
        st.tuples(st.just("read"), st.integers(1, 30)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=20,
)


@given(actions=ACTIONS, order=st.permutations(range(len(POOL))))
@examples(25)
def test_answers_do_not_depend_on_other_rows_joining_and_leaving(
    tenants: Any, expected: list[Completion], actions: list[tuple[str, int]], order: list[int]
) -> None:
    batch = Batch(tenants, stop_ids=STOPS, pad_id=PAD)
    waiting, rows, cancelled, readings = list(order), dict[int, Row](), set[int](), list[PrefillState]()
    for action, number in [*actions, *[("read", 1000)] * len(POOL), ("admit", len(POOL)), ("step", 30)]:
        if action in ("admit", "begin") and waiting:
            coming, waiting = waiting[:number], waiting[number:]
            readings.append(batch.start_prefill([POOL[index] for index in coming]))
            rows |= zip(coming, readings[-1].rows, strict=True)
            if action == "admit":
                assert batch.prefill(readings.pop())
        elif action == "read" and readings:
            if batch.prefill(readings[0], number):
                del readings[0]
        elif action == "cancel" and number < len(batch.rows):
            leaving = batch.rows[number]
            cancelled |= {index for index, row in rows.items() if row is leaving}
            batch.cancel(leaving)
            batch.cancel(leaving)  # once more does no harm
        elif action == "step":
            for _ in range(number):
                if batch.rows:
                    batch.step()
    assert not batch.rows
    assert not readings
    for index, row in rows.items():
        if index in cancelled:
            assert row.finish is None
            assert row.ids == list(expected[index].ids[: len(row.ids)])
        else:
            assert row.completion == expected[index]


@pytest.fixture(scope="module")
def on_disk(tenants: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tenants.save_pretrained(folder)
    return folder


@given(
    actions=st.lists(st.tuples(st.sampled_from(["load", "unload", "step"]), st.sampled_from(ADAPTERS)), max_size=20),
    order=st.permutations(range(len(POOL))),
)
@examples(25)
def test_answers_do_not_depend_on_adapters_added_and_removed(
    on_disk: Path, expected: list[Completion], actions: list[tuple[str, str]], order: list[int]
) -> None:
    base = llama()
    batch = Batch(base, stop_ids=STOPS, pad_id=PAD)
    loaded, waiting, rows = set[str | None]({None}), list(order), dict[int, Row]()
    for action, adapter in [*actions, *(("load", name) for name in ADAPTERS), *[("step", "")] * 30]:
        if action == "load":
            batch.add_adapter(adapter, load_lora_weights(on_disk / adapter, base))
            loaded.add(adapter)
        elif action == "unload":
            if all(row.request.adapter != adapter for row in batch.rows):
                batch.remove_adapter(adapter)
                loaded.discard(adapter)
        elif batch.rows:
            batch.step()
        coming = [index for index in waiting if POOL[index].adapter in loaded][:2]
        waiting = [index for index in waiting if index not in coming]
        if coming:
            rows |= zip(coming, batch.admit([POOL[index] for index in coming]), strict=True)
    assert not batch.rows
    assert not waiting
    assert {index: row.completion for index, row in rows.items()} == dict(enumerate(expected))


def test_seed_samples_the_same_answer_in_any_batch(tenants: Any) -> None:
    sampled = [
        Request(r.prompt_ids, r.adapter, 20, temperature=0.9, top_p=0.95, seed=seed)
        for seed, r in enumerate(_requests(6, None, "two"))
    ]
    alone = [_generate(tenants, [request], 1)[0] for request in sampled]
    greedy = _requests(10, None, *ADAPTERS)
    together = _generate(tenants, [*greedy, *sampled], 16)
    assert together[len(greedy) :] == alone
    assert together[: len(greedy)] == _generate(tenants, greedy, 16)
    other_seed = Request(sampled[0].prompt_ids, None, 20, temperature=0.9, top_p=0.95, seed=99)
    assert _generate(tenants, [other_seed], 1)[0] != alone[0]


def test_sampling_without_a_seed_varies(tenants: Any) -> None:
    requests = [Request((8, 9, 10), None, 20, temperature=1.5)] * 4
    assert len(set(_generate(tenants, requests, 4))) > 1


@pytest.mark.parametrize("how", [{"temperature": 1e-300}, {"temperature": 5e-324}, {"temperature": 1.0, "top_p": 1e-9}])
def test_tiny_temperature_or_top_p_is_greedy(tenants: Any, how: dict[str, Any]) -> None:
    (request,) = _requests(1)
    sampled = Request(request.prompt_ids, None, 20, seed=3, **how)
    greedy = Request(request.prompt_ids, None, 20)
    assert _generate(tenants, [sampled], 1) == _generate(tenants, [greedy], 1)


def test_on_finished_is_called_once_for_each_request(tenants: Any) -> None:
    requests = _requests(9, None, "one")
    message: dict[int, Completion] = {}

    def on_finished(index: int, completion: Completion) -> None:
        assert index not in message
        message[index] = completion

    answers = generate(tenants, requests, stop_ids=STOPS, pad_id=PAD, batch_size=4, on_finished=on_finished)
    assert [message[index] for index in range(9)] == answers


def test_unknown_adapter_is_refused_and_leaves_the_batch_unchanged(tenants: Any) -> None:
    first, second = _requests(2)
    batch = Batch(tenants, stop_ids=STOPS, pad_id=PAD)
    (row,) = batch.admit([first])
    with pytest.raises(ValueError, match="no adapter four"):
        batch.admit([second, Request((8,), "four", 3)])
    with pytest.raises(IndexError):
        batch.admit([Request((VOCABULARY,), None, 3)])
    while batch.rows:
        batch.step()
    assert row.completion == reference(tenants, first)
    assert not any(part._forward_pre_hooks for part in tenants.modules())


@pytest.mark.parametrize("rows", [2, 8, 32])
def test_step_isolates_a_failing_row_in_a_logarithmic_number_of_passes(plain: Any, rows: int) -> None:
    requests = [Request((8, 9 + number % 20), None, 6) for number in range(rows)]
    batch = Batch(plain, stop_ids=(), pad_id=PAD)
    admitted = batch.admit(requests)
    fault = admitted[rows // 3]
    fault.ids[-1] = VOCABULARY  # a token that the model has no embedding for
    passes: list[int] = []
    hook = plain.register_forward_pre_hook(
        lambda _model, _args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        ((failed, error),) = batch.step()
    finally:
        hook.remove()
    assert failed is fault
    assert isinstance(error, IndexError)
    assert len(passes) <= 2 * math.log2(rows) + 2
    assert passes[-1] == rows - 1
    while batch.rows:
        assert batch.step() == []
    others = [(row, request) for row, request in zip(admitted, requests, strict=True) if row is not fault]
    alone = [generate(plain, [request], stop_ids=(), pad_id=PAD, batch_size=1)[0].ids for _, request in others[:8]]
    assert [tuple(row.ids) for row, _ in others[:8]] == alone


def test_step_raises_when_the_model_computes_nothing(plain: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    batch = Batch(plain, stop_ids=(), pad_id=PAD)
    batch.admit(_requests(3))
    hook = plain.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="the device is gone"):
            batch.step()
    finally:
        hook.remove()


def _with_dora() -> Any:
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "tuned")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def test_generate_refuses_an_adapter_that_cannot_share_a_batch() -> None:
    model = _with_dora()
    with pytest.raises(UserError, match="adapter tuned is not plain LoRA"):
        Batch(model, stop_ids=STOPS, pad_id=PAD)
    with pytest.raises(UserError, match="adapter tuned is not plain LoRA"):
        _generate(model, _requests(4, None, "tuned"), 4)


def test_dora_answers_when_all_rows_are_its_own() -> None:
    model = _with_dora()
    plain = llama()
    base, tuned = _requests(12), _requests(12, "tuned")
    for _ in range(2):
        assert _generate(model, tuned, 5) == [reference(model, request) for request in tuned]
        assert _generate(model, base, 5) == [reference(plain, request) for request in base]
    assert _generate(model, tuned, 5) != _generate(model, base, 5)


@given(st.lists(st.integers(1, 9000), max_size=40), st.sampled_from([2048, 8192]))
def test_prefill_groups_have_every_prompt_once_and_little_padding(lengths: list[int], most: int) -> None:
    groups = prefill_groups(lengths, most)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        longest, shortest = lengths[group[0]], lengths[group[-1]]
        assert longest - shortest <= max(64, longest / 2)
        assert len(group) == 1 or len(group) * longest <= most
