"""The admission queue: coroutines that wait for a slot, and that are cancelled."""

from __future__ import annotations

import asyncio
from collections import Counter

from tunewright.serving.gateway.fair_scheduler import HELD_PASSES, AdmissionQueue, Slot


async def _serve(demand: dict[str, list[int]], room: int, steps: int) -> tuple[Counter[str], list[str]]:
    """Tenants that ask for answers of these lengths, all at once; one token a step for each place at the engine.

    Returns:
        Tokens served after this many steps, and the admitted requests in order.
    """
    queue, served, order = AdmissionQueue(room), Counter[str](), []
    ticks: list[asyncio.Event] = []

    async def request(tenant: str, length: int) -> None:
        async with queue.slot(tenant, 1) as place:
            order.append(tenant)
            for _ in range(length):
                tick = asyncio.Event()
                ticks.append(tick)
                await tick.wait()
                served[tenant] += 1
                place.record_tokens(1)

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
    assert queue.idle, "every place has been given back"
    return served, order


def test_queue_serves_a_quiet_tenant_before_a_loud_one() -> None:
    _, order = asyncio.run(_serve({"loud": [4] * 100, "quiet": [4]}, 2, 12))
    assert order.index("quiet") <= 2  # the places were taken when it came


def test_queue_serves_two_busy_tenants_equally() -> None:
    served, _ = asyncio.run(_serve({"loud": [4] * 100, "quiet": [4] * 30}, 4, 40))
    assert abs(served["loud"] - served["quiet"]) <= 2 * 4 * 4


def test_queue_admits_the_next_request_when_a_waiter_is_cancelled() -> None:
    async def run(*, late: bool) -> None:
        queue, entered = AdmissionQueue(1), []

        async def request(tenant: str) -> None:
            async with queue.slot(tenant, 1):
                entered.append(tenant)

        async with queue.slot("a", 1):
            gone, waiting = (asyncio.create_task(request(tenant)) for tenant in "bc")
            await asyncio.sleep(0)
            assert queue.waiting == 2
            if not late:
                gone.cancel()
        # Now its ticket has come, or would have; it has not had the time to notice either.
        gone.cancel()
        await asyncio.gather(gone, waiting, return_exceptions=True)
        assert (entered, queue.idle) == (["c"], True)

    asyncio.run(run(late=False))
    asyncio.run(run(late=True))


def test_queue_admits_further_prompts_when_earlier_ones_are_prefilled() -> None:
    async def run() -> None:
        queue, entered = AdmissionQueue(8), []

        async def request(tenant: str) -> None:
            async with queue.slot(tenant, 100) as place:
                entered.append(tenant)
                await asyncio.sleep(0.01)
                place.record_tokens(1)
                place.record_tokens(1)
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(request(tenant)) for tenant in "abab"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert entered == ["a", "b"]  # of each as much as is read in a pass
        while len(entered) < 4:
            await asyncio.sleep(0.01)
        assert (entered[:2], sorted(entered[2:])) == (["a", "b"], ["a", "b"])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 300))


def test_queue_admits_a_held_request_when_the_running_ones_get_tokens() -> None:
    async def run() -> None:
        queue, slots = AdmissionQueue(16), list[Slot]()
        done = asyncio.Event()

        async def request(tenant: str) -> None:
            async with queue.slot(tenant, 20) as slot:
                slots.append(slot)
                await done.wait()

        async with queue.slot("quiet", 20):
            pass
        tasks = [asyncio.create_task(request("loud")) for _ in range(20)]
        for _ in range(5):  # prompts are admitted in groups, each after the prefill of the one before
            await asyncio.sleep(0)
            for slot in list(slots):
                slot.record_tokens(1)
        await asyncio.sleep(0)
        assert len(slots) == 14, "two rows are reserved"
        tasks[0].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(slots) == 14, "the next one is held"
        for _ in range(HELD_PASSES):
            for slot in slots[1:14]:
                slot.record_tokens(1)
        await asyncio.sleep(0)
        assert len(slots) == 15
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queue.idle

    asyncio.run(run())


def test_queue_admits_waiters_as_soon_as_the_engine_has_more_rows() -> None:
    async def run() -> list[int]:
        queue, counts = AdmissionQueue(1), []
        entered = 0

        async def request() -> None:
            nonlocal entered
            async with queue.slot("a", 1):
                entered += 1
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(request()) for _ in range(6)]
        for rows in (1, 4, 4):
            queue.resize(rows, 1)
            await asyncio.sleep(0.01)
            counts.append(entered)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return counts

    assert asyncio.run(run()) == [1, 5, 5]
