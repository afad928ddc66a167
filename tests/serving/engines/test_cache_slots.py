"""Adapters alternate at llama.cpp, in the order in which they began to wait."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tunewright.engines.llamacpp import CacheSlots


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Held:
    """A request that keeps its slot until :meth:`end`."""

    def __init__(
        self, slots: CacheSlots, name: str, adapter: str | None, tokens: int = 1, *, resumed: bool = False
    ) -> None:
        self.name = name
        self.has_it = False
        self._end = asyncio.Event()
        self._task = asyncio.create_task(self._hold(slots, adapter, tokens, resumed))

    async def _hold(self, slots: CacheSlots, adapter: str | None, tokens: int, resumed: bool) -> None:
        async with slots.slot(adapter, tokens, resumed=resumed) as self.slot:
            self.has_it = True
            await self._end.wait()
            self.has_it = False

    async def end(self) -> None:
        self._end.set()
        await _settle()

    async def hang_up(self) -> None:
        self._task.cancel()
        await _settle()
        self.has_it = False


def test_slots_admit_one_adapter_at_a_time_the_longest_waiting_next() -> None:
    async def run() -> None:
        slots = CacheSlots(rows=4, tokens=100)
        wanted = [("a1", "a"), ("b1", "b"), ("a2", "a"), ("base1", None), ("b2", "b")]
        held = {name: Held(slots, name, adapter) for name, adapter in wanted}
        await _settle()

        def at_work() -> set[str]:
            return {name for name, one in held.items() if one.has_it}

        assert at_work() == {"a1"}, "a2 came after b1 began to wait"
        await held["a1"].end()
        assert at_work() == {"b1", "b2"}
        held["b3"] = Held(slots, "b3", "b")
        await _settle()
        assert at_work() == {"b1", "b2"}, "b3 would keep a2 waiting"
        await held["b1"].end()
        assert at_work() == {"b2"}
        await held["b2"].end()
        assert at_work() == {"a2"}
        await held["a2"].end()
        assert at_work() == {"base1"}
        await held["base1"].end()
        assert at_work() == {"b3"}
        held["b4"] = Held(slots, "b4", "b")
        await _settle()
        assert at_work() == {"b3", "b4"}, "nobody else waits"
        for name in ("b3", "b4"):
            await held[name].end()

    asyncio.run(run())


def test_slots_never_exceed_rows_and_tokens() -> None:
    async def run() -> None:
        slots = CacheSlots(rows=2, tokens=10)
        one, two, three = (Held(slots, str(n), "a", tokens) for n, tokens in enumerate((6, 5, 1)))
        await _settle()
        assert (one.has_it, two.has_it, three.has_it) == (True, False, False), "nobody overtakes"
        assert slots.extend(one.slot, 8)
        await one.end()
        assert (two.has_it, three.has_it) == (True, True)
        assert not slots.extend(two.slot, 10), "the third has one of them"
        four, next_one = Held(slots, "4", "a"), Held(slots, "5", "a", resumed=True)
        await two.end()
        assert (four.has_it, next_one.has_it) == (False, True), "who gave its slot up is the next"
        for held in (three, next_one, four):
            await held.end()
        assert (slots.running, list(slots.waiting)) == ([], [])

    asyncio.run(run())


@given(
    asked=st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(1, 9)), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_slots_admit_every_request_and_never_two_adapters_when_requests_end_or_abort(
    asked: list[tuple[str | None, int]], order: object
) -> None:
    async def run() -> None:
        import random

        assert isinstance(order, random.Random)
        slots = CacheSlots(rows=3, tokens=9)
        held = [Held(slots, str(n), adapter, tokens) for n, (adapter, tokens) in enumerate(asked)]
        served: Counter[str] = Counter()
        gone: set[str] = set()
        while len(gone) < len(held):
            await _settle()
            assert len({slot.adapter for slot in slots.running}) <= 1
            assert len(slots.running) <= 3 and sum(slot.tokens for slot in slots.running) <= 9
            at_work = [one for one in held if one.has_it]
            assert at_work, "somebody is always at work while somebody waits"
            waiting = [one for one in held if not one.has_it and one.name not in gone]
            leaving = order.choice(waiting) if waiting and order.random() < 0.2 else order.choice(at_work)
            gone.add(leaving.name)
            if leaving.has_it:
                served[leaving.name] += 1
                await leaving.end()
            else:
                await leaving.hang_up()
        assert (slots.running, list(slots.waiting)) == ([], [])

    asyncio.run(run())
