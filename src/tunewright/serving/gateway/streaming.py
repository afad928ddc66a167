"""HTTP input and output: bodies read in time, work cancelled on disconnect, answers as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tunewright.engines.protocol import EngineStoppedError, RequestFailedError
from tunewright.serving.gateway.errors import ApiError, as_api_error
from tunewright.serving.gateway.request import TextChunk
from tunewright.serving.gateway.request_handler import RequestHandler
from tunewright.serving.gateway.responses import ResponseFormat
from tunewright.serving.gateway.schemas import Usage

T = TypeVar("T")

FLUSH_SECONDS = 5.0
"""Time for a client to read the error that ends a stream, after its deadline."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would create one for each event

_CLOSE = {"Connection": "close"}
"""The rest of the body is not read."""


async def read_body(http: HttpRequest, limit: int, seconds: float) -> bytes:
    """Return the request's body."""
    body = b""
    try:
        async with asyncio.timeout(seconds):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limit:
                    message = f"Request body too large (limit {limit} bytes)."
                    raise ApiError(message, status=413, code="body_too_large", headers=_CLOSE)
    except TimeoutError:
        message = f"Timed out after {seconds:g} s waiting for the request body."
        raise ApiError(message, status=408, code="body_timeout", headers=_CLOSE) from None
    except ClientDisconnect:
        raise ApiError("The client disconnected.", status=499, code="client_disconnected") from None
    return body


async def cancel_on_disconnect(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """Return the work's result; if the client disconnects first, cancel the work and return None."""

    async def disconnect() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


class EventStreamResponse(StreamingResponse):
    """A response of server-sent events.

    Args:
        until: when the client must have read it all, by the event loop's clock. Slower clients are disconnected.
        on_end: called at the end, even if the response was never started.
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
            return  # the server closes the connection, so that an answer without its end does not look complete
        finally:
            await self._on_end()


async def sse_events(
    first: tuple[int, TextChunk],
    rest: AsyncGenerator[tuple[int, TextChunk], None],
    handler: RequestHandler,
    response_format: ResponseFormat,
) -> AsyncGenerator[str, None]:
    """Yield the answers as server-sent events; an error on the way is the last one.

    Events available at the same moment are yielded together, since sending costs more than encoding.
    """
    documents = response_format.first_chunks(Usage(handler.prompt_tokens, 0))
    unfinished, tokens = len(handler.requests), 0
    try:
        item: tuple[int, TextChunk] | None = first
        while item is not None:
            index, chunk = item
            if chunk.text or chunk.scored:
                documents += response_format.text_chunk(index, chunk)
            for delta in chunk.calls:
                documents += response_format.call_chunk(index, delta)
            if chunk.finish:
                documents += response_format.finish_chunks(index, handler.answer(index, chunk.finish))
                unfinished, tokens = unfinished - 1, tokens + chunk.tokens
            if not unfinished:
                documents += response_format.last_chunks(Usage(handler.prompt_tokens, tokens))
            yield "".join(map(_sse, documents)) + ("" if unfinished else response_format.end)
            documents = []
            item = await anext(rest, None)
    except (ApiError, RequestFailedError, EngineStoppedError) as error:
        yield _sse(response_format.error_chunk(as_api_error(error)))


def _sse(document: dict[str, Any]) -> str:
    """Return an event; one with a type (of responses and messages) is also named by it."""
    name = f"event: {document['type']}\n" if "type" in document else ""
    return f"{name}data: {_ENCODER.encode(document)}\n\n"
