"""The HTTP face of the engine: ``/health``, ``/v1/models``, ``/v1/chat/completions``, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tunewright.data.examples import Message
from tunewright.errors import UserError
from tunewright.models.decoding import Finish, Request
from tunewright.models.text_stream import Decode, TextStream
from tunewright.serving.engine import Engine, EngineStoppedError, RequestFailedError, ServedModel
from tunewright.serving.protocol import ApiError, ChatRequest, Envelope, Usage, parse_request

Render = Callable[[Sequence[Message]], tuple[int, ...]]

T = TypeVar("T")

ADAPTER_HEADER = "x-tunewright-adapter"
MAX_BODY = 1 << 20  # bytes; some 250,000 tokens of English


def create_app(engine: Engine, *, render: Render, decode: Decode, stops: Sequence[str] = ()) -> Starlette:
    """The server as an ASGI application.

    Args:
        engine: answers; the caller stops it when the server has ended.
        render: from messages to prompt ids with the base's chat template: the function that training
            uses. A UserError from it is answered with 400.
        decode: from answer ids to text, special tokens left out.
        stops: texts that end every answer, beside those that a request names.
    """
    service = _Service(engine, render, decode, stops)
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        HTTPException: _http_error,
        RequestFailedError: _engine_error,
        EngineStoppedError: _engine_error,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


@dataclass(frozen=True)
class _Piece:
    """Some text of an answer; the last piece (``finish`` set) may be empty."""

    text: str
    finish: Finish | None
    tokens: int  # generated so far


@dataclass(frozen=True)
class _Order:
    """A request that has passed all checks."""

    served: ServedModel
    request: Request
    stops: tuple[str, ...]
    include_usage: bool

    @property
    def headers(self) -> dict[str, str]:
        return {ADAPTER_HEADER: self.served.name if self.served.adapter else "none"}

    def usage(self, last: _Piece) -> Usage:
        return Usage(len(self.request.prompt_ids), last.tokens)


class _Service:
    def __init__(self, engine: Engine, render: Render, decode: Decode, stops: Sequence[str]) -> None:
        self._engine = engine
        self._render = render
        self._decode = decode
        self._stops = tuple(stops)

    async def health(self, _http: HttpRequest) -> Response:
        if self._engine.stopped:
            return JSONResponse({"status": "stopped", "reason": self._engine.stopped}, 503)
        running, waiting = self._engine.load
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def models(self, _http: HttpRequest) -> Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "tunewright"} for name in self._engine.models]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, http: HttpRequest) -> Response:
        chat = parse_request(await _body(http))
        order = self._check(chat)
        if self._engine.stopped:
            raise EngineStoppedError(self._engine.stopped)
        envelope = Envelope(order.served.name)
        if chat.stream:
            events = self._events(order, envelope)
            return StreamingResponse(events, media_type="text/event-stream", headers=order.headers)
        answer = await _unless_hung_up(http, self._answer(order))
        if answer is None:
            return Response(status_code=499)  # nobody reads it: the client has hung up
        text, last = answer
        assert last.finish is not None
        return JSONResponse(envelope.completion(text, last.finish, order.usage(last)), headers=order.headers)

    def _check(self, chat: ChatRequest) -> _Order:
        served = self._engine.models.get(chat.model)
        if served is None:
            known = ", ".join(self._engine.models)
            message = f"The model {chat.model} does not exist; there are: {known}."
            raise ApiError(message, status=404, param="model", code="model_not_found")
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
            served.adapter,
            max_new_tokens=limit,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.seed,
        )
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        return _Order(served, request, (*self._stops, *(chat.stop or ())), include_usage)

    async def _pieces(self, order: _Order) -> AsyncGenerator[_Piece, None]:
        """The answer's text as it comes; leaving early takes the row out of the batch."""
        text = TextStream(self._decode, order.stops)
        tokens = 0
        async with aclosing(self._engine.stream(order.request)) as deltas:
            async for delta in deltas:
                new = ""
                for token in delta.ids:
                    tokens += 1
                    new += text.push(token)
                    if text.stopped:
                        yield _Piece(new, "stop", tokens)
                        return
                if delta.finish:
                    new += text.flush()
                    yield _Piece(new, "stop" if text.stopped else delta.finish, tokens)
                elif new:
                    yield _Piece(new, None, tokens)

    async def _answer(self, order: _Order) -> tuple[str, _Piece]:
        pieces = [piece async for piece in self._pieces(order)]
        return "".join(piece.text for piece in pieces), pieces[-1]

    async def _events(self, order: _Order, envelope: Envelope) -> AsyncGenerator[str, None]:
        """The answer as server-sent events; a failure on the way is the last of them."""
        try:
            yield _event(envelope.chunk({"role": "assistant", "content": ""}))
            async with aclosing(self._pieces(order)) as pieces:
                async for piece in pieces:
                    if piece.text:
                        yield _event(envelope.chunk({"content": piece.text}))
                    if piece.finish:
                        yield _event(envelope.chunk({}, piece.finish))
                        if order.include_usage:
                            yield _event(envelope.usage_chunk(order.usage(piece)))
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
    return JSONResponse(error.body, error.status)


async def _engine_error(_http: HttpRequest, error: RequestFailedError | EngineStoppedError) -> Response:
    refusal = _as_api_error(error)
    return JSONResponse(refusal.body, refusal.status)


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    message = f"{http.method} {http.url.path}: {error.detail}."
    return JSONResponse(ApiError(message, status=error.status_code).body, error.status_code, headers=error.headers)
