"""The isolation test on real vLLM: it passes with our settings, and detects vLLM's bugs without them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from engine_kinds import STOPS, vllm_engine
from isolation_helpers import PROMPTS, failed, result_of

from tunewright.engines.protocol import Engine, EngineStoppedError, stream
from tunewright.engines.vllm.engine import VllmEngine, VllmSettings, list_adapters
from tunewright.gate.answers import PeftReference
from tunewright.generation.requests import Request
from tunewright.models.bases import Base

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def reference(small_base: Path, small_adapters: dict[str, Path]) -> PeftReference:
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    return PeftReference(base, "float32", "none", small_adapters, stop_ids=STOPS)


async def _ids(engine: Engine, request: Request) -> list[int]:
    return [token async for delta in stream(engine, request) for token in delta.ids]


@pytest.mark.fault("engine", "serve")
def test_vllm_with_our_settings_is_isolated_and_answers_equally_after_a_crash(
    small_base: Path, small_adapters: dict[str, Path], reference: PeftReference
) -> None:
    with vllm_engine(small_base) as engine:
        result = result_of(engine, reference, small_adapters)
        assert (result.verdict, failed(result), result.alike) == ("isolated", set(), ())

        asked = [Request(PROMPTS[0], digest, 8) for digest in (None, *small_adapters)]
        before = [asyncio.run(_ids(engine, request)) for request in asked]
        asyncio.run(_lose_core(engine))
        _wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)
        # The resolver loads them again as they are asked for.
        assert [asyncio.run(_ids(engine, request)) for request in asked] == before


async def _lose_core(engine: VllmEngine) -> None:
    """Kill vLLM's core process while requests are running."""
    waiting = [asyncio.create_task(_ids(engine, Request(PROMPTS[0], None, 480))) for _ in range(2)]
    while engine.in_flight[0] < 2:
        await asyncio.sleep(0)
    assert engine.child.process_id is not None
    os.kill(_engine_core(engine.child.process_id), signal.SIGKILL)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, EngineStoppedError), outcome
    while True:
        with pytest.raises(EngineStoppedError, match="restarting"):
            await _ids(engine, Request(PROMPTS[0], None, 2))
        if engine.stopped is not None:
            return


def _engine_core(server: int) -> int:
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
            if name.startswith("VLLM::EngineCor") and int(rest.split()[1]) == server:
                return int(status.parent.name)
    raise AssertionError("vLLM has no EngineCore")


def _wait_until(true: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


class SlotsLikeAdapters(VllmSettings):
    """Without the slot to spare."""

    @property
    def slots(self) -> int:
        return self.room


def test_isolation_test_detects_vllms_last_slot_bug(
    small_base: Path, small_adapters: dict[str, Path], reference: PeftReference
) -> None:
    with vllm_engine(small_base, SlotsLikeAdapters, room=len(small_adapters)) as engine:
        result = result_of(engine, reference, small_adapters)
    assert result.verdict == "not isolated"
    # Either pattern batches the base with adapters; which of them meets in a batch depends on the machine.
    assert failed(result) & {"the base in the mix", "all mixed"}
    wrong = result.failures
    assert {failure.asked for failure in wrong} == {"base"}
    assert all(failure.like is not None and failure.like.startswith("adapter") for failure in wrong if failure.like)


class NamedByAlias(VllmEngine):
    """Adapters called by an alias, from one folder, as is usual: a new version takes the old one's name and path."""

    place: Path

    async def load(self, digest: str, folder: Path) -> None:
        alias = self.place / "alias"
        await asyncio.to_thread(shutil.copytree, folder, alias, dirs_exist_ok=True)
        self._listed[digest] = {}
        list_adapters(self.child.folder, {"alias": {"path": str(alias), "files": {}}})

    async def unload(self, digest: str) -> None:
        self._listed.pop(digest, None)
        (await self.child.client().delete("/tunewright/adapters/alias")).raise_for_status()

    def _body(self, request: Request, stop_ids: Collection[int], tenant: str) -> dict[str, Any]:
        body = super()._body(request, stop_ids, tenant)
        return body if request.adapter is None else {**body, "model": "alias"}


def test_isolation_test_detects_a_stale_prefix_cache(
    small_base: Path, small_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The keys of vLLM's prefix cache are name and path: with both the same, it takes the old version's."""
    (old, first), (new, second), _ = small_adapters.items()
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    reference = PeftReference(base, "float32", "none", {old: first, new: second}, stop_ids=STOPS)
    prompt = PROMPTS[3] * 12  # more than a block of the cache, which holds whole blocks only
    with vllm_engine(small_base) as engine:
        engine.__class__ = NamedByAlias
        assert isinstance(engine, NamedByAlias)
        engine.place = tmp_path

        async def replace() -> tuple[list[int], list[int]]:
            await engine.load(old, first)
            before = await _ids(engine, Request(prompt, old, 8))
            await engine.unload(old)
            await engine.load(new, second)
            return before, await _ids(engine, Request(prompt, new, 8))

        before, after = asyncio.run(replace())
        from tunewright.gate.answers import Answer
        from tunewright.gate.isolation import TOLERANCE

        (right,) = reference.shortfalls(old, prompt, [Answer(tuple(before), "length" if len(before) == 8 else "stop")])
        (wrong,) = reference.shortfalls(new, prompt, [Answer(tuple(after), "length" if len(after) == 8 else "stop")])
        assert right <= TOLERANCE["float32"] < wrong
