"""The admission queue: coroutines that wait for a slot, and that are cancelled."""

from __future__ import annotations

import asyncio

from tunewright.serving.gateway.fair_scheduler import HELD_PASSES, AdmissionQueue, Slot


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
