"""Metrics for Prometheus, named by https://prometheus.io/docs/practices/naming/.

Labels are tenants' names and aliases, which only the operator creates, and words from fixed lists. Nothing a client
sends becomes a label, so no client can make the page grow.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tunewright.core.errors import UserError
from tunewright.engines.remote import RemoteEngine
from tunewright.serving.gateway.auth import Released
from tunewright.serving.tenants.quota import RequestUsage

disable_created_metrics()  # these labels double the number of series
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OWNER = ("tenant", "alias")
ENDED_SECONDS = 600.0
"""The time for which the series of an ended tenant remain, so that Prometheus reads their last values."""


@dataclass(frozen=True)
class ServerState:
    """The server's state at one moment."""

    ready: bool
    waiting: Sequence[str]
    """The tenant of each request in the queue."""
    running: Sequence[str]
    """The tenant of each request at the engine."""
    released: Sequence[Released]
    resident: Sequence[str]
    engines: Sequence[RemoteEngine] = ()
    records: tuple[Mapping[str, int], Mapping[str, int]] | None = None
    """Recorded requests, and requests that could not be recorded, by tenant; None: the server records none."""


class Metrics:
    """Counters of one server."""

    def __init__(self, now: Callable[[], ServerState], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended: dict[tuple[str, str], float | None] = {}
        """By tenant and alias with series (no alias: refusals), the time since which there are no such requests."""
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = _OWNER) -> Counter:
            return Counter(f"tunewright_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"tunewright_{name}", text, _OWNER, registry=self.registry, buckets=_SECONDS)

        self._requests = counter("requests", "Admitted requests, by outcome.", (*_OWNER, "outcome"))
        self._refusals = counter("refusals", "Refused requests, by error code.", ("tenant", "code"))
        self._prompt = counter("prompt_tokens", "Prompt tokens.")
        self._completion = counter("completion_tokens", "Generated tokens.")
        self._queued = histogram("queue_seconds", "Time from arrival to the engine.")
        self._first = histogram("first_token_seconds", "Time from arrival to the first token.")
        self._total = histogram("request_seconds", "Time from arrival to the end.")
        self._of_owner = (self._requests, self._prompt, self._completion, self._queued, self._first, self._total)
        self.registry.register(_Gauges(now))
        ProcessCollector(registry=self.registry)

    def settled(self, tenant: str, alias: str, usage: RequestUsage) -> None:
        """Count an admitted request that has ended."""
        self._ended.setdefault((tenant, alias))
        self._requests.labels(tenant, alias, usage.outcome).inc()
        self._prompt.labels(tenant, alias).inc(usage.prompt_tokens)
        self._completion.labels(tenant, alias).inc(usage.completion_tokens)
        self._queued.labels(tenant, alias).observe(usage.queued_s)
        if usage.first_token_s is not None:
            self._first.labels(tenant, alias).observe(usage.first_token_s)
        self._total.labels(tenant, alias).observe(usage.total_s)

    def refused(self, tenant: str, code: str) -> None:
        """Count a refused request; ``tenant`` is empty if it is not known."""
        if tenant:
            self._ended.setdefault((tenant, ""))
        self._refusals.labels(tenant, code).inc()

    def keep(self, callers: Mapping[str, Collection[str]]) -> None:
        """Remove the series of other tenants and of their other aliases, :data:`ENDED_SECONDS` after they ended."""
        now = self._clock()
        for (tenant, alias), since in list(self._ended.items()):
            if tenant in callers and alias in ("", *callers[tenant]):
                self._ended[tenant, alias] = None
            elif since is None:
                self._ended[tenant, alias] = now
            elif now - since >= ENDED_SECONDS:
                del self._ended[tenant, alias]
                if alias:
                    for metric in self._of_owner:
                        metric.remove_by_labels({"tenant": tenant, "alias": alias})
                else:
                    self._refusals.remove_by_labels({"tenant": tenant})


class _Gauges(Collector):
    """Gauges read at each scrape, so that no stale series remains."""

    def __init__(self, now: Callable[[], ServerState]) -> None:
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        now = self._now()
        yield _gauge("ready", "1 while requests are accepted.", [((), now.ready)])
        # Autoscalers need a number at every moment, which the series of tenants are not.
        yield _gauge("queued_requests", "Requests in the queue, of all tenants.", [((), len(now.waiting))])
        for name, text, tenants in (
            ("waiting_requests", "Requests in the queue.", now.waiting),
            ("running_requests", "Requests at the engine.", now.running),
        ):
            yield _gauge(name, text, [((tenant,), count) for tenant, count in Tally(tenants).items()], "tenant")
        resident = [((digest[:12],), 1) for digest in sorted(now.resident)]
        yield _gauge("resident_adapter", "1 for each adapter in memory.", resident, "digest")
        released = [((each.alias, (each.digest or "base")[:12], each.role), each.number) for each in now.released]
        yield _gauge("release", "Release number of an alias's adapter.", released, "alias", "digest", "role")
        if now.records is not None:
            for name, text, counts in (
                ("recorded_requests", "Recorded requests.", now.records[0]),
                ("unrecorded_requests", "Requests whose record was dropped: a gap.", now.records[1]),
            ):
                recorded = CounterMetricFamily(f"tunewright_{name}", text, labels=["tenant"])
                for tenant, count in counts.items():
                    recorded.add_metric([tenant], count)
                yield recorded
        if not now.engines:
            return
        up = [((each.url,), each.up) for each in now.engines]
        yield _gauge("engine_up", "1 while the engine takes requests.", up, "engine")
        running = [((each.url,), each.running) for each in now.engines]
        yield _gauge("engine_running_requests", "Requests at the engine.", running, "engine")
        adapters = [((each.url,), len(each.adapters)) for each in now.engines]
        yield _gauge("engine_adapters", "Adapters that the engine has loaded.", adapters, "engine")
        text = "Times that the engine came back as a new process."
        restarts = CounterMetricFamily("tunewright_engine_restarts", text, labels=["engine"])
        for each in now.engines:
            restarts.add_metric([each.url], each.restarts)
        yield restarts


def _gauge(name: str, text: str, values: Iterable[tuple[Sequence[str], float]], *labels: str) -> Metric:
    family = GaugeMetricFamily(f"tunewright_{name}", text, labels=labels)
    for own, value in values:
        family.add_metric(own, float(value))
    return family


@contextmanager
def exposed(metrics: Metrics, host: str, port: int) -> Iterator[str]:
    """Serve the metrics while the block runs, and yield their address; port 0 picks a free one.

    They have a separate listener, since tenants must not see each other's names.
    """
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise UserError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}",
            where="serve.metrics_port",
            fix="Choose another port (0 takes a free one), or stop the program that uses it.",
        ) from error
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
