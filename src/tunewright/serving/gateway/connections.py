"""Bounds on connections: their number, the size of a request's head, and the time in which it must arrive.

uvicorn's parser does not limit headers, and a connection without a request stays open, even without a key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
from collections import Counter
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from starlette.responses import JSONResponse
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tunewright.config import GatewayConfig
from tunewright.serving.gateway.errors import ApiError

log = logging.getLogger("tunewright")

MAX_HEADER_BYTES = 32 << 10
"""The request line and all headers, names and values; as much as nginx accepts by default."""
MAX_HEADERS = 100
MAX_PIPELINED = 8
"""Requests of a connection that may wait for the answer to an earlier request."""
_LATE_SECONDS = 0.5
"""A timer that is later than this shows that the process was stopped, as in a machine that sleeps."""
_LINGER_SECONDS = 2.0
"""The time to discard what a refused client still sends. Closing at once would reset the connection, and the client
would lose the answer."""
_REPORT_SECONDS = 60.0
_OWN_DESCRIPTORS = 256
"""File descriptors for the database, adapters, and the engine's connections."""
_BACKLOG = 2048  # uvicorn's default


class ConnectionState(ServerState):
    """The connections of a server, and the number of connections that it refused or closed."""

    def __init__(self, limits: GatewayConfig) -> None:
        super().__init__()
        self.limits = limits
        self._waiting: dict[BoundedHttpProtocol, None] = {}  # connections without a request, the longest waiting first
        self._incidents: Counter[str] = Counter()
        self._reported_at = -_REPORT_SECONDS
        descriptors = raise_descriptor_limit(limits.max_connections + _BACKLOG + _OWN_DESCRIPTORS)
        # The loop accepts the whole backlog before any connection over the maximum is closed.
        self.backlog = min(_BACKLOG, descriptors // 4)
        self.maximum = min(limits.max_connections, descriptors - self.backlog - min(_OWN_DESCRIPTORS, descriptors // 4))
        if self.maximum < limits.max_connections:
            log.warning(
                "the server accepts %d connections instead of %d (gateway.max_connections), because the process may "
                "open only %d files; raise that limit (ulimit -Hn, or LimitNOFILE= of the service)",
                self.maximum,
                limits.max_connections,
                descriptors,
            )

    def admit(self, connection: BoundedHttpProtocol) -> bool:
        """Make room for a new connection by closing the one that has waited longest; False if all have requests."""
        if len(self.connections) <= self.maximum:
            return True
        idle = next((waiting for waiting in self._waiting if waiting is not connection), None)
        at_maximum = f"at the maximum of {self.maximum} (gateway.max_connections)"
        if idle is None:
            self.count(f"refused a connection {at_maximum}")
            return False
        self.count(f"closed an idle connection {at_maximum}")
        idle.transport.close()
        self.connections.discard(idle)  # the connection's own callback comes after further connections
        self._waiting.pop(idle)
        return True

    def set_waiting(self, connection: BoundedHttpProtocol, waiting: bool) -> None:
        """Record whether a connection has no request; such connections are closed first."""
        if waiting:
            self._waiting[connection] = None
        else:
            self._waiting.pop(connection, None)

    def count(self, incident: str) -> None:
        """Count an incident for the next report."""
        self._incidents[incident] += 1

    def report(self) -> None:
        """Log the incidents, at most once a minute, since strangers can cause any number of them."""
        if self._incidents and time.monotonic() - self._reported_at >= _REPORT_SECONDS:
            for incident, count in self._incidents.items():
                log.warning("%s (%d times since the last report)", incident, count)
            self._incidents.clear()
            self._reported_at = time.monotonic()


class _PipelineFlow(FlowControl):
    """Flow control that does not resume reading while a pipelined request waits.

    uvicorn resumes after each answer, and each time the application waits for a disconnect.
    """

    def __init__(self, connection: BoundedHttpProtocol) -> None:
        super().__init__(connection.transport)
        self._connection = connection

    def resume_reading(self) -> None:
        if not self._connection.pipeline:
            super().resume_reading()


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with bounds.

    A connection is closed if a request's head is too large or too late, or if too many pipelined
    requests wait. The parser collects a header until the next one begins, and reports nothing
    meanwhile; so the bytes since its last report are also bounded.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(server_state, ConnectionState)
        self._state = server_state
        self.timeout_keep_alive = server_state.limits.keep_alive_timeout_s  # type: ignore[assignment]
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_message = self._in_head = False
        self._header_bytes = self._headers = 0
        self._unreported = 0
        self._too_large = self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time for the first request."""
        super().connection_made(transport)
        self.flow = _PipelineFlow(self)
        if not self._state.admit(self):
            self._send(ApiError("Too many connections.", status=503, code="too_many_connections"))
            transport.close()
            self._refused = True
            return
        self._state.set_waiting(self, True)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._state.set_waiting(self, False)
        self._stop_head_timer()
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Parse the received bytes, within the bounds."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        view = memoryview(data)
        try:
            # In parts, since the bytes of the part in which the parser reports something are not counted.
            for at in range(0, len(data), MAX_HEADER_BYTES):
                part = view[at : at + MAX_HEADER_BYTES]
                self._unreported += len(part)
                self.parser.feed_data(part)
                if self._unreported > MAX_HEADER_BYTES:
                    self._refuse(_headers_too_large())
                    return
        except httptools.HttpParserUpgrade:
            pass  # answered as an ordinary request
        except httptools.HttpParserError:
            if not self._refused:
                invalid = ApiError("Invalid HTTP request.", code="invalid_http")
                self._refuse(_headers_too_large() if self._too_large else invalid)
            return
        if self._idle and self._head_timer is None and self.timeout_keep_alive_task is None:
            self._start_head_timer()

    @property
    def _idle(self) -> bool:
        """True if no request is being answered."""
        return not self.pipeline and (self.cycle is None or self.cycle.response_complete)

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._unset_keepalive_if_required()
        self._in_message = self._in_head = True
        self._header_bytes = self._headers = self._unreported = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Trailers are counted and ignored: a proxy in front has not checked them."""
        self._headers += 1
        self._count(len(name) + len(value))
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to answer."""
        self._unreported = 0
        self._in_head = False
        self._stop_head_timer()
        self._state.set_waiting(self, False)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            # Read data may hold thousands of requests. The earlier ones are answered before this error.
            message = f"Too many pipelined requests (limit {MAX_PIPELINED}): wait for answers."
            error = ApiError(message, status=429, code="too_many_pipelined_requests")
            refusal: Any = JSONResponse(error.body, error.status, {"connection": "close"})  # uvicorn's types differ
            self.pipeline[0] = self.cycle, refusal
            self._refused = True
            self._state.count(f"refused an HTTP request: {error.message}")
            raise ValueError("too many requests")  # ends the parser

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._unreported = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request, which may have been answered already."""
        self._unreported = 0
        self._in_message = False
        super().on_message_complete()
        if self._idle:
            self._stop_head_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self.transport.is_closing() or not self._idle:
            return
        self._state.set_waiting(self, True)
        if self._in_message:  # the rest of a body that was not read, or a part of the next request
            self._unset_keepalive_if_required()
            self._start_head_timer()

    def _count(self, size: int) -> None:
        self._unreported = 0
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES or self._headers > MAX_HEADERS:
            self._too_large = True
            raise ValueError("the headers are too large")  # ends the parser

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self._state.limits.header_timeout_s, self._time_out)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_out(self) -> None:
        timer, self._head_timer = self._head_timer, None
        assert timer is not None
        if self.loop.time() - timer.when() > _LATE_SECONDS:
            # What clients sent while the process was stopped is read after the timers.
            self._start_head_timer()
            return
        if self._in_head:
            seconds = self._state.limits.header_timeout_s
            message = f"Timed out after {seconds:g} s waiting for the request headers."
            self._refuse(ApiError(message, status=408, code="header_timeout"))
        else:  # no request was sent, or it was answered
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, and close the connection."""
        self._refused = True
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self._state.count(f"refused an HTTP request: {error.message}")
        cycle = self.cycle
        if not self._idle and (self.pipeline or cycle.response_started):
            self.transport.close()  # an error in the middle of another answer would look like a part of it
            return
        if cycle is not None:
            cycle.disconnected = True  # the request's answer must not follow the error
            cycle.message_event.set()
        self._send(error)
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _send(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)


def raise_descriptor_limit(needed: int) -> int:
    """Raise the process's soft limit of open files to ``needed``, if the hard limit allows it; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    reachable = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if reachable > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
    return max(reachable, soft)


def _headers_too_large() -> ApiError:
    message = f"Request headers too large (limit {MAX_HEADER_BYTES} bytes, {MAX_HEADERS} headers)."
    return ApiError(message, status=431, code="headers_too_large")
