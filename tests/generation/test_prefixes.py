"""Shared prompts: the choice of beginnings against a search token by token, the answers against Hugging Face's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_helpers import PAD, STOPS, VOCABULARY, reference
from tunewright.generation.decoding import Batch, Request, generate
from tunewright.generation.prefixes import Shared, shared_prefixes

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), max_size=6)


def _most_saved(prompts: Sequence[tuple[int, ...]], cost: int, beginning: tuple[int, ...] = ()) -> int:
    """With this beginning for all that go on from it, or with longer ones, token by token; or with none."""
    length = len(beginning)
    having = [p for p in prompts if p[:length] == beginning and len(p) > length]
    if not having:
        return 0
    below = sum(_most_saved(having, cost, (*beginning, token)) for token in {p[length] for p in having})
    return max(below, length * (len(having) - 1) - cost)


@given(PROMPTS, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_no_other_beginnings_save_more_than_the_chosen_ones(prompts: list[tuple[int, ...]], cost: int) -> None:
    chosen = shared_prefixes(prompts, cost)
    places = [place for group in chosen for place in group.places]
    assert len(places) == len(set(places))
    for group in chosen:
        assert all(prompts[p][: group.length] == prompts[group.places[0]][: group.length] for p in group.places)
        assert all(len(prompts[place]) > group.length for place in group.places)
    saved = sum(group.length * (len(group.places) - 1) - cost for group in chosen)
    assert saved == _most_saved(prompts, cost)


def test_prompts_that_each_begin_the_next_make_no_deep_recursion() -> None:
    prompts = [tuple(range(length)) for length in range(1, 3000)]
    (group,) = [g for g in shared_prefixes(prompts) if 2999 - 1 in g.places]
    assert group.length > 1000


def test_a_short_beginning_of_few_prompts_is_not_worth_a_pass() -> None:
    assert shared_prefixes([(1, 2, 3, n) for n in range(10)]) == []
    assert shared_prefixes([(1, 2, 3, n) for n in range(100)]) == [Shared(tuple(range(100)), 3)]


def _task(instruction: int, rows: int, adapter: str | None = None, longest: int = 12) -> list[Request]:
    """Requests that begin with one instruction of so many tokens."""
    draw = random.Random(instruction)
    shared = tuple(draw.randrange(8, VOCABULARY) for _ in range(instruction))
    return [
        Request(
            shared + tuple(draw.randrange(8, VOCABULARY) for _ in range(draw.randint(1, longest))),
            adapter,
            draw.randint(1, 16),
        )
        for _ in range(rows)
    ]


def _mixed(tasks: Sequence[list[Request]]) -> list[Request]:
    requests = [request for task in tasks for request in task]
    random.Random(0).shuffle(requests)
    return requests


class _Counted:
    """How many token positions go through the model while this is open, and in how many passes."""

    def __init__(self, model: Any) -> None:
        self.passes = self.tokens = 0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.passes += 1
        self.tokens += kwargs["input_ids"].numel()

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def _generate(model: Any, requests: list[Request], batch_size: int) -> Any:
    return generate(model, requests, stop_ids=STOPS, pad_id=PAD, batch_size=batch_size)


def test_several_shared_prompts_answer_as_each_alone(plain: Any) -> None:
    # 20 tokens are longer than the sliding window of 8; suffixes of 1 to 40 need more shift than a prefix has columns.
    requests = _mixed([_task(30, 7), _task(20, 8, longest=40), _task(0, 4)])
    expected = [reference(plain, request) for request in requests]
    for batch_size in (3, 32):
        assert _generate(plain, requests, batch_size) == expected


def test_adapters_do_not_share_a_prompt_with_each_other_or_the_base(tenants: Any) -> None:
    tasks = [_task(30, 4, adapter) for adapter in (None, "one", "two")]
    requests = _mixed(tasks)
    assert _generate(tenants, requests, 5) == [reference(tenants, request) for request in requests]


def test_a_shared_prompt_goes_through_the_model_once(plain: Any) -> None:
    requests = [Request((*range(8, 58), 60 + n), None, 1) for n in range(20)]
    with _Counted(plain) as counted:
        _generate(plain, requests, 10)
    assert (counted.passes, counted.tokens) == (3, 50 + 20)


def test_a_prefix_of_another_prompt_or_adapter_is_refused(tenants: Any) -> None:
    batch = Batch(tenants, stop_ids=STOPS, pad_id=PAD)
    prefix = batch.prefix((8, 9), "one")
    for request in (
        Request((8, 9, 10), None, 3),
        Request((8, 10, 9), "one", 3),
        Request((8, 9), "one", 3),
    ):
        with pytest.raises(AssertionError):
            batch.admit([request], prefix)
