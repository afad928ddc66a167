"""The HTTP face of the gateway: ``/health``, ``/v1/models``, ``/v1/chat/completions``, and nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tunewright.data.examples import Message
from tunewright.errors import UserError
from tunewright.models.decoding import Request
from tunewright.models.text_stream import Decode
from tunewright.serving.access import Access, Target
from tunewright.serving.answering import Answering, Order
from tunewright.serving.engines.protocol import Engine, EngineStoppedError, RequestFailedError
from tunewright.serving.fairness import FairQueue
from tunewright.serving.protocol import ApiError, ChatRequest, Envelope, parse_request
from tunewright.serving.shadows import Shadows
from tunewright.serving.state import StateUnavailableError

log = logging.getLogger("tunewright")

Render = Callable[[Sequence[Message]], tuple[int, ...]]

T = TypeVar("T")

ADAPTER_HEADER = "x-tunewright-adapter"
MAX_BODY = 1 << 20  # bytes; some 250,000 tokens of English


def create_app(
    engine: Engine, access: Access, *, render: Render, decode: Decode, stops: Sequence[str] = ()
) -> Starlette:
    """The server as an ASGI application.

    Args:
        engine: answers, by an adapter's digest; the caller stops it when the server has ended.
        access: who may ask for what.
        render: from messages to prompt ids with the base's chat template: the function that training
            uses. A UserError from it is answered with 400.
        decode: from answer ids to text, special tokens left out.
        stops: texts that end every answer, beside those that a request names.
    """
    gateway = _Gateway(engine, access, render, decode, stops)
    routes = [
        Route("/health", gateway.health),
        Route("/v1/models", gateway.models),
        Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        HTTPException: _http_error,
        RequestFailedError: _engine_error,
        EngineStoppedError: _engine_error,
        StateUnavailableError: _state_error,
    }

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with access.running():
            yield
            await gateway.shadows.close()

    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


class _Gateway:
    def __init__(self, engine: Engine, access: Access, render: Render, decode: Decode, stops: Sequence[str]) -> None:
        self._engine = engine
        self._access = access
        self._queue = FairQueue(engine.max_batch)
        self.shadows = Shadows(engine, self._queue, decode)
        self._render = render
        self._decode = decode
        self._stops = tuple(stops)

    async def health(self, _http: HttpRequest) -> Response:
        if self._engine.stopped:
            return JSONResponse({"status": "stopped", "reason": self._engine.stopped}, 503)
        if not self._access.tells_load:
            return JSONResponse({"status": "ok"})
        running, waiting = self._engine.under_way
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting + self._queue.waiting})

    async def models(self, http: HttpRequest) -> Response:
        visitor = await self._access.enter(http.headers.get("authorization"))
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "tunewright"} for name in visitor.models()]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, http: HttpRequest) -> Response:
        arrived = time.monotonic()
        visitor = await self._access.enter(http.headers.get("authorization"))
        chat = parse_request(await _body(http))
        # Nothing may be awaited between target and admit: a release could take the adapter away.
        order = self._check(chat, visitor.target(chat))
        if self._engine.stopped:
            raise EngineStoppedError(self._engine.stopped)
        most = len(order.request.prompt_ids) + order.request.max_new_tokens
        admission = await visitor.admit(order.target, most)
        answering = Answering(self._engine, self._queue, self._decode, order, admission, visitor.name, arrived)
        envelope = Envelope(order.target.name)
        headers = {ADAPTER_HEADER: order.target.digest or "none"}
        if chat.stream:
            return _Stream(_events(answering, envelope), headers, on_end=lambda: self._end(answering))
        try:
            answer = await _unless_hung_up(http, answering.answer())
        finally:
            self._end(answering)
        if answer is None:
            return Response(status_code=499)  # nobody reads it: the client has hung up
        text, last = answer
        assert last.finish is not None
        return JSONResponse(envelope.completion(text, last.finish, order.usage(last)), headers=headers)

    def _end(self, answering: Answering) -> None:
        answering.settle()
        self.shadows.ask(answering)

    def _check(self, chat: ChatRequest, target: Target) -> Order:
        try:
            # On the event loop, one after the other: tokenizers are not made for several threads, and a body's size
            # is bounded.
            prompt = self._render([message.as_message() for message in chat.messages])
        except UserError as error:
            raise ApiError(str(error), param="messages", code="invalid_messages") from error
        context = self._engine.context_length
        limit = chat.token_limit or max(1, context - len(prompt))
        if len(prompt) + limit > context:
            message = (
                f"The context has room for {context} tokens; the messages are {len(prompt)} tokens"
                f" and the answer may have {limit}."
            )
            raise ApiError(message, param="messages", code="context_length_exceeded")
        request = Request(
            prompt,
            target.digest,
            max_new_tokens=limit,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.seed,
        )
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        return Order(target, request, (*self._stops, *(chat.stop or ())), include_usage)


class _Stream(StreamingResponse):
    """An answer as server-sent events. ``on_end`` is called however it ends, also if it never begins."""

    def __init__(
        self, events: AsyncGenerator[str, None], headers: dict[str, str], *, on_end: Callable[[], None]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _events(answering: Answering, envelope: Envelope) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; a failure on the way is the last of them."""
    try:
        yield _event(envelope.chunk({"role": "assistant", "content": ""}))
        async with aclosing(answering.pieces()) as pieces:
            async for piece in pieces:
                if piece.text:
                    yield _event(envelope.chunk({"content": piece.text}))
                if piece.finish:
                    yield _event(envelope.chunk({}, piece.finish))
                    if answering.order.include_usage:
                        yield _event(envelope.usage_chunk(answering.order.usage(piece)))
        yield "data: [DONE]\n\n"
    except (RequestFailedError, EngineStoppedError) as error:
        yield _event(_as_api_error(error).body)


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _body(http: HttpRequest) -> bytes:
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ApiError(f"The body is over {MAX_BODY} bytes.", status=413, code="body_too_large")
    return body


async def _unless_hung_up(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """The work's result, or None (and the work cancelled) once the client has closed the connection."""

    async def hung_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        doing.cancel()
        watching.cancel()


def _as_api_error(error: RequestFailedError | EngineStoppedError) -> ApiError:
    if isinstance(error, EngineStoppedError):
        return ApiError(str(error), status=503, code="engine_stopped")
    return ApiError(str(error), status=500, code="request_failed")


async def _api_error(_http: HttpRequest, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _engine_error(_http: HttpRequest, error: RequestFailedError | EngineStoppedError) -> Response:
    refusal = _as_api_error(error)
    return JSONResponse(refusal.body, refusal.status)


async def _state_error(_http: HttpRequest, error: StateUnavailableError) -> Response:
    log.warning("a request is refused: %s", error)
    refusal = ApiError("Keys and limits cannot be looked up now.", status=503, code="state_unavailable")
    return JSONResponse(refusal.body, refusal.status)


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    message = f"{http.method} {http.url.path}: {error.detail}."
    return JSONResponse(ApiError(message, status=error.status_code).body, error.status_code, headers=error.headers)
