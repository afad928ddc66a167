"""Engines at several addresses as one engine; :func:`tunewright.engines.remote.choose` picks the one for a request.

Starting, restarting and scaling the engines is another program's work.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.engines.protocol import (
    AdapterFailedError,
    Delta,
    EngineStoppedError,
    RequestFailedError,
    TokenSink,
    deliver_stream,
)
from tunewright.engines.remote import EngineFacts, RemoteEngine, adapter_body, choose, resolved
from tunewright.generation.requests import Request

T = TypeVar("T")

UNAVAILABLE = "No engine answers now. Try again in a minute."
LOST = "The engine stopped in the middle of this answer. Try again."
"""The message for clients, who must not learn the engines' addresses; the log contains them."""
LEAVE_S = 5.0
"""Time to notify the engines that this gateway no longer needs its adapters."""
LOOK_S = 5.0
"""Time between two looks at each address, and at the names' addresses."""

_Running = tuple[asyncio.AbstractEventLoop, "asyncio.Task[Any]", TokenSink]
"""A request on its way, to be ended when the server ends."""

log = logging.getLogger("tunewright")


class EnginePool:
    """Engines of one base at several addresses, as an engine.

    Each address is asked every :data:`LOOK_S` seconds. An address that does not answer, holds
    another base, or is not a tunewright engine gets no requests. It is reported, and asked again.
    An engine that comes back loads the adapters again before it gets requests for them.

    Args:
        urls: ``http://host:port``; a name with several addresses, such as that of a headless service, stands for an
            engine at each.
        base: the digest of the base's files.
        quantization: the precision of the base's weights.
    """

    def __init__(self, urls: Sequence[str], base: str, quantization: str, reporter: Reporter) -> None:
        self._urls = tuple(urls)
        self._base = base
        self._quantization = quantization
        self._id = secrets.token_hex(8)
        self._reporter = reporter
        # Guards everything below: requests may come from several event loops.
        self._lock = threading.RLock()
        self._engines: dict[str, RemoteEngine] = {}
        self._addresses: dict[str, list[str]] = {}
        """The addresses of each URL when its name was last resolved."""
        self._tasks: set[asyncio.Task[Exception | None]] = set()
        """Loads that no request waits for."""
        self._folders: dict[str, Path] = {}
        self._reported: dict[str, str] = {}
        self._requests: set[_Running] = set()
        self._stopped: str | None = None
        # Addresses are asked and adapters loaded in a loop that outlives any request. Not the policy's loop: uvloop,
        # which older uvicorns set, cannot be closed while a name that nobody waits for is being resolved.
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tunewright-engines", daemon=True)
        self._thread.start()
        try:
            first = self._require_engines()
        except BaseException:
            self.stop()
            raise
        facts = [found for engine in first if (found := engine.facts) is not None]
        self.name = facts[0].engine
        self.context_length = min(each.context_length for each in facts)
        self.prefill_tokens = min(each.prefill_tokens for each in facts)
        self.unsupported = frozenset(field for each in facts for field in each.unsupported)
        self._looking = self._run(self._look_forever())

    @property
    def up(self) -> list[RemoteEngine]:
        """The engines that take requests."""
        return [engine for engine in self.engines if engine.up]

    @property
    def engines(self) -> list[RemoteEngine]:
        """The engines at all known addresses."""
        with self._lock:
            return list(self._engines.values())

    @property
    def max_num_seqs(self) -> int:
        """The number of requests that the engines which are up compute at once, at least 1."""
        return max(1, sum(engine.rows for engine in self.up))

    @property
    def stopped(self) -> str | None:
        return self._stopped or (None if self.up else UNAVAILABLE)

    @property
    def permanently_stopped(self) -> bool:
        """True once the server ends: an address that does not answer is asked again."""
        return self._stopped is not None

    @property
    def in_flight(self) -> tuple[int, int]:
        """The number of running requests, and of requests beyond an engine's rows, which wait in the engine."""
        counts = [(engine.running, engine.rows) for engine in self.engines]
        return sum(min(count) for count in counts), sum(max(0, running - rows) for running, rows in counts)

    @property
    def resident(self) -> list[str]:
        """The digests of the adapters that an engine has loaded."""
        return sorted({digest for engine in self.engines for digest in list(engine.adapters)})

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:
        """Start a request on an engine: see :meth:`tunewright.engines.protocol.Engine.submit`."""
        return deliver_stream(self._stream(request, sink, tenant), sink)

    async def _stream(self, request: Request, sink: TokenSink, tenant: str) -> AsyncGenerator[Delta, None]:
        """Yield an engine's deltas; if it stops before the first token, ask another engine."""
        task = asyncio.current_task()
        assert task is not None
        own = asyncio.get_running_loop(), task, sink
        tried: list[RemoteEngine] = []
        while True:
            engine, begun = self._assign(request.adapter, tried), False
            self._requests.add(own)
            try:
                async with aclosing(engine.stream(request, tenant)) as deltas:
                    async for delta in deltas:
                        begun = True
                        if delta.finish:
                            self._requests.discard(own)
                        yield delta
                return
            except EngineStoppedError:
                if begun:
                    raise EngineStoppedError(LOST) from None
                tried.append(engine)
            finally:
                with self._lock:
                    engine.running -= 1
                    self._requests.discard(own)

    async def load(self, digest: str, folder: Path) -> None:
        """Load an adapter on each engine that is up. An engine without it is reported, and gets no requests for it."""
        with self._lock:
            if digest in self._folders:
                return
            engines = self.up
            self._folders[digest] = folder
        loads = [self._run(self._load_on(engine, digest)) for engine in engines]
        failed = [error for load in loads if (error := await asyncio.shield(asyncio.wrap_future(load))) is not None]
        if len(failed) == len(engines):
            with self._lock:
                self._folders.pop(digest, None)
            raise failed[0] if failed else EngineStoppedError(UNAVAILABLE)

    async def unload(self, digest: str) -> None:
        """Free an adapter that no running request needs, on each engine that is up."""
        if self._stopped is not None:
            raise EngineStoppedError(self._stopped)
        with self._lock:
            self._folders.pop(digest, None)
            holding = [engine for engine in self.up if digest in engine.adapters]
        for free in [self._run(self._unload_on(engine, digest)) for engine in holding]:
            await asyncio.shield(asyncio.wrap_future(free))

    def stop(self) -> None:
        """Leave the engines, which keep running; unfinished requests receive :class:`EngineStoppedError`."""
        self._stopped = "The server is shutting down."
        with self._lock:
            requests = list(self._requests)
        for request in requests:
            with suppress(RuntimeError):  # the request's loop is closed, and nobody waits for the answer
                request[0].call_soon_threadsafe(self._end, request)
        if self._thread.is_alive():
            with suppress(TimeoutError):  # an engine frees the adapters of a lost gateway by itself, but later
                self._run(self._leave()).result(LEAVE_S)
            self._run(_cancel_others()).add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
            self._thread.join()
            self._loop.close()

    def _end(self, request: _Running) -> None:
        _, task, sink = request
        if request in self._requests and not task.cancelling():  # or the request has ended, or was aborted, meanwhile
            task.cancel()
            sink.deliver(EngineStoppedError(self._stopped or LOST))

    def _assign(self, adapter: str | None, tried: Sequence[RemoteEngine]) -> RemoteEngine:
        """Return the engine for a request, which counts as running on it from now on."""
        with self._lock:
            if self._stopped is not None:
                raise EngineStoppedError(self._stopped)
            if adapter is not None and adapter not in self._folders:
                raise RequestFailedError(f"The adapter {adapter} is not loaded.")
            up = [engine for engine in self.up if engine not in tried]
            able = [engine for engine in up if adapter is None or adapter in engine.adapters]
            if not able:
                raise EngineStoppedError(UNAVAILABLE)
            engine = choose(adapter, able)
            engine.running += 1
            return engine

    def _require_engines(self) -> list[RemoteEngine]:
        """Ask each address for the first time, and return the engines that are up."""
        found = self._run(self._look()).result()
        for error in found.values():
            if isinstance(error, UserError):
                raise error
        if up := self.up:
            self._report_looks(found)
            return up
        reasons = "\n".join(f"  {engine.stopped}" for engine in self.engines) or "  Their names have no address."
        raise UserError(
            f"No engine answers:\n{reasons}",
            where="serve.engines",
            fix="Start one at such an address with `tunewright engine serve`.",
        )

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self._report_looks(await self._look())
            except Exception:  # requests are answered despite any error here
                log.exception("the engines could not be asked")

    async def _look(self) -> dict[str, Exception | None]:
        """Ask each address; return the errors by address, None if the engine takes requests."""
        for url in self._urls:
            if found := await asyncio.to_thread(resolved, url):  # a name server may not respond for a moment
                self._addresses[url] = found
        addresses = [each for url in self._urls for each in self._addresses.get(url, [url])]
        with self._lock:
            for gone in self._engines.keys() - set(addresses):
                del self._engines[gone]
            for url in addresses:
                self._engines.setdefault(url, RemoteEngine(url, self._id))
            engines = list(self._engines.values())
        errors = await asyncio.gather(*(self._admit(engine) for engine in engines))
        return {engine.url: error for engine, error in zip(engines, errors, strict=True)}

    async def _admit(self, engine: RemoteEngine) -> Exception | None:
        """Ask one engine, load the adapters that it lacks, and let it take requests; otherwise return the error."""
        try:
            facts = await engine.ask_facts()
            self._require_equal(engine, facts)
            if facts.stopped is not None:
                raise EngineStoppedError(f"The engine {engine.url}: {facts.stopped}")
        except (UserError, EngineStoppedError) as error:
            engine.stopped = str(error)
            return error
        if engine.facts is None or engine.facts.instance != facts.instance or engine.stopped is not None:
            engine.adapters.clear()
            engine.restarts += engine.facts is not None and engine.facts.instance != facts.instance
        engine.facts, engine.stopped = facts, None
        with self._lock:
            missing = self._folders.keys() - engine.adapters - engine.loading
        for digest in missing:  # not awaited: the other engines are checked meanwhile
            task = asyncio.create_task(self._load_on(engine, digest))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return None

    def _require_equal(self, engine: RemoteEngine, facts: EngineFacts) -> None:
        """Check that an engine holds the gateway's base."""
        for what, own, other, fix in (
            ("base", self._base[:12], facts.base[:12], "Start it with the same base_model and revision."),
            ("quantization", self._quantization, facts.quantization, "Set serve.quantization to the same on both."),
        ):
            if own != other:
                raise UserError(
                    f"The engine {engine.url} has the {what} {other}, this gateway {own}",
                    where="serve.engines",
                    fix=fix,
                )
        if lacking := set(facts.unsupported) - getattr(self, "unsupported", set(facts.unsupported)):
            raise UserError(
                f"The engine {engine.url} does not support {', '.join(sorted(lacking))}, as the others do",
                where="serve.engines",
                fix="Restart this gateway, or start an engine of the same kind.",
            )
        shortest = getattr(self, "context_length", 0)
        if facts.context_length < shortest:
            raise UserError(
                f"The engine {engine.url} has a context of {facts.context_length:,} tokens, less than the {shortest:,} "
                "of the others",
                where="serve.engines",
                fix="Restart this gateway, or start the engine with the longer context.",
            )

    async def _load_on(self, engine: RemoteEngine, digest: str) -> Exception | None:
        """Load an adapter on an engine, one at a time; return the error."""
        engine.loading.add(digest)
        try:
            async with engine.changing:
                with self._lock:
                    folder = self._folders.get(digest)
                if folder is None or digest in engine.adapters or self._stopped is not None:
                    return None  # unloaded or loaded meanwhile, or this gateway leaves
                try:
                    await engine.change("load", adapter_body(digest, folder))
                    if digest not in self._folders:
                        await engine.change("unload", {"digest": digest})
                        return None
                except (UserError, AdapterFailedError, EngineStoppedError) as error:
                    self._report(f"{engine.url} {digest[:12]}", f"{error} Its requests go to the other engines.")
                    return error
                engine.adapters.add(digest)
        finally:
            engine.loading.discard(digest)
        self._report(f"{engine.url} {digest[:12]}", None)
        return None

    async def _leave(self) -> None:
        held = [(engine, digest) for engine in self.up for digest in list(engine.adapters)]
        await asyncio.gather(*(self._unload_on(*each) for each in held), return_exceptions=True)

    async def _unload_on(self, engine: RemoteEngine, digest: str) -> None:
        engine.adapters.discard(digest)
        with suppress(EngineStoppedError):  # after its return, an engine loads only served adapters
            async with engine.changing:
                await engine.change("unload", {"digest": digest})

    def _report_looks(self, errors: Mapping[str, Exception | None]) -> None:
        for url, error in errors.items():
            self._report(url, None if error is None else f"{error} It is left out until it answers.")

    def _report(self, what: str, fault: str | None) -> None:
        """Report a fault when it begins, and its end; not at each look."""
        before = self._reported.pop(what, None)
        if fault is not None:
            self._reported[what] = fault
            if before != fault:
                self._reporter.warn(fault)
        elif before is not None:
            self._reporter.say(f"{what} is back.")

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def engines_at(urls: Sequence[str], base: str, quantization: str, reporter: Reporter) -> dict[str, EngineFacts]:
    """Return the facts that the engines at these addresses report, by address."""
    pool = EnginePool(urls, base, quantization, reporter)
    try:
        return {engine.url: engine.facts for engine in pool.up if engine.facts is not None}
    finally:
        pool.stop()


async def _cancel_others() -> None:
    """Cancel the other tasks of this loop, and wait for them."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
