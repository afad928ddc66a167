"""The gateway's ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunewright.config import GatewayConfig
from tunewright.core import tracing
from tunewright.engines.pool import EnginePool
from tunewright.engines.protocol import Engine, EngineStoppedError, RequestFailedError
from tunewright.serving.gateway.auth import model_not_found
from tunewright.serving.gateway.errors import AnyError, ApiError, as_api_error, parse_request
from tunewright.serving.gateway.fair_scheduler import AdmissionQueue
from tunewright.serving.gateway.messages_api import MessagesFormat, MessagesRequest, error_document
from tunewright.serving.gateway.metrics import Metrics, ServerState
from tunewright.serving.gateway.preprocess import RequestPreprocessor, Tokenization
from tunewright.serving.gateway.recorder import Received
from tunewright.serving.gateway.request import GenerationRequest
from tunewright.serving.gateway.request_handler import RequestHandler, Shadows
from tunewright.serving.gateway.responses import (
    FLUSH_SECONDS,
    ChatCompletionResponse,
    CompletionResponse,
    EventStreamResponse,
    ResponseFormat,
    cancel_on_disconnect,
    read_body,
    sse_events,
)
from tunewright.serving.gateway.responses_api import ResponsesFormat, ResponsesRequest
from tunewright.serving.gateway.schemas import (
    MAX_FEEDBACK_BYTES,
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    RequestBody,
)
from tunewright.serving.gateway.tenant_auth import Auth, Principal, TenantPrincipal
from tunewright.serving.tenants.database import StateUnavailableError

log = logging.getLogger("tunewright")

_MESSAGES = "/v1/messages"
_FEEDBACK = "/v1/feedback"
ADAPTER_HEADER = "x-tunewright-adapter"
SYSTEM_HEADER = "x-tunewright-system"
RECORD_HEADER = "x-tunewright-record"
"""In a request: any value but "on" forbids to record it; "on" permits nothing by itself."""

_FORMATS: Mapping[str, tuple[type[ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest], Any]] = {
    "/v1/chat/completions": (ChatRequest, ChatCompletionResponse),
    "/v1/completions": (CompletionRequest, CompletionResponse),
    "/v1/responses": (ResponsesRequest, ResponsesFormat),
    _MESSAGES: (MessagesRequest, MessagesFormat),
}
"""The body of each route, and the format of its response, which is made from the body."""
ROUTES = (
    *(f"POST {path}" for path in (*_FORMATS, _FEEDBACK)),
    *(f"GET {path}" for path in ("/v1/models", "/v1/models/NAME", "/ready", "/health")),
)


class Gateway:
    """The server as an ASGI application, ``app``, with its graceful shutdown."""

    def __init__(
        self,
        engine: Engine,
        auth: Auth,
        tokenization: Tokenization,
        limits: GatewayConfig,
    ) -> None:
        self._engine = engine
        self._auth = auth
        self._limits = limits
        self._preprocessor = RequestPreprocessor(tokenization, limits, engine)
        self._pool = engine if isinstance(engine, EnginePool) else None
        self._queue = AdmissionQueue(engine.max_num_seqs, engine.prefill_tokens, self._engines)
        self._shadows = Shadows(engine, self._queue, self._preprocessor)
        self._in_flight = 0
        self._handlers: set[RequestHandler] = set()
        self._draining = False
        self.metrics = Metrics(self._now)
        self.app = self._application()

    def drain(self) -> None:
        """Refuse further requests; requests in progress continue. Safe to call in a signal handler."""
        self._draining = True

    @property
    def in_flight(self) -> int:
        """The number of requests that have arrived and are not yet answered."""
        return self._in_flight

    def abort(self) -> None:
        """End the requests in progress; their clients receive an error."""
        for handler in self._handlers:
            handler.abort(_shutting_down())

    def _now(self) -> ServerState:
        """Return the state for Prometheus, whose thread reads copies only."""
        handlers = self._handlers.copy()
        return ServerState(
            ready=not self._draining and self._engine.stopped is None and self._auth.available,
            waiting=[handler.requests[0].tenant for handler in handlers if handler.waiting],
            running=[handler.requests[0].tenant for handler in handlers if not handler.waiting],
            released=self._auth.released,
            resident=self._auth.resident if self._pool is None else self._pool.resident,
            records=self._auth.recorder.counts if self._auth.recorder is not None else None,
            engines=() if self._pool is None else self._pool.engines,
        )

    @property
    def _engines(self) -> int:
        """The number of engines that compute at the same time, at least 1."""
        return 1 if self._pool is None else max(1, len(self._pool.up))

    def _application(self) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),  # a base's name may contain slashes
            *(Route(path, partial(self._answer, path=path), methods=["POST"]) for path in _FORMATS),
            Route(_FEEDBACK, self._feedback, methods=["POST"]),
            Route("/v1/embeddings", _no_embeddings, methods=["POST"]),
        ]
        error_handlers: dict[Any, Any] = {
            HTTPException: _unknown_route,
            **dict.fromkeys(get_args(AnyError), _error_response),
        }

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            async with self._auth.running(self.metrics.keep):
                yield
                await self._shadows.close()
                await self._preprocessor.close()

        app = Starlette(routes=routes, exception_handlers=error_handlers, lifespan=lifespan)
        app.router.redirect_slashes = False  # a redirect would go to the address in the request's Host header
        return app

    async def _health(self, _http: HttpRequest) -> Response:
        """Report liveness: 503 only once the engine needs a restart from outside."""
        if self._engine.permanently_stopped:
            return JSONResponse({"status": "stopped", "reason": self._engine.stopped}, 503)
        status: dict[str, Any] = {"status": "ok"}
        if self._auth.reports_load:
            running, waiting = self._engine.in_flight
            status |= {"running": running, "waiting": waiting + self._queue.waiting}
        return JSONResponse(status)

    async def _ready(self, _http: HttpRequest) -> Response:
        """Report readiness: 200 if a request would be answered now. A server that is loading does not listen yet."""
        if self._draining:
            return JSONResponse({"status": "draining"}, 503)
        if self._engine.stopped:
            return JSONResponse({"status": "stopped", "reason": self._engine.stopped}, 503)
        if not self._auth.available:
            return JSONResponse({"status": "unavailable", "reason": "The serving state does not answer."}, 503)
        return JSONResponse({"status": "ready"})

    async def _models(self, http: HttpRequest) -> Response:
        principal = await self._authenticate(http)
        async with principal.counting():
            return JSONResponse({"object": "list", "data": [_model_document(name) for name in principal.models()]})

    async def _model(self, http: HttpRequest) -> Response:
        principal = await self._authenticate(http)
        async with principal.counting():
            name = http.path_params["name"]
            if name not in principal.models():
                raise model_not_found(name, principal.models())
            return JSONResponse(_model_document(name))

    async def _feedback(self, http: HttpRequest) -> Response:
        principal = await self._authenticate(http)
        if not isinstance(principal, TenantPrincipal):
            message = (
                "Feedback needs a server with tenants, which stores requests. Add a tenant with "
                "`tunewright tenant add` and restart the server."
            )
            raise ApiError(message, status=404, code="feedback_not_supported")
        async with principal.counting():
            body = await read_body(http, MAX_FEEDBACK_BYTES, self._limits.body_timeout_s)
            feedback = parse_request(FeedbackRequest, body)
            return JSONResponse(await principal.auth.record_feedback(principal.caller.tenant_id, feedback))

    async def _authenticate(self, http: HttpRequest) -> Principal:
        # Anthropic's clients send their key as x-api-key.
        keys = (f"Bearer {key}" for key in http.headers.getlist("x-api-key"))
        authorization = [*http.headers.getlist("authorization"), *keys]
        if len(authorization) > 1:  # a proxy may have checked another header
            message = "Several Authorization or x-api-key headers: send one of them, once."
            raise ApiError(message, code="duplicate_authorization")
        return await self._auth.authenticate(authorization[0] if authorization else None)

    async def _answer(self, http: HttpRequest, path: str) -> Response:
        self._in_flight += 1
        streaming = False
        with tracing.request(f"{http.method} {http.url.path}", http.headers) as span:
            try:
                response = await self._respond(http, path, span)
                streaming = isinstance(response, EventStreamResponse)
                span.set({"http.response.status_code": response.status_code})
                return response
            except (ApiError, RequestFailedError, EngineStoppedError, StateUnavailableError) as error:
                refusal = as_api_error(error)
                span.set({"http.response.status_code": refusal.status, "error.type": refusal.code})
                raise
            finally:
                if not streaming:  # a stream ends later, and counts itself out
                    self._in_flight -= 1
                    span.end()

    async def _respond(self, http: HttpRequest, path: str, span: tracing.Span) -> Response:
        arrived = asyncio.get_running_loop().time()
        handler, response_format = await self._admit(http, path, arrived)
        first = handler.requests[0]
        headers = {ADAPTER_HEADER: first.target.digest or "none", SYSTEM_HEADER: first.system_source}
        if first.body.stream:
            return await self._stream(http, handler, response_format, headers, arrived, span)
        try:
            usage = await cancel_on_disconnect(http, handler.complete())
        finally:
            self._end(handler, span)
        if usage is None:
            return Response(status_code=499)  # not read by anyone: the client has disconnected
        return JSONResponse(response_format.response(handler.requests, usage), headers=headers)

    async def _admit(self, http: HttpRequest, path: str, arrived: float) -> tuple[RequestHandler, ResponseFormat]:
        """Authenticate, parse, tokenize and reserve quota."""
        tenant = ""
        try:
            principal = await self._authenticate(http)
            tenant = principal.name
            if self._draining:
                raise _shutting_down()
            async with principal.counting():
                raw = await read_body(http, self._preprocessor.body_bytes, self._limits.body_timeout_s)
                kind, make_format = _FORMATS[path]
                asked = parse_request(kind, raw)
                response_format: ResponseFormat = make_format(asked)
                body = asked if isinstance(asked, ChatRequest | CompletionRequest) else asked.as_chat()
                # Nothing may be awaited between this and admit(): a release could take the adapter away.
                requests = await self._preprocess(body, principal, arrived)
                if self._engine.stopped:
                    raise EngineStoppedError(self._engine.stopped)
                self._queue.resize(self._engine.max_num_seqs, self._engines)  # an engine may have stopped
                tokens = sum(request.prompt_tokens + request.engine_request.max_new_tokens for request in requests)
                response_id = response_format.response_id
                received, recorded = Received(path, raw, body), _may_record(http)
                admission = await principal.admit(requests[0].target, tokens, response_id, received, recorded=recorded)
        except (ApiError, EngineStoppedError, StateUnavailableError) as error:
            self.metrics.refused(tenant, as_api_error(error).code or "")
            raise
        handler = RequestHandler(requests, admission, self._engine, self._queue)
        self._handlers.add(handler)
        return handler, response_format

    async def _preprocess(self, body: RequestBody, principal: Principal, arrived: float) -> list[GenerationRequest]:
        """Tokenize the prompts; again if a release has changed the system prompt or the constraint meanwhile."""
        target = principal.target(body)  # an unknown model is refused before the prompt costs any time
        self._preprocessor.require_supported(body)
        while True:
            constraint = await self._preprocessor.constraint(body, target.grammar, principal.name)
            prompts = await self._preprocessor.prompts(body, principal.name, target.system_prompt)
            tokenized_for, target = target, principal.target(body)
            if (target.system_prompt, target.grammar) == (tokenized_for.system_prompt, tokenized_for.grammar):
                break
        answers = [(prompt, choice) for prompt in prompts for choice in range(body.choices)]
        limit = None if principal.max_tokens is None else principal.max_tokens // len(answers)
        return [
            self._preprocessor.request(
                body,
                target,
                prompt,
                tenant=principal.name,
                arrived=arrived,
                max_tokens=limit,
                choice=choice,
                constraint=constraint,
            )
            for prompt, choice in answers
        ]

    async def _stream(
        self,
        http: HttpRequest,
        handler: RequestHandler,
        response_format: ResponseFormat,
        headers: dict[str, str],
        arrived: float,
        span: tracing.Span,
    ) -> Response:
        """Return a stream once there is something to send, so that an earlier failure has its own HTTP status."""
        chunks = handler.chunks()
        try:
            first = await cancel_on_disconnect(http, anext(chunks))
        except BaseException:
            self._end(handler, span)
            raise
        if first is None:
            self._end(handler, span)
            return Response(status_code=499)

        async def on_end() -> None:
            await chunks.aclose()
            self._end(handler, span)
            self._in_flight -= 1
            span.end()

        until = arrived + self._limits.total_timeout_s + FLUSH_SECONDS
        events = sse_events(first, chunks, handler, response_format)
        return EventStreamResponse(events, headers, until=until, on_end=on_end)

    def _end(self, handler: RequestHandler, span: tracing.Span) -> None:
        self._handlers.discard(handler)
        usage = handler.settle()
        tenant, target = handler.requests[0].tenant, handler.requests[0].target
        if usage is not None:
            if handler.admission.record is not None:
                handler.admission.record([request.answer for request in handler.requests])
            self.metrics.settled(tenant, target.name, usage)
            span.set(
                {
                    "gen_ai.request.model": target.name,
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "tunewright.tenant": tenant,
                    "tunewright.adapter": target.digest,
                    "tunewright.outcome": usage.outcome,
                    "tunewright.first_token_s": usage.first_token_s,
                }
            )
            if usage.outcome in ("failed", "timed out"):
                span.fail(usage.outcome)
        self._shadows.start(handler)


async def _no_embeddings(_http: HttpRequest) -> Response:
    message = (
        "This server generates text and has no embeddings. Serve an embedding model on another server, for example "
        "with vLLM (--runner pooling) or Text Embeddings Inference, and use its base URL for embeddings."
    )
    raise ApiError(message, status=404, code="embeddings_not_supported")


def _may_record(http: HttpRequest) -> bool:
    return all(value.strip().lower() == "on" for value in http.headers.getlist(RECORD_HEADER))


def _model_document(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tunewright"}


def _shutting_down() -> ApiError:
    headers = {"Retry-After": "1", "Connection": "close"}
    return ApiError("The server is shutting down.", status=503, code="shutting_down", headers=headers)


async def _error_response(http: HttpRequest, error: AnyError) -> Response:
    found = as_api_error(error)
    body = error_document(found) if http.url.path.startswith(_MESSAGES) else found.body
    return JSONResponse(body, found.status, headers=found.headers)


async def _unknown_route(http: HttpRequest, error: HTTPException) -> Response:
    message = f"{http.method} {http.url.path}: {error.detail}. Routes: {', '.join(ROUTES)}."
    return await _error_response(
        http, ApiError(message, status=error.status_code, code="unknown_route", headers=error.headers)
    )
