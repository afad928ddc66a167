"""Requests read and answers sent over HTTP: within their time, and not for who has hung up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tunewright.engines.protocol import EngineStoppedError, RequestFailedError
from tunewright.serving.answering import Piece
from tunewright.serving.choices import Choices
from tunewright.serving.envelopes import Envelope
from tunewright.serving.protocol import ApiError

T = TypeVar("T")

FAREWELL_SECONDS = 5.0
"""How long the last piece of a stream may take to be read, when its time is over."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one for each event

_UNREAD = {"Connection": "close"}
"""What is left of the body is not waited for."""


async def read_body(http: HttpRequest, most: int, seconds: float) -> bytes:
    """Return the request's body.

    Raises:
        ApiError: 413, it has more bytes than that; 408, it does not come.
    """
    body = b""
    try:
        async with asyncio.timeout(seconds):
            async for chunk in http.stream():
                body += chunk
                if len(body) > most:
                    message = f"The body is over {most} bytes."
                    raise ApiError(message, status=413, code="body_too_large", headers=_UNREAD)
    except TimeoutError:
        message = f"The body did not come within {seconds:g} s."
        raise ApiError(message, status=408, code="body_timeout", headers=_UNREAD) from None
    return body


async def unless_hung_up(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """Return the work's result, or None (and the work cancelled) once the client has closed the connection."""

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


class Stream(StreamingResponse):
    """An answer as server-sent events.

    Args:
        until: when the client has to have read it, by the event loop's clock; a reader that is slower is cut off.
        on_end: called however it ends, also if it never begins.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        headers: dict[str, str],
        *,
        until: float,
        on_end: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._until = until
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events), asyncio.timeout_at(self._until):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return  # the server closes the connection: an answer without an end must not look like a whole one
        finally:
            await self._on_end()


async def events(
    first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece], None], choices: Choices, envelope: Envelope
) -> AsyncGenerator[str, None]:
    """The answers as server-sent events, those of one moment together; a failure on the way is the last of them.

    To send something takes longer than to make it, however little it is.
    """
    documents = envelope.opening()
    unfinished, tokens = len(choices.answering), 0
    try:
        come: tuple[int, Piece] | None = first
        while come is not None:
            index, piece = come
            if piece.text:
                documents.append(envelope.piece(index, piece.text))
            if piece.finish:
                documents.append(envelope.end(index, piece.finish))
                unfinished, tokens = unfinished - 1, tokens + piece.tokens
            if not unfinished and choices.include_usage:
                documents.append(envelope.usage(choices.usage(tokens)))
            yield "".join(map(_event, documents)) + ("" if unfinished else "data: [DONE]\n\n")
            documents = []
            come = await anext(rest, None)
    except (ApiError, RequestFailedError, EngineStoppedError) as error:
        yield _event(as_api_error(error).body)


def _event(document: dict[str, Any]) -> str:
    return f"data: {_ENCODER.encode(document)}\n\n"


def as_api_error(error: ApiError | RequestFailedError | EngineStoppedError) -> ApiError:
    """Return what a client is told of an engine's failure."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineStoppedError):
        return ApiError(str(error), status=503, code="engine_stopped", headers={"Retry-After": "5"})
    return ApiError(str(error), status=500, code="request_failed")
