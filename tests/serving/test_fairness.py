"""Whose turn it is: no tenant's share shrinks because another asks for more."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.serving.fairness import ANSWER_WEIGHT, FairQueue


async def _serve(demand: dict[str, list[int]], room: int, steps: int) -> tuple[Counter[str], list[str]]:
    """Tenants that ask for answers of these lengths, all at once; one token a step for each place at the engine.

    Returns:
        Tokens served after so many steps, and who was let in, in order.
    """
    queue, served, order = FairQueue(room), Counter[str](), []
    ticks: list[asyncio.Event] = []

    async def request(tenant: str, length: int) -> None:
        async with queue.place(tenant):
            order.append(tenant)
            for _ in range(length):
                tick = asyncio.Event()
                ticks.append(tick)
                await tick.wait()
                served[tenant] += 1
                queue.charge(tenant, answer=1)

    tasks = [asyncio.create_task(request(name, length)) for name, lengths in demand.items() for length in lengths]
    for _ in range(steps):
        for _ in range(5):
            await asyncio.sleep(0)
        due, ticks[:] = list(ticks), []
        for tick in due:
            tick.set()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert queue.waiting == 0
    assert queue._room == room, "every place has been given back"
    return served, order


@settings(max_examples=20, deadline=None)
@given(
    room=st.integers(1, 4),
    one=st.lists(st.integers(1, 8), min_size=40, max_size=40),
    two=st.lists(st.integers(1, 8), min_size=40, max_size=80),
)
def test_two_who_always_wait_are_served_alike_to_within_a_batch(room: int, one: list[int], two: list[int]) -> None:
    served, _ = asyncio.run(_serve({"one": one, "two": two}, room, 20))
    # The paper's bound, in tokens: twice what can be under way at once (theorem 4.4).
    assert abs(served["one"] - served["two"]) <= 2 * room * 8


def test_one_request_of_a_quiet_tenant_goes_before_the_hundred_of_a_loud_one() -> None:
    _, order = asyncio.run(_serve({"loud": [4] * 100, "quiet": [4]}, 2, 12))
    assert order.index("quiet") <= 2  # the places were taken when it came


def test_idling_saves_up_nothing() -> None:
    async def run() -> list[str]:
        queue, order = FairQueue(1), []

        async def request(tenant: str) -> None:
            async with queue.place(tenant):
                order.append(tenant)
                queue.charge(tenant, answer=1)
                await asyncio.sleep(0)

        for _ in range(50):
            await request("busy")
        await asyncio.gather(*(request("busy") for _ in range(10)), *(request("back") for _ in range(10)))
        return order[50:]

    order = asyncio.run(run())
    assert abs(order[:10].count("back") - 5) <= 1


def test_who_gives_up_waiting_leaves_its_turn_to_the_next() -> None:
    async def run(*, late: bool) -> None:
        queue, entered = FairQueue(1), []

        async def request(tenant: str) -> None:
            async with queue.place(tenant):
                entered.append(tenant)

        async with queue.place("a"):
            gone, waiting = (asyncio.create_task(request(tenant)) for tenant in "bc")
            await asyncio.sleep(0)
            assert queue.waiting == 2
            if not late:
                gone.cancel()
        # Now its turn has come, or would have; it has not had the time to notice either.
        gone.cancel()
        await asyncio.gather(gone, waiting, return_exceptions=True)
        assert (entered, queue.waiting, queue._room) == (["c"], 0, 1)

    asyncio.run(run(late=False))
    asyncio.run(run(late=True))


def test_an_answer_token_counts_as_much_as_two_of_a_prompt() -> None:
    queue = FairQueue(1)
    queue.charge("a", prompt=10)
    queue.charge("b", answer=5)
    assert queue._served["a"] == queue._served["b"] == 5 * ANSWER_WEIGHT
