"""The gateway's ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunewright.config import GatewayConfig
from tunewright.engines.protocol import Engine, EngineStoppedError, RequestFailedError
from tunewright.serving.access import Access, Target, Visitor, model_not_found
from tunewright.serving.answering import Answering
from tunewright.serving.choices import Choices
from tunewright.serving.envelopes import ChatEnvelope, CompletionEnvelope, Envelope
from tunewright.serving.fairness import FairQueue
from tunewright.serving.metrics import Metrics, Now
from tunewright.serving.orders import Order, Orders, Texts
from tunewright.serving.protocol import AnyRequest, ApiError, ChatRequest, CompletionRequest, parse_request
from tunewright.serving.sending import FAREWELL_SECONDS, Stream, as_api_error, events, read_body, unless_hung_up
from tunewright.serving.shadows import Shadows
from tunewright.serving.state import StateUnavailableError

log = logging.getLogger("tunewright")

ROUTES = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/NAME",
    "GET /ready",
    "GET /health",
)
ADAPTER_HEADER = "x-tunewright-adapter"
SYSTEM_HEADER = "x-tunewright-system"


class Gateway:
    """The server as an ASGI application, ``app``, and what ends it in good order.

    Args:
        engine: answers, by an adapter's digest; the caller stops it when the server has ended.
        access: who may ask for what.
        texts: between text and token ids.
        limits: how large a request may be, and how long it may take.
    """

    def __init__(self, engine: Engine, access: Access, texts: Texts, limits: GatewayConfig) -> None:
        self._engine = engine
        self._access = access
        self._texts = texts
        self._limits = limits
        self._orders = Orders(texts, limits, engine.context_length)
        self._queue = FairQueue(engine.max_batch)
        self._shadows = Shadows(engine, self._queue, self._orders, texts.decode, limits)
        self._entered = 0
        self._answering: set[Choices] = set()
        self._draining = False
        self.metrics = Metrics(self._now)
        self.app = self._application()

    def drain(self) -> None:
        """Take no further requests; those under way go on. Safe in a signal's handler."""
        self._draining = True

    @property
    def under_way(self) -> int:
        """Requests that have come and are not answered."""
        return self._entered

    def abandon(self) -> None:
        """End what is under way; who waits for it is told."""
        for choices in self._answering:
            choices.abandon(_shutting_down())

    def _now(self) -> Now:
        """For Prometheus; read from another thread, and so from copies."""
        under_way = self._answering.copy()
        return Now(
            ready=not self._draining and self._engine.stopped is None,
            waiting=[choices.tenant for choices in under_way if choices.waits],
            answering=[choices.tenant for choices in under_way if not choices.waits],
            released=self._access.released,
            resident=self._access.resident,
        )

    def _application(self) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),  # a base's name may have slashes
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            HTTPException: _http_error,
            RequestFailedError: _api_error,
            EngineStoppedError: _api_error,
            StateUnavailableError: _api_error,
        }

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            async with self._access.running():
                yield
                await self._shadows.close()

        return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)

    async def _health(self, _http: HttpRequest) -> Response:
        """Return whether the process is to be left alone: an engine that starts again by itself needs nobody."""
        if self._engine.dead:
            return JSONResponse({"status": "stopped", "reason": self._engine.stopped}, 503)
        status: dict[str, Any] = {"status": "ok"}
        if self._access.tells_load:
            running, waiting = self._engine.under_way
            status |= {"running": running, "waiting": waiting + self._queue.waiting}
        return JSONResponse(status)

    async def _ready(self, _http: HttpRequest) -> Response:
        """Return whether a request that came now would be answered. While the server loads, nothing listens yet."""
        if self._draining:
            return JSONResponse({"status": "draining"}, 503)
        if self._engine.stopped:
            return JSONResponse({"status": "stopped", "reason": self._engine.stopped}, 503)
        return JSONResponse({"status": "ready"})

    async def _models(self, http: HttpRequest) -> Response:
        visitor = await self._access.enter(http.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [_model_document(name) for name in visitor.models()]})

    async def _model(self, http: HttpRequest) -> Response:
        visitor = await self._access.enter(http.headers.get("authorization"))
        name = http.path_params["name"]
        if name not in visitor.models():
            raise model_not_found(name, visitor)
        return JSONResponse(_model_document(name))

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, ChatRequest)

    async def _completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, CompletionRequest)

    async def _answer(self, http: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        self._entered += 1
        handed_over = False
        try:
            response = await self._respond(http, kind)
            handed_over = isinstance(response, Stream)
            return response
        finally:
            if not handed_over:
                self._entered -= 1

    async def _respond(self, http: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        arrived = asyncio.get_running_loop().time()
        asked, choices = await self._let_in(http, kind, arrived)
        target = choices.target
        headers = {ADAPTER_HEADER: target.digest or "none", SYSTEM_HEADER: choices.system_source}
        envelope: Envelope = (ChatEnvelope if kind is ChatRequest else CompletionEnvelope)(target.name)
        if asked.stream:
            return await self._streamed(http, choices, envelope, headers, arrived)
        try:
            answered = await unless_hung_up(http, choices.answers())
        finally:
            self._end(choices)
        if answered is None:
            return Response(status_code=499)  # nobody reads it: the client has hung up
        return JSONResponse(envelope.whole(*answered), headers=headers)

    async def _let_in(
        self, http: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest], arrived: float
    ) -> tuple[AnyRequest, Choices]:
        who = ""
        try:
            visitor = await self._access.enter(http.headers.get("authorization"))
            who = visitor.name
            if self._draining:
                raise _shutting_down()
            asked = parse_request(kind, await read_body(http, self._orders.body_bytes, self._limits.body_timeout_s))
            # Nothing may be awaited between this and admit: a release could take the adapter away.
            target, orders = await self._render(asked, visitor)
            if self._engine.stopped:
                raise EngineStoppedError(self._engine.stopped)
            most = sum(len(order.request.prompt_ids) + order.request.max_new_tokens for order in orders)
            admission = await visitor.admit(target, most, asked.end_user)
        except (ApiError, EngineStoppedError, StateUnavailableError) as error:
            self.metrics.refused(who, _refusal(error).code or "")
            raise
        answering = [
            Answering(self._engine, self._queue, self._texts.decode, order, self._limits, who, arrived)
            for order in orders
        ]
        choices = Choices(answering, admission, self._engine.max_batch, asked.include_usage)
        self._answering.add(choices)
        return asked, choices

    async def _render(self, asked: AnyRequest, visitor: Visitor) -> tuple[Target, list[Order]]:
        """Render a request's prompts; again where a release has changed the system prompt meanwhile."""
        target = visitor.target(asked)  # what is not there is not worth the time that the prompt takes
        while True:
            prompts = await self._orders.prompts(asked, visitor.name, target.system_prompt)
            rendered_for, target = target, visitor.target(asked)
            if target.system_prompt == rendered_for.system_prompt:
                share = None if visitor.most_tokens is None else visitor.most_tokens // len(prompts)
                return target, [self._orders.order(asked, target, prompt, share) for prompt in prompts]

    async def _streamed(
        self, http: HttpRequest, choices: Choices, envelope: Envelope, headers: dict[str, str], arrived: float
    ) -> Response:
        """Return a stream, once there is something to send: what fails before is told by its status."""
        pieces = choices.pieces()
        try:
            first = await unless_hung_up(http, anext(pieces))
        except BaseException:
            self._end(choices)
            raise
        if first is None:
            self._end(choices)
            return Response(status_code=499)

        async def on_end() -> None:
            await pieces.aclose()
            self._end(choices)
            self._entered -= 1

        until = arrived + self._limits.total_timeout_s + FAREWELL_SECONDS
        return Stream(events(first, pieces, choices, envelope), headers, until=until, on_end=on_end)

    def _end(self, choices: Choices) -> None:
        self._answering.discard(choices)
        used = choices.settle()
        if used is not None:
            self.metrics.settled(choices.tenant, choices.target.name, used)
        self._shadows.ask(choices)


def _model_document(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tunewright"}


def _shutting_down() -> ApiError:
    headers = {"Retry-After": "1", "Connection": "close"}
    return ApiError("The server is shutting down.", status=503, code="shutting_down", headers=headers)


def _refusal(error: ApiError | RequestFailedError | EngineStoppedError | StateUnavailableError) -> ApiError:
    """Return what a client is told."""
    if isinstance(error, StateUnavailableError):
        return ApiError("Keys and limits cannot be looked up now.", status=503, code="state_unavailable")
    return as_api_error(error)


async def _api_error(
    _http: HttpRequest, error: ApiError | RequestFailedError | EngineStoppedError | StateUnavailableError
) -> Response:
    if isinstance(error, StateUnavailableError):
        log.warning("a request is refused: %s", error)
    refusal = _refusal(error)
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    message = f"{http.method} {http.url.path}: {error.detail}. The routes are {', '.join(ROUTES)}."
    refusal = ApiError(message, status=error.status_code, code="unknown_route")
    return JSONResponse(refusal.body, error.status_code, headers=error.headers)
