"""Tenants at the gateway: keys, aliases and quota.

Keys, limits and usage are read and written for each request. So a revoked key or a lowered limit takes effect with the
next request, on every server of the database.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from tunewright.core.io import canonical_json
from tunewright.core.progress import Reporter
from tunewright.core.text import token_checksum
from tunewright.engines.protocol import AdapterFailedError, Engine, EngineStoppedError
from tunewright.serving.gateway.auth import (
    Admission,
    AnonymousAuth,
    Released,
    ReleaseRouter,
    ServedAdapter,
    Shadow,
    Target,
    model_not_found,
)
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.recorder import Received, Recorder
from tunewright.serving.gateway.schemas import FeedbackRequest, RequestBody
from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import AsyncState, StateUnavailableError, ceil_seconds
from tunewright.serving.tenants.feedback import FeedbackValues
from tunewright.serving.tenants.quota import LOST_SECONDS, LimitExceededError, Outcome, RequestUsage, Reservation
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.releases import Answer
from tunewright.serving.tenants.tenants import Caller, InvalidKeyError

POLL_SECONDS = 0.5
"""The time between two checks for new releases."""
_CHALLENGE = {"WWW-Authenticate": "Bearer"}
# Three beats may be lost before the other servers consider this one dead.
_HEARTBEAT_SECONDS = LOST_SECONDS / 4
_NO_KEY = f"{'0' * 10}_{'0' * 43}"
_UNKNOWN_KEY = f"tw_{_NO_KEY}{token_checksum(_NO_KEY)}"


@dataclass
class _Begun:
    """The requests of a tenant that have begun and are not recorded yet; further requests enter in turn."""

    users: int = 0
    """Requests that have begun or wait to begin."""
    count: int = 0
    entry: asyncio.Lock = field(default_factory=asyncio.Lock)
    recorded: asyncio.Event = field(default_factory=asyncio.Event)


class TenantAuth:
    """Access by API key: each tenant may use its own aliases, within its quota."""

    reports_load = False  # in `/health`: tenants could observe each other by the number of requests

    def __init__(
        self,
        state: State,
        engine: Engine,
        locate: Callable[[str, str], ServedAdapter],
        reporter: Reporter,
        record_key: KeyFile | None = None,
    ) -> None:
        self._state = state
        self.recorder = None if record_key is None else Recorder(state, record_key)
        """Records requests; None if this server records none."""
        self._async_state = AsyncState(state.database)
        self.router = ReleaseRouter(state, self._async_state, engine, locate, reporter)
        self._reporter = reporter
        self.gateway = uuid.uuid4().hex
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._troubles: set[str] = set()
        self._begun: dict[int, _Begun] = {}  # by tenant; tenants without requests are removed
        # One reservation of a tenant at a time: the state's threads take them in the order of arrival, and another
        # tenant would wait for hundreds of them.
        self._reserving: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._recording_feedback: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._keep: Callable[[Mapping[str, Collection[str]]], None] = lambda _callers: None

    @property
    def released(self) -> list[Released]:
        """The adapters of each alias; safe to read from any thread."""
        return self.router.released

    @property
    def resident(self) -> list[str]:
        """The digests of the loaded adapters; safe to read from any thread."""
        return self.router.resident

    @property
    def system_prompts(self) -> dict[str, str]:
        """The system messages added to requests without one, by alias."""
        return self.router.system_prompts

    @property
    def available(self) -> bool:
        """False while requests are refused because nobody can be authenticated."""
        return not self._troubles

    @asynccontextmanager
    async def running(self, keep: Callable[[Mapping[str, Collection[str]]], None]) -> AsyncIterator[None]:
        """Follow the releases while the server runs; the present ones are loaded first.

        ``keep`` is called from time to time with the tenants that can send requests, and their aliases.
        """
        self._keep = keep
        await self._update()
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            if self.recorder is not None:
                await asyncio.to_thread(self.recorder.close)
            self._async_state.close(lambda: self._state.quota.remove_gateway(self.gateway))

    async def authenticate(self, authorization: str | None) -> TenantPrincipal:
        """Return the tenant of a Bearer key; each request reads the database, so that a revoked key is refused."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                "Missing API key. Send it in the header: Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
                headers=_CHALLENGE,
            )
        try:
            caller = await self._async_state.read(self._state.keys.caller, key.strip())
        except InvalidKeyError as error:
            raise ApiError(str(error), status=401, code="invalid_api_key", headers=_CHALLENGE) from None
        except StateUnavailableError as error:
            self._report_trouble(error)
            raise
        return TenantPrincipal(self, caller)

    @asynccontextmanager
    async def counting(self, caller: Caller, is_counted: Callable[[], bool]) -> AsyncIterator[None]:
        """Count a request of the block towards requests per minute, unless it is counted at the end."""
        limit, tenant = caller.requests_per_minute, caller.tenant_id
        if limit is None:
            yield
            return
        begun = self._begun.setdefault(tenant, _Begun())
        begun.users += 1
        try:
            async with begun.entry:
                while True:
                    # Taken before the read: a request that is recorded meanwhile counts twice, which
                    # only makes it wait. With a later time, such a request would not count at all.
                    unrecorded = begun.count
                    begun.recorded.clear()
                    recorded = await self._async_state.read(self._state.quota.recent_requests, tenant, limit)
                    if recorded + unrecorded < limit:
                        break
                    await begun.recorded.wait()
                begun.count += 1
            try:
                yield
            finally:
                try:
                    if not is_counted():
                        recording = self._async_state.submit(self._state.quota.record_unmetered, tenant)
                        await self._async_state.answer(recording)
                finally:
                    begun.count -= 1
                    begun.recorded.set()
        except StateUnavailableError as error:
            self._report_trouble(error)
            raise
        finally:
            begun.users -= 1
            if not begun.users:
                del self._begun[tenant]

    async def reserve(self, reservation: Reservation) -> int:
        """Reserve quota, keep the adapter loaded, and return the number to settle by.

        Nothing may be awaited between :meth:`ReleaseRouter.route` and this, or the adapter could be unloaded.
        """
        acquired = self.router.acquire(reservation.digest)
        assert acquired, "a live release's adapter is loaded"
        turn = self._reserving.setdefault(reservation.tenant_id, asyncio.Lock())
        waits = turn.locked()
        try:
            async with turn:
                if waits and self._troubles:  # or each would wait for the state as long as the one before it
                    raise StateUnavailableError(min(self._troubles))
                return await self._reserve(reservation)
        except BaseException as error:
            self.router.release(reservation.digest)
            if isinstance(error, StateUnavailableError):
                self._report_trouble(error)
            raise

    async def record_feedback(self, tenant_id: int, body: FeedbackRequest) -> dict[str, Any]:
        """Store a tenant's feedback on one of its requests, and return the response's document."""
        # One of a tenant at a time, and not in the state's threads: the search in a text takes up to half a second.
        async with self._recording_feedback.setdefault(tenant_id, asyncio.Lock()):
            values, redacted = await asyncio.to_thread(FeedbackValues.redacted, **body.model_dump(exclude={"id"}))
            try:
                recording = self._async_state.submit(self._state.feedback.record, tenant_id, body.id, values)
                status = await self._async_state.answer(recording)
            except StateUnavailableError as error:
                self._report_trouble(error)
                raise
        if status is None:  # the same for another tenant's request
            message = f"The request {body.id} does not exist or you do not have access to it."
            raise ApiError(message, status=404, param="id", code="request_not_found")
        return {"id": body.id, "object": "feedback", "status": status, "redacted": redacted}

    async def _reserve(self, reservation: Reservation) -> int:
        reserving = self._async_state.submit(self._state.quota.reserve, reservation, self.gateway)
        try:
            return await self._async_state.answer(reserving)
        except (asyncio.CancelledError, StateUnavailableError) as error:
            # The client disconnected, or the database is slow. The thread may still reserve, so the
            # reservation is settled once it exists.
            outcome: Outcome = "timed out" if isinstance(error, StateUnavailableError) else "disconnected"
            reserving.add_done_callback(partial(self._settle_abandoned, outcome))
            raise

    def _settle_abandoned(self, outcome: Outcome, reserving: Future[int]) -> None:
        if not reserving.cancelled() and reserving.exception() is None:
            number = reserving.result()
            usage = RequestUsage(0, 0, 0.0, None, 0.0, outcome)
            self._async_state.write_later(lambda: self._state.quota.settle(number, usage))

    def settle(self, number: int, digest: str, usage: RequestUsage) -> None:
        """Record a request's usage, and release its adapter."""
        self.router.release(digest)
        self._async_state.write_later(lambda: self._state.quota.settle(number, usage))

    def shadow(self, number: int, target: Target) -> Shadow:
        """Return the shadow of a request."""
        assert target.shadow is not None
        digest, release_id = target.shadow.digest, target.release_id
        assert digest is not None and release_id is not None

        def record(answer: str, shadow_answer: str | None, why_not: str | None) -> None:
            self._async_state.write_later(
                lambda: self._state.quota.record_shadow(number, release_id, answer, shadow_answer, why_not)
            )

        return Shadow(target.shadow, lambda: self.router.acquire(digest), lambda: self.router.release(digest), record)

    async def _follow(self) -> None:
        beat = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if self._troubles:
                    await self._try_state()
                if await self.router.has_changed():
                    await self._update()
                await self.router.unload_unused()
                await self._async_state.flush()
                # The state answers again once it can be written to.
                if self._troubles or asyncio.get_running_loop().time() - beat > _HEARTBEAT_SECONDS:
                    if self.router.incomplete:  # an adapter's files may have arrived meanwhile
                        await self.router.update()
                    await self._send_heartbeat()
                    beat = asyncio.get_running_loop().time()
                if self._troubles:
                    self._troubles.clear()
                    self._reporter.warn("The serving state answers again.")
            except StateUnavailableError as error:
                self._report_trouble(error)
            except EngineStoppedError:
                pass  # a crashed engine may be restarting, and requests get this error
            except AdapterFailedError:
                pass  # an adapter could not be freed; the engine has logged why

    async def _try_state(self) -> None:
        """Look a key up and write usage, as a request does, for a key and a request that do not exist."""
        with suppress(InvalidKeyError):
            await self._async_state.read(self._state.keys.caller, _UNKNOWN_KEY)
        await self._async_state.call(self._state.quota.settle, -1, RequestUsage(0, 0, 0.0, None, 0.0, "failed"))

    async def _update(self) -> None:
        await self.router.update()
        await self._send_heartbeat()  # a deploy waits for the servers that have taken its release

    async def _send_heartbeat(self) -> None:
        newest = self.router.newest_loaded
        await self._async_state.call(self._state.quota.heartbeat, self.gateway, self._name, newest)
        self._keep(await self._async_state.call(self._state.tenants.callers))

    def _report_trouble(self, error: StateUnavailableError) -> None:
        """Warn once of each error until the database answers again, however many requests it refuses."""
        if str(error) not in self._troubles:
            self._troubles.add(str(error))
            self._reporter.warn(f"{error}\nRequests are refused (503) until the serving state answers.")


@dataclass
class TenantPrincipal:
    """A tenant with a valid key, for one request."""

    auth: TenantAuth
    caller: Caller
    _counted: bool = False

    @property
    def name(self) -> str:
        """The name under which the fair queue counts it."""
        return self.caller.tenant

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens that the prompts and answers of one request may have together; None: no limit."""
        return self.caller.tokens_per_minute

    @asynccontextmanager
    async def counting(self) -> AsyncIterator[None]:
        """Count the block's request towards requests per minute, even if it is refused."""
        try:
            async with self.auth.counting(self.caller, lambda: self._counted):
                try:
                    yield
                except (EngineStoppedError, StateUnavailableError):
                    self._counted = True  # the server's fault
                    raise
        except LimitExceededError as error:
            raise _over_limit(error) from None

    def models(self) -> list[str]:
        return sorted(self.auth.router.routes.keys() & self.caller.aliases)

    def target(self, body: RequestBody) -> Target:
        """Return the adapter of an alias; a missing alias and another tenant's alias give the same error."""
        release = self.auth.router.routes.get(body.model) if body.model in self.caller.aliases else None
        if release is None:
            raise model_not_found(body.model, self.models())

        def target(answer: Answer, shadow: Target | None = None) -> Target:
            digest, added, grammar = answer
            prompt = self.auth.router.system_prompt(digest, added)
            return Target(body.model, digest, release.id, prompt, grammar, shadow)

        candidate = release.candidate
        if candidate is None:
            return target(release.answer)
        if candidate.share is None:
            return target(release.answer, target(candidate.answer))
        canary = in_canary_share(self.caller.tenant, body, candidate.digest, candidate.share)
        return target(candidate.answer if canary else release.answer)

    async def admit(
        self, target: Target, tokens: int, response_id: str, received: Received, *, recorded: bool
    ) -> Admission:
        """Reserve the most ``tokens`` that the request can use. Call it right after :meth:`target`.

        The request is recorded if it, its tenant and the server permit it.
        """
        assert target.digest is not None and target.release_id is not None
        caller, digest, end_user = self.caller, target.digest, received.body.end_user
        reservation = Reservation(
            caller.tenant_id, caller.key_id, target.name, target.release_id, digest, tokens, end_user, response_id
        )
        try:
            number = await self.auth.reserve(reservation)
        except LimitExceededError as error:
            # At this limit it is not counted again, or clients that retry would never be answered.
            self._counted = error.limit == "requests_per_minute"
            raise _over_limit(error) from None
        self._counted = True
        shadow = None if target.shadow is None else self.auth.shadow(number, target)
        record = None
        if recorded and caller.record_share is not None and self.auth.recorder is not None:
            record = partial(self.auth.recorder.put, caller, number, response_id, received)
        return Admission(lambda usage: self.auth.settle(number, digest, usage), shadow, record)


Auth = AnonymousAuth | TenantAuth
"""Authenticates requests, and lists the models."""

Principal = AnonymousAuth | TenantPrincipal
"""The authenticated sender of a request."""


def in_canary_share(tenant: str, body: RequestBody, digest: str, share: float) -> bool:
    """Return whether a canary with this share of the traffic answers a request.

    It depends on a hash of the conversation up to the first user message. So all requests of a conversation have the
    same adapter, on every server. A conversation within one share is also within each larger share of the same adapter.
    """
    hashed = hashlib.sha256(canonical_json([digest, tenant, body.beginning]).encode()).digest()
    return int.from_bytes(hashed[:8]) < share * 2**64


def _over_limit(error: LimitExceededError) -> ApiError:
    if error.wait is None:
        return ApiError(str(error), status=400, param="max_tokens", code="request_over_limit")
    kind = "tokens" if error.limit == "tokens_per_minute" else "requests"
    wait = {"Retry-After": str(ceil_seconds(error.wait))}
    return ApiError(str(error), status=429, code="rate_limit_exceeded", kind=kind, headers=wait)
