"""``engine serve``: one engine with the project's adapters, for servers on other machines."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tunewright.adapters.registry import adapter_digest
from tunewright.chat.answers import grammar_compiler
from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.engines.protocol import (
    AdapterFailedError,
    Engine,
    EngineStoppedError,
    RequestFailedError,
    stream,
)
from tunewright.engines.remote import FACTS, GATEWAY, PROTOCOL, TOKEN, EngineFacts, Event, failure
from tunewright.generation.constraints import Grammar, GrammarCompiler
from tunewright.generation.requests import Request
from tunewright.open_project import OpenProject
from tunewright.serving.engine_start import EngineSpec, start_engine
from tunewright.serving.gateway.server import require_free, serve
from tunewright.serving.options import EngineOptions
from tunewright.serving.release_tests import EngineUnderTest


class EngineService:
    """An engine, loaded and ready to answer servers."""

    def __init__(
        self,
        project: OpenProject,
        quantization: Quantization,
        folders: Mapping[str, Path],
        locate: Callable[[str, str], Path],
        options: EngineOptions,
    ) -> None:
        require_free(options.host, options.port)
        config, base = project.folder.config, project.base
        config = config.model_copy(update={"serve": config.serve.model_copy(update={"engines": ()})})
        kind = options.engine or config.serve.engine
        own = EngineUnderTest(project, config, quantization, kind)
        origin = EngineOrigin(base.digest, quantization, own.precision, own.versions, own.device)
        adapters = {adapter_digest(folder): folder for folder in folders.values()}
        spec = EngineSpec(base, project.chat, quantization, adapters, spare=config.serve.spare_adapters)
        self.engine = start_engine(kind, config, spec, project.reporter)
        self.app = EngineApp(self.engine, origin, locate, grammar_compiler(project.chat)).app
        self._address = options.host, options.port
        self._limits = config.gateway
        self._say = project.reporter.say

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Answer until Ctrl-C or SIGTERM; ``on_ready`` is called with the address."""
        try:
            serve(self.app, *self._address, self._limits, on_ready=on_ready, say=self._say)
        finally:
            self.engine.stop()


LEASE_S = 60.0
"""A gateway asks for the facts every 5 seconds, so this is far more than a gap between two."""
UNLOAD_S = 10.0
"""The longest time that the engine may take to notice that an aborted request no longer needs its adapter."""
_UNLOAD_PAUSE_S = 0.05
_CONSTRAINTS = 32

log = logging.getLogger("tunewright")


@dataclass(frozen=True)
class EngineOrigin:
    """The origin of an engine's answers, besides the request: see :class:`tunewright.engines.remote.EngineFacts`."""

    base: str
    quantization: str
    precision: str
    versions: Mapping[str, str]
    device: str


class EngineApp:
    """One engine behind five routes, for gateways on other machines: the other side of ``engines/remote``.

    An engine knows no tenants, so only a gateway may ask it: every route but ``/health`` needs the shared
    secret, if there is one. A request names an adapter by its digest; the files come from the engine's
    own project and must match it. Several gateways may share an engine. It keeps an adapter until the
    last gateway that loaded it has unloaded it, or has not been heard from for :data:`LEASE_S` seconds.
    """

    def __init__(
        self,
        engine: Engine,
        origin: EngineOrigin,
        locate: Callable[[str, str], Path],
        compiler: GrammarCompiler,
    ) -> None:
        self._engine = engine
        self._origin = origin
        self._locate = locate
        self._constraint = lru_cache(_CONSTRAINTS)(lambda rule: compiler.compile(Grammar(rule)))
        self._token = os.environ.get(TOKEN) or None
        self._instance = secrets.token_hex(8)
        self._heard: dict[str, float] = {}
        """The time of each gateway's last request, in seconds that never go back."""
        self._forgetting: asyncio.Task[None] | None = None
        self._users: dict[str, set[str]] = {}
        """The gateways of each adapter."""
        methods = {"answer": self._answer, "load": self._load, "unload": self._unload}
        routes = [
            Route(f"{FACTS}/{name}", self._events_of(method), methods=["POST"]) for name, method in methods.items()
        ]
        self.app = Starlette(routes=[Route("/health", self._health), Route(FACTS, self._facts), *routes])

    @property
    def facts(self) -> EngineFacts:
        """The description that gateways ask for."""
        engine = self._engine
        return EngineFacts(
            protocol=PROTOCOL,
            instance=self._instance,
            engine=engine.name,
            **vars(self._origin),
            max_num_seqs=engine.max_num_seqs,
            context_length=engine.context_length,
            prefill_tokens=engine.prefill_tokens,
            unsupported=tuple(sorted(engine.unsupported)),
            stopped=engine.stopped,
        )

    async def _health(self, _http: HttpRequest) -> Response:
        """Answer 503 once the engine has to be started again from outside."""
        stopped = self._engine.stopped if self._engine.permanently_stopped else None
        return PlainTextResponse(stopped or "ok", status_code=503 if stopped else 200)

    async def _facts(self, http: HttpRequest) -> Response:
        if not self._admits(http):
            return Response(status_code=401)
        if self._forgetting is None or self._forgetting.done():
            self._forgetting = asyncio.create_task(self._forget_lost_gateways())
        return JSONResponse(asdict(self.facts))

    def _events_of(self, method: Callable[[str, Event], AsyncGenerator[Event, None]]) -> Callable[[HttpRequest], Any]:
        """Return a route that answers with a line for each event; starlette ends it when the gateway disconnects."""

        async def lines(gateway: str, body: Event) -> AsyncIterator[str]:
            async with aclosing(method(gateway, body)) as events:
                async for event in events:
                    yield json.dumps(event) + "\n"

        async def route(http: HttpRequest) -> Response:
            if not self._admits(http):
                return Response(status_code=401)
            try:
                gateway, body = http.headers[GATEWAY], json.loads(await http.body())
            except (KeyError, ValueError, RecursionError):
                return Response(status_code=400)
            return StreamingResponse(lines(gateway, body), media_type="application/x-ndjson")

        return route

    def _admits(self, http: HttpRequest) -> bool:
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        admitted = self._token is None or hmac.compare_digest(given.encode(), self._token.encode())
        if admitted and (gateway := http.headers.get(GATEWAY)):
            self._heard[gateway] = time.monotonic()
        return admitted

    async def _answer(self, _gateway: str, body: Event) -> AsyncGenerator[Event, None]:
        """Yield the events of a request; closing the generator aborts it."""
        try:
            request = await self._request(body)
            async with aclosing(stream(self._engine, request, tenant=body["tenant"])) as deltas:
                async for delta in deltas:
                    logprobs = [[each.logprob, each.top] for each in delta.logprobs]
                    yield {"ids": delta.ids, "finish": delta.finish, "logprobs": logprobs}
        except (RequestFailedError, EngineStoppedError) as error:
            yield failure(error)
        except Exception as error:  # the gateway must not mistake a request that fails here for a lost engine
            log.exception("failed to answer a request")
            reason = error.what if isinstance(error, UserError) else type(error).__name__
            yield failure(RequestFailedError(f"The engine could not take this request: {reason}"))

    async def _load(self, gateway: str, body: Event) -> AsyncGenerator[Event, None]:
        """Load an adapter of this project; yield one event."""

        async def load() -> None:
            folder = await asyncio.to_thread(self._locate, body["name"], body["digest"])
            users = self._users.setdefault(body["digest"], set())
            users.add(gateway)  # first, so that another gateway's unload does not free it meanwhile
            try:
                await self._engine.load(body["digest"], folder)
            except BaseException:
                users.discard(gateway)
                raise

        yield await _changed(load())

    async def _unload(self, gateway: str, body: Event) -> AsyncGenerator[Event, None]:
        """Unload an adapter, unless another gateway needs it; yield one event."""
        yield await _changed(self._release(body["digest"], gateway))

    async def _release(self, digest: str, gateway: str) -> None:
        users = self._users.get(digest, set())
        users.discard(gateway)
        until = time.monotonic() + UNLOAD_S
        while not users:
            try:
                await self._engine.unload(digest)
                return
            except AdapterFailedError:  # an aborted request may be in its last pass
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(_UNLOAD_PAUSE_S)

    async def _forget_lost_gateways(self) -> None:
        """Free the adapters of gateways that ended without notice."""
        for gateway in list(self._heard):
            if time.monotonic() - self._heard[gateway] <= LEASE_S:
                continue
            del self._heard[gateway]
            for digest in [digest for digest, users in self._users.items() if gateway in users]:
                with suppress(AdapterFailedError, EngineStoppedError):  # still in use, or gone with the engine
                    await self._release(digest, gateway)

    async def _request(self, body: Event) -> Request:
        rule = body["constraint"]
        constraint = None if rule is None else await asyncio.to_thread(self._constraint, rule)
        own = {name: value for name, value in body.items() if name not in ("tenant", "constraint")}
        own["prompt_ids"] = tuple(own["prompt_ids"])
        own["logit_bias"] = tuple((token, bias) for token, bias in own["logit_bias"])
        return Request(**own, constraint=constraint)


async def _changed(change: Awaitable[None]) -> Event:
    try:
        await change
    except (UserError, AdapterFailedError, EngineStoppedError) as error:
        return failure(error)
    except Exception as error:  # the gateway must not mistake a change that fails here for a lost engine
        log.exception("failed to change the adapters")
        return failure(AdapterFailedError(f"The engine could not change its adapters: {error}"))
    return {}
