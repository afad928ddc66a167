"""Engines with faults: they mix their adapters up as real ones have, or apply an adapter wrongly."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tunewright.adapters.lora_weights import load_lora_weights
from tunewright.engines.peft import PeftEngine
from tunewright.engines.protocol import Delta, TokenSink, deliver_stream, stream
from tunewright.generation.requests import Request


@dataclass(frozen=True)
class _Correct:
    """The engine without a bug."""

    submit: Callable[..., Callable[[], object]]


class Planted(PeftEngine):
    """An engine whose subclass answers wrongly."""

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:
        return deliver_stream(self.deltas(request), sink)

    def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the answer of the engine without the bug."""
        return stream(_Correct(super().submit), request)  # type: ignore[arg-type]  # only submit is called


class LastSlot(Planted):
    """vLLM's bug without a GPU: batched with others, the base is answered with the adapter of the last slot."""

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        if request.adapter is None and sum(self.in_flight) > 1 and self._loaded:
            request = replace(request, adapter=max(self._loaded))
        async for delta in super().deltas(request):
            yield delta


class StaleCache(Planted):
    """llama.cpp's bug: what one adapter computed for a prompt is taken for another one's."""

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        kept: dict[tuple[int, ...], list[Delta]] = self.__dict__.setdefault("kept", {})
        if request.prompt_ids not in kept:
            kept[request.prompt_ids] = [delta async for delta in super().deltas(request)]
        for delta in kept[request.prompt_ids]:
            yield delta


class CacheOfTwo(Planted):
    """A key that is the same for two certain adapters: each finds what the other one has computed."""

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        kept: dict[tuple[str | None, tuple[int, ...]], list[Delta]] = self.__dict__.setdefault("kept", {})
        one, other = self.__dict__.setdefault("pair", sorted(self._loaded)[-2:])
        key = (one if request.adapter == other else request.adapter, request.prompt_ids)
        found = kept.get(key)
        deltas = found or [delta async for delta in super().deltas(request)]
        if not found:
            kept[key] = deltas
        for delta in deltas:
            yield delta


class OldVersion(Planted):
    """A bug where an unloaded adapter stays in its slot and the next one is mistaken for it."""

    newest = False

    async def unload(self, digest: str) -> None:
        self.__dict__.setdefault("left", []).append(digest)

    async def load(self, digest: str, folder: Path) -> None:
        left: list[str] = self.__dict__.setdefault("left", [])
        stands: dict[str, str] = self.__dict__.setdefault("stands", {})
        if left:
            stands[digest] = left.pop(-1 if self.newest else 0)
        await super().load(digest, folder)

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        stands: dict[str | None, str] = self.__dict__.get("stands", {})
        async for delta in super().deltas(replace(request, adapter=stands.get(request.adapter, request.adapter))):
            yield delta


class LastVersion(OldVersion):
    """The same, where the slot that was left last is taken first."""

    newest = True


class WrongScale(PeftEngine):
    """An engine that reads an adapter's alpha wrongly: all of its changes are too small."""

    factor = 0.5

    async def load(self, digest: str, folder: Path) -> None:
        await super().load(digest, folder)
        loras = load_lora_weights(folder, self._model)
        smaller = {name: replace(lora, scale=self.factor * lora.scale) for name, lora in loras.items()}

        def put() -> None:
            self._batch.remove_adapter(digest)
            self._batch.add_adapter(digest, smaller)

        await self._run_between_steps(put)


class LateBase(Planted):
    """An engine that loses the adapter in long answers: after twelve tokens the base answers."""

    after = 12

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        if request.adapter is None or request.max_new_tokens <= self.after:
            async for delta in super().deltas(request):
                yield delta
            return
        ids: tuple[int, ...] = ()
        async for delta in super().deltas(replace(request, max_new_tokens=self.after)):
            ids += delta.ids
            yield replace(delta, finish=None if delta.finish == "length" else delta.finish)
            if delta.finish == "stop":
                return
        rest = replace(
            request,
            adapter=None,
            prompt_ids=(*request.prompt_ids, *ids),
            max_new_tokens=request.max_new_tokens - self.after,
        )
        async for delta in super().deltas(rest):
            yield delta
