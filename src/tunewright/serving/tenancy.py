"""Tenants at the gateway: their keys, their aliases, their limits; and the releases that aliases stand for.

Keys, limits and usage are looked up and written for each request, so that a revoked key and a lowered limit hold from
the next request on, on every server of the database. Releases are followed: the adapters of a new one are loaded first,
then the alias is switched, and the old adapter is let go when its last answer has ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from tunewright.adapters.system_prompt import SystemPrompt
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.progress import Reporter
from tunewright.engines.protocol import AdapterFailedError, EngineStoppedError
from tunewright.serving.access import Admission, Released, ServedAdapter, Shadow, Target, model_not_found
from tunewright.serving.protocol import AnyRequest, ApiError
from tunewright.serving.state import (
    Caller,
    InvalidKeyError,
    LimitExceededError,
    Release,
    State,
    StateUnavailableError,
    Used,
    Wanted,
)
from tunewright.serving.state.database import ceil_seconds
from tunewright.serving.state.meter import LOST_SECONDS

log = logging.getLogger("tunewright")

POLL_SECONDS = 0.5
"""How soon a release is noticed."""
_ALIVE_SECONDS = LOST_SECONDS / 4

T = TypeVar("T")


class Loader(Protocol):
    """The part of an engine that changes which adapters it has."""

    name: str

    async def load(self, digest: str, folder: Path) -> None:
        """Have an adapter ready, or raise AdapterFailedError or EngineStoppedError."""

    async def unload(self, digest: str) -> None:
        """Let it go, or raise AdapterFailedError or EngineStoppedError."""


class TenantAccess:
    """Tenants only, each with its keys, to the aliases that it may call.

    Args:
        state: closed when the server ends.
        engine: which is told what to load.
        locate: an adapter by its name and digest; a UserError from it is told, and the release is not taken.
        reporter: told which releases are live.
    """

    tells_load = False

    def __init__(
        self, state: State, engine: Loader, locate: Callable[[str, str], ServedAdapter], reporter: Reporter
    ) -> None:
        self._state = state
        self._engine = engine
        self._locate = locate
        self._reporter = reporter
        self.gateway = uuid.uuid4().hex
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._routes: dict[str, Release] = {}
        self._loaded: dict[str, SystemPrompt] = {}
        self._held: Counter[str] = Counter()
        self._seen = -1
        self._refused: dict[str, tuple[int, str]] = {}
        self._said: str | None = None
        # SQLite has one writer at a time: more threads would only wait for each other.
        self._threads = ThreadPoolExecutor(1 if state.is_sqlite else 8, thread_name_prefix="tunewright-state")
        self._unwritten: deque[Callable[[], None]] = deque()

    @property
    def names(self) -> list[str]:
        """The aliases that are live here."""
        return sorted(self._routes)

    @property
    def released(self) -> list[Released]:
        """What they stand for, and what is tried beside."""
        found = []
        for alias, release in sorted(self._routes.copy().items()):
            found.append(Released(alias, release.digest, "live", release.number))
            if release.candidate is not None:
                role: Literal["canary", "shadow"] = "shadow" if release.candidate.share is None else "canary"
                found.append(Released(alias, release.candidate.digest, role, release.number))
        return found

    @property
    def resident(self) -> list[str]:
        """Digests of the adapters that are loaded."""
        return sorted(self._loaded.copy())

    @property
    def system_prompts(self) -> dict[str, str]:
        """What requests without a system message get as one, by alias."""
        found = {alias: self.system_prompt(*release.answer) for alias, release in self._routes.copy().items()}
        return {alias: text for alias, text in found.items() if text is not None}

    def system_prompt(self, digest: str, added: bool) -> str | None:
        """Return what a loaded adapter's requests get as a system message where they have none, if it is ``added``."""
        return self._loaded[digest].text if added else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the releases while the server runs; those there are already are loaded before it begins."""
        await self._catch_up()
        await self._alive()
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            self._threads.submit(self._leave)
            self._threads.shutdown(wait=True)
            self._state.close()

    async def enter(self, authorization: str | None) -> TenantVisitor:
        """Who it is, by a Bearer key; every request asks the database, so that a revoked key opens nothing."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("Send your API key in the header: Authorization: Bearer KEY.")
        try:
            caller = await self._read(self._state.tenants.caller, key.strip())
        except InvalidKeyError as error:
            raise _unauthorized(str(error)) from None
        return TenantVisitor(self, caller)

    def route(self, alias: str) -> Release | None:
        """Return what an alias stands for here, at this moment."""
        return self._routes.get(alias)

    async def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what asks the database, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _read(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what only reads: in SQLite it waits for no writer, and takes less time than a change of threads."""
        return function(*arguments) if self._state.is_sqlite else await self._ask(function, *arguments)

    async def reserve(self, wanted: Wanted) -> int:
        """Reserve, and keep the adapter until the request is settled. Nothing may happen between route and this."""
        self._held[wanted.digest] += 1
        try:
            return await self._reserved(wanted)
        except BaseException:
            self._let_go(wanted.digest)
            raise

    async def _reserved(self, wanted: Wanted) -> int:
        reserving = self._threads.submit(self._state.meter.reserve, wanted, self.gateway)
        try:
            return await asyncio.wrap_future(reserving)
        except asyncio.CancelledError:
            # The client hung up meanwhile, and what may have been reserved is given back.
            reserving.add_done_callback(self._give_back)
            raise

    def _give_back(self, reserving: Future[int]) -> None:
        if not reserving.cancelled() and reserving.exception() is None:
            number = reserving.result()
            self._write(lambda: self._state.meter.settle(number, Used(0, 0, 0.0, None, 0.0, "hung up")))

    def settle(self, number: int, digest: str, used: Used) -> None:
        """Write what a request came to, and let its adapter go if nothing needs it any more."""
        self._let_go(digest)
        self._write(lambda: self._state.meter.settle(number, used))

    def shadow(self, number: int, release_id: int, digest: str, system_prompt: str | None) -> Shadow:
        """Return the candidate that a request is to be asked of as well."""

        def hold() -> bool:
            if digest not in self._loaded:
                return False
            self._held[digest] += 1
            return True

        def record(answer: str, said: str | None, why_not: str | None) -> None:
            self._write(lambda: self._state.meter.record_shadow(number, release_id, answer, said, why_not))

        return Shadow(digest, system_prompt, hold, lambda: self._let_go(digest), record)

    def _write(self, write: Callable[[], None]) -> None:
        """Write in the background; where the database does not answer it is tried again later."""

        def attempt() -> None:
            try:
                write()
            except StateUnavailableError as error:
                log.warning("what a request used cannot be written now and is tried again: %s", error)
                self._unwritten.append(write)

        self._threads.submit(attempt)

    def _let_go(self, digest: str) -> None:
        self._held[digest] -= 1
        if not self._held[digest]:
            del self._held[digest]

    async def _follow(self) -> None:
        beat = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if await self._read(self._state.releases.newest) != self._seen:
                    await self._catch_up()
                await self._unload_unused()
                while self._unwritten:
                    await self._ask(self._unwritten.popleft())
                if asyncio.get_running_loop().time() - beat > _ALIVE_SECONDS:
                    if self._refused:  # an adapter's files may have come meanwhile
                        await self._catch_up()
                    await self._alive()
                    beat = asyncio.get_running_loop().time()
                self._tell(None)
            except StateUnavailableError as error:
                self._tell(str(error))
            except EngineStoppedError:
                pass  # an engine that has died may be started again; requests are told so
            except AdapterFailedError:
                pass  # an adapter that could not be let go; the engine's log says why

    def _tell(self, trouble: str | None) -> None:
        """Say once that the database is out of reach, and once that it is back."""
        if trouble != self._said:
            self._reporter.warn(trouble or "The serving state answers again.")
            self._said = trouble

    async def _alive(self) -> None:
        taken = min((number - 1 for number, _ in self._refused.values()), default=self._seen)
        await self._ask(self._state.meter.alive, self.gateway, self._name, taken)

    def _leave(self) -> None:
        with suppress(StateUnavailableError):
            while self._unwritten:
                self._unwritten.popleft()()
            self._state.meter.gone(self.gateway)

    async def _catch_up(self) -> None:
        """Load what the live releases need, then switch; a release that cannot be loaded is not taken."""
        newest = await self._read(self._state.releases.newest)
        live = await self._read(self._state.releases.live)
        for alias in self._routes.keys() - live.keys():
            del self._routes[alias]
            self._reporter.say(f"{alias} is undeployed")
        for alias in self._refused.keys() - live.keys():
            del self._refused[alias]
        for alias, release in live.items():
            before = self._routes.get(alias)
            if before is not None and before.id == release.id:
                continue
            try:
                await self._load(release)
            except (UserError, AdapterFailedError) as error:
                if self._refused.get(alias) != (release.id, str(error)):
                    still = f"it goes on with release {before.number}" if before else "it is not served"
                    self._reporter.warn(f"{alias}: release {release.number} cannot be taken, {still}: {error}")
                self._refused[alias] = (release.id, str(error))
                continue
            self._refused.pop(alias, None)
            self._routes[alias] = release
            tried = f", and {release.candidate.adapter} {release.candidate.told}" if release.candidate else ""
            self._reporter.say(f"{alias}: release {release.number} is live: {release.adapter}{tried}")
            self._report_system_prompts(release)
            self._tell_untested(release)
        self._seen = newest
        await self._alive()

    def _report_system_prompts(self, release: Release) -> None:
        used = [(release.adapter, *release.answer)]
        if (tried := release.candidate) is not None:
            used.append((tried.adapter, tried.digest, tried.system_prompt))
        for adapter, digest, added in used:
            prompt = self._loaded[digest]
            if added:
                prompt.report(f"{release.alias}, {adapter}", self._reporter)
            elif prompt.text is not None:
                self._reporter.say(
                    f"{release.alias}, {adapter}: its trained system prompt is not added, as this release says"
                )

    def _tell_untested(self, release: Release) -> None:
        """Warn of a release that the isolation test has not let through on this kind of engine."""
        test = release.grounds.isolation
        if test is None or test.engine != self._engine.name:
            was = f"tested for isolation on {test.engine} alone" if test else "not tested for isolation"
            self._reporter.warn(
                f"{release.alias}: release {release.number} was {was}, and {self._engine.name} "
                f"answers here: `tunewright serve --engine {self._engine.name} --self-test` tests what is live."
            )

    async def _load(self, release: Release) -> None:
        needed = {release.digest: release.adapter}
        if release.candidate:
            needed[release.candidate.digest] = release.candidate.adapter
        for digest, adapter in needed.items():
            if digest not in self._loaded:
                served = await asyncio.to_thread(self._locate, adapter, digest)
                await self._engine.load(digest, served.folder)
                self._loaded[digest] = served.system_prompt

    async def _unload_unused(self) -> None:
        needed = {digest for release in self._routes.values() for digest in release.digests}
        for digest in self._loaded.keys() - needed:
            if digest not in self._held:
                del self._loaded[digest]
                await self._engine.unload(digest)


@dataclass(frozen=True)
class TenantVisitor:
    """A tenant that has shown a valid key."""

    access: TenantAccess
    caller: Caller

    @property
    def name(self) -> str:
        """Whose turn it is in the fair queue."""
        return self.caller.tenant

    @property
    def most_tokens(self) -> int | None:
        """The tenant's limit of tokens per minute, which one request cannot exceed."""
        return self.caller.tokens_per_minute

    def models(self) -> list[str]:
        """Return the aliases that its key opens and that are live."""
        return [alias for alias in self.access.names if alias in self.caller.aliases]

    def target(self, asked: AnyRequest) -> Target:
        """Return what its alias stands for; one that is not there and one that is another's look the same."""
        release = self.access.route(asked.model) if asked.model in self.caller.aliases else None
        if release is None:
            raise model_not_found(asked.model, self)
        digest, shadow = release.digest, None
        prompt, shadow_prompt = self.access.system_prompt(*release.answer), None
        if (tried := release.candidate) is not None:
            its_prompt = self.access.system_prompt(tried.digest, tried.system_prompt)
            if tried.share is None:
                shadow, shadow_prompt = tried.digest, its_prompt
            elif falls_to(self.caller.tenant, asked, tried.digest, tried.share):
                digest, prompt = tried.digest, its_prompt
        return Target(asked.model, digest, release.id, shadow, prompt, shadow_prompt)

    async def admit(self, target: Target, tokens: int, end_user: str | None) -> Admission:
        """Reserve what the request may come to."""
        assert target.digest is not None and target.release_id is not None
        caller, digest = self.caller, target.digest
        wanted = Wanted(caller.tenant_id, caller.key_id, target.name, target.release_id, digest, tokens, end_user)
        try:
            number = await self.access.reserve(wanted)
        except LimitExceededError as error:
            raise _over_limit(error) from None
        shadow = None
        if target.shadow is not None:
            shadow = self.access.shadow(number, target.release_id, target.shadow, target.shadow_system_prompt)
        return Admission(settle=lambda used: self.access.settle(number, digest, used), shadow=shadow)


def falls_to(tenant: str, asked: AnyRequest, digest: str, share: float) -> bool:
    """Return whether a canary of this share answers: the same for all turns of a conversation, and on every server.

    It goes by a hash of the conversation's beginning, up to the user's first turn. Whoever was in a share is in a
    larger one of the same adapter, too.
    """
    hashed = hashlib.sha256(canonical_json([digest, tenant, asked.beginning]).encode()).digest()
    return int.from_bytes(hashed[:8]) < share * 2**64


def _unauthorized(message: str) -> ApiError:
    return ApiError(message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _over_limit(error: LimitExceededError) -> ApiError:
    if error.wait is None:
        return ApiError(str(error), status=400, param="max_tokens", code="request_over_limit")
    kind = "tokens" if error.limit == "tokens_per_minute" else "requests"
    wait = {"Retry-After": str(ceil_seconds(error.wait))}
    return ApiError(str(error), status=429, code="rate_limit_exceeded", kind=kind, headers=wait)
