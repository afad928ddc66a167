"""A server has the same descriptors, threads and objects before and after hundreds of requests and releases.

`make soak` repeats it for an hour with a mixed load, and measures memory too.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from typing import Any

import httpx
import psutil
import pytest
from tenant_server import ASKED, Running, Stored, deploy

from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits

pytest_plugins = ["tenant_server"]

COUNTED = ("tunewright.", "asyncio", "_asyncio", "uvicorn", "starlette", "httptools", "concurrent", "torch", "anyio")
CHAT = "/v1/chat/completions"


def held() -> dict[str, int]:
    """Return what the process has open, and its objects by type; neither caches nor the pool of threads."""
    gc.collect()
    kinds = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    own = {kind: count for kind, count in kinds.items() if kind.startswith(COUNTED)}
    threads = [one.name for one in threading.enumerate() if not one.name.startswith("asyncio_")]
    return {**own, "descriptors": psutil.Process().num_fds(), "threads": len(threads)}


ROUNDS = 3


def assert_held_again(before: dict[str, int]) -> None:
    """Wait for what ends in the background, and fail if a round leaves one thing more; a pool may grow by a few."""
    end = time.monotonic() + 120
    while (more := _more(before)) and time.monotonic() < end:
        time.sleep(0.2)
    assert more == {}, [thread.name for thread in threading.enumerate()]


def _more(before: dict[str, int]) -> dict[str, int]:
    return {
        name: count - before.get(name, 0) for name, count in held().items() if count - before.get(name, 0) >= ROUNDS
    }


class Rounds:
    """Clients and an operator, who leave no trace after each round."""

    def __init__(self, server: Running, state: State, keys: dict[str, str], adapters: dict[str, Stored]) -> None:
        self._server = server
        self._state = state
        self._keys = keys
        self._adapters = cycle([adapters["three"], adapters["one"]])
        self._number = 0

    def run(self) -> None:
        """Send 40 requests, most of them at once, while an alias is released twice and a tenant comes and goes."""
        self._number += 1
        name = f"passing-{self._number}"
        self._state.tenants.add(name, ["recipes"], Limits(requests_per_minute=5))
        keys = [*self._keys.values(), self._state.keys.create(name)[0]]
        with ThreadPoolExecutor(8) as threads:
            for turn in range(2):
                futures = [threads.submit(self._ask, keys, 20 * turn + number) for number in range(20)]
                deploy(self._state, "courts", next(self._adapters))
                assert {future.result() for future in futures} <= {200, 401, 404, 429, None}
                self._until_released()
        self._state.tenants.disable(name)

    def _ask(self, keys: list[str], number: int) -> int | None:
        with httpx.Client(base_url=self._server.url, trust_env=False, timeout=60) as client:
            client.headers["Authorization"] = f"Bearer {keys[number % 3]}{'x' if number % 10 == 9 else ''}"
            body: dict[str, Any] = {"model": ("courts", "recipes")[number % 3 > 0], "messages": ASKED, "max_tokens": 4}
            if number % 5 == 0:
                with client.stream("POST", CHAT, json={**body, "stream": True, "max_tokens": 2000}) as reply:
                    next(reply.iter_raw())
                    return reply.status_code
            if number % 7 == 0:
                with suppress(httpx.TimeoutException):
                    return client.post(CHAT, json={**body, "max_tokens": 2000}, timeout=0.02).status_code
                return None
            return client.post(CHAT, json={**body, "stream": number % 2 == 0}).status_code

    def _until_released(self) -> None:
        live = self._state.releases.live()
        needed = {digest for release in live.values() for digest in release.digests}
        end = time.monotonic() + 120
        while self._server.loaded != needed:
            assert time.monotonic() < end, "the old adapter is still loaded"
            time.sleep(0.05)


@pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
@pytest.mark.slow
def test_server_holds_nothing_more_after_hundreds_of_requests_and_releases(
    server: Running,
    state: State,
    two_tenants: dict[str, str],
    adapters: dict[str, Stored],
) -> None:
    rounds = Rounds(server, state, two_tenants, adapters)
    rounds.run()  # fills caches and pools
    rounds.run()
    time.sleep(1)
    before = held()
    for _ in range(ROUNDS):
        rounds.run()
    assert_held_again(before)
