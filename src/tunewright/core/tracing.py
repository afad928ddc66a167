"""OpenTelemetry traces: commands with their tasks, and requests with their time in the queue and at the engine.

Nothing of OpenTelemetry is imported until :func:`start` finds an endpoint in the standard ``OTEL_…`` variables. The
packages come with ``tunewright[otel]``. Spans have names, counts and times, and no text of a prompt or an answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunewright._version import __version__
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

Value = str | int | float | bool
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
"""The one protocol that spans are sent by."""

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def start() -> str | None:
    """Export spans if an OTLP endpoint is set; return a warning if it is set and they cannot be exported.

    Raises:
        UserError: the exporter or protocol in the variables is not supported.
    """
    global _provider, _tracer
    if _tracer is not None or not wanted():
        return None
    _require_supported()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return f"{_first(_ENDPOINTS)[0]} is set, but no traces are sent: {install_command('otel')}"
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "tunewright"}
    # Environment variables override the attributes given here, except the service's name.
    _provider = TracerProvider(resource=Resource.create({**named, "service.version": __version__}))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("tunewright", __version__)
    return None


def stop() -> None:
    """Send the remaining spans, and stop tracing."""
    global _provider, _tracer
    if _provider is not None:
        _provider.shutdown()
    _provider = _tracer = None


def wanted() -> bool:
    """Return whether the standard variables ask for traces."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return not off and _first(_ENDPOINTS) is not None


def endpoint() -> str | None:
    """Return the URL that spans are sent to; None if nothing is traced."""
    found = _first(_ENDPOINTS)
    if _tracer is None or found is None:
        return None
    name, url = found
    return url if name == _ENDPOINTS[0] else f"{url.rstrip('/')}/v1/traces"


def variables_of(service: str) -> dict[str, str]:
    """Return the environment variables with which a child process sends its spans to :func:`endpoint`."""
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"OTEL_SERVICE_NAME": service}
    return {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": PROTOCOL, **named}


def _first(names: tuple[str, ...]) -> Any:
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), None)


def _require_supported() -> None:
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if exporter != "otlp":
        raise UserError(
            f"The exporter {exporter!r} is not supported",
            where="OTEL_TRACES_EXPORTER",
            fix="Use otlp, or none to send no traces.",
        )
    name, protocol = _first(_PROTOCOLS) or (_PROTOCOLS[1], PROTOCOL)
    if protocol != PROTOCOL:
        raise UserError(
            f"The protocol {protocol!r} is not supported",
            where=name,
            fix=f"Use {PROTOCOL} and the collector's HTTP port, which is usually 4318.",
        )


class Span:
    """A piece of work with a name, times and attributes; if nothing is traced, a span that does nothing.

    The no-op spans of OpenTelemetry's API package would take 14 µs instead of 2, and 90 ms of each command to import.
    """

    def __init__(self, span: OtelSpan | None = None) -> None:
        self._span = span

    def set(self, attributes: Mapping[str, Value | None]) -> None:
        """Set attributes; attributes with the value None are left out."""
        if self._span is not None:
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def fail(self, reason: str) -> None:
        """Mark the work as failed."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, reason)

    def end(self) -> None:
        """End it now."""
        if self._span is not None:
            self._span.end()


_NO_SPAN = Span()


@contextmanager
def span(name: str, attributes: Mapping[str, Value | None] | None = None) -> Iterator[Span]:
    """Trace the block as a child of the current span."""
    if _tracer is None:
        yield _NO_SPAN
        return
    with _started(_tracer, name, None, ()) as made:
        made.set(attributes or {})
        yield made


@contextmanager
def command(name: str, ends: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Trace a command as a child of ``TRACEPARENT``, the environment variable that CI systems set.

    Args:
        ends: exceptions that end a command without an error.
    """
    if _tracer is None:
        yield
        return
    carried = {key: os.environ[key.upper()] for key in ("traceparent", "tracestate") if key.upper() in os.environ}
    with _started(_tracer, name, _extract(carried), ends):
        yield


@contextmanager
def _started(tracer: Tracer, name: str, context: Any, ends: tuple[type[Exception], ...]) -> Iterator[Span]:
    # OpenTelemetry would record an exception's message, which may quote a row.
    with tracer.start_as_current_span(
        name, context=context, record_exception=False, set_status_on_exception=False
    ) as started:
        made = Span(started)
        try:
            yield made
        except ends:
            raise
        except Exception as error:
            made.fail(type(error).__name__)
            raise


@contextmanager
def request(name: str, headers: Mapping[str, str]) -> Iterator[Span]:
    """Make a request's span the current one in the block; the caller ends it, which may be later.

    Args:
        headers: the request's; ``traceparent`` names the client's span.
    """
    if _tracer is None:
        yield _NO_SPAN
        return
    from opentelemetry.trace import SpanKind, use_span

    started = _tracer.start_span(name, context=_extract(headers), kind=SpanKind.SERVER)
    with use_span(started, end_on_exit=False, record_exception=False, set_status_on_exception=False):
        yield Span(started)


def _extract(carrier: Mapping[str, str]) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # Only the trace's context: baggage is the client's text.
    return TraceContextTextMapPropagator().extract(carrier, Context())


def headers() -> dict[str, str]:
    """Return the headers that make another server's span a child of the current one."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carrier)
    return carrier


def ids() -> dict[str, str]:
    """Return the ids of the current trace and span, for a line of the log."""
    if _tracer is None:
        return {}
    from opentelemetry.trace import format_span_id, format_trace_id, get_current_span

    context = get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}
