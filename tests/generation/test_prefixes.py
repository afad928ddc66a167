"""Shared prompts: the chosen prefixes against a search token by token, the answers against Hugging Face's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from making.wandering_models import PAD, STOPS, VOCABULARY, reference
from tunewright.generation.decoding import Batch
from tunewright.generation.generate import generate
from tunewright.generation.kv_cache import shared_prefixes
from tunewright.generation.requests import Request

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), max_size=6)


def _most_saved(prompts: Sequence[tuple[int, ...]], cost: int, beginning: tuple[int, ...] = ()) -> int:
    """Return the most tokens saved with this prefix for all its prompts, with longer ones, or with none."""
    length = len(beginning)
    having = [p for p in prompts if p[:length] == beginning and len(p) > length]
    if not having:
        return 0
    below = sum(_most_saved(having, cost, (*beginning, token)) for token in {p[length] for p in having})
    return max(below, length * (len(having) - 1) - cost)


@given(PROMPTS, st.integers(1, 6))
@examples(150)
def test_shared_prefixes_save_as_much_as_brute_force(prompts: list[tuple[int, ...]], cost: int) -> None:
    chosen = shared_prefixes(prompts, cost)
    places = [place for group in chosen for place in group.indices]
    assert len(places) == len(set(places))
    for group in chosen:
        assert all(prompts[p][: group.length] == prompts[group.indices[0]][: group.length] for p in group.indices)
        assert all(len(prompts[place]) > group.length for place in group.indices)
    saved = sum(group.length * (len(group.indices) - 1) - cost for group in chosen)
    assert saved == _most_saved(prompts, cost)


def test_shared_prefixes_does_not_recurse_for_nested_prompts() -> None:
    prompts = [tuple(range(length)) for length in range(1, 3000)]
    (group,) = [g for g in shared_prefixes(prompts) if 2999 - 1 in g.indices]
    assert group.length > 1000


def _task(instruction: int, rows: int, adapter: str | None = None, longest: int = 12) -> list[Request]:
    """Return requests that start with one instruction of ``length`` tokens."""
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
    """Counts the token positions and passes that go through the model while it is open."""

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


def test_adapters_share_no_prefix_with_each_other_or_the_base(tenants: Any) -> None:
    tasks = [_task(30, 4, adapter) for adapter in (None, "one", "two")]
    requests = _mixed(tasks)
    assert _generate(tenants, requests, 5) == [reference(tenants, request) for request in requests]


def test_shared_prefix_goes_through_the_model_once(plain: Any) -> None:
    requests = [Request((*range(8, 58), 60 + n), None, 1) for n in range(20)]
    with _Counted(plain) as counted:
        _generate(plain, requests, 10)
    assert (counted.passes, counted.tokens) == (3, 50 + 20)


def test_admit_refuses_a_prefix_of_another_prompt_or_adapter(tenants: Any) -> None:
    batch = Batch(tenants, stop_ids=STOPS, pad_id=PAD)
    prefix = batch.prefix((8, 9), "one")
    for request in (
        Request((8, 9, 10), None, 3),
        Request((8, 10, 9), "one", 3),
        Request((8, 9), "one", 3),
    ):
        with pytest.raises(AssertionError):
            batch.admit([request], prefix)
