"""What the server counts and is asked for by Prometheus: https://prometheus.io/docs/practices/naming/.

Labels are a tenant's name and an alias, which only the operator makes, and words from lists of our own; nothing that a
client writes becomes a label, and so no client can make the page grow.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
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
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tunewright.core.errors import UserError
from tunewright.serving.access import Released
from tunewright.serving.state.meter import Used

disable_created_metrics()  # one series more for each, that nobody draws
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_WHOSE = ("tenant", "alias")


@dataclass(frozen=True)
class Now:
    """What the server is at, at this moment.

    Args:
        ready: whether it takes requests.
        waiting: the tenant of each request that waits for its turn.
        answering: the tenant of each request at the engine.
        released: what each alias stands for.
        resident: digests of the adapters in memory.
    """

    ready: bool
    waiting: Sequence[str]
    answering: Sequence[str]
    released: Sequence[Released]
    resident: Sequence[str]


class Metrics:
    """Counters of one server.

    Args:
        now: asked at each scrape, in another thread than the server's.
    """

    def __init__(self, now: Callable[[], Now]) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, told: str, labels: Sequence[str] = _WHOSE) -> Counter:
            return Counter(f"tunewright_{name}", told, labels, registry=self.registry)

        def histogram(name: str, told: str) -> Histogram:
            return Histogram(f"tunewright_{name}", told, _WHOSE, registry=self.registry, buckets=_SECONDS)

        self._requests = counter("requests", "Requests that were let in, by how they ended.", (*_WHOSE, "outcome"))
        self._refusals = counter("refusals", "Requests that were not let in, by the code told.", ("tenant", "code"))
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._completion = counter("completion_tokens", "Tokens of answers.")
        self._queued = histogram("queue_seconds", "From a request's arrival to its turn.")
        self._first = histogram("first_token_seconds", "From a request's arrival to the first token.")
        self._total = histogram("request_seconds", "From a request's arrival to its end.")
        self.registry.register(_Gauges(now))
        ProcessCollector(registry=self.registry)

    def settled(self, tenant: str, alias: str, used: Used) -> None:
        """A request that was let in has ended."""
        self._requests.labels(tenant, alias, used.outcome).inc()
        self._prompt.labels(tenant, alias).inc(used.prompt_tokens)
        self._completion.labels(tenant, alias).inc(used.completion_tokens)
        self._queued.labels(tenant, alias).observe(used.queued_s)
        if used.first_token_s is not None:
            self._first.labels(tenant, alias).observe(used.first_token_s)
        self._total.labels(tenant, alias).observe(used.total_s)

    def refused(self, tenant: str, code: str) -> None:
        """A request was not let in; ``tenant`` is empty where it is not known."""
        self._refusals.labels(tenant, code).inc()


class _Gauges(Collector):
    """Read at each scrape, so that what is no longer so is no longer told."""

    def __init__(self, now: Callable[[], Now]) -> None:
        self._now = now

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The families of this moment."""
        now = self._now()

        def gauge(name: str, told: str, labels: Sequence[str] = ()) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"tunewright_{name}", told, labels=labels)

        ready = gauge("ready", "1 while requests are taken.")
        ready.add_metric([], float(now.ready))
        yield ready
        for name, told, tenants in (
            ("waiting_requests", "Requests that wait for their turn.", now.waiting),
            ("running_requests", "Requests at the engine.", now.answering),
        ):
            family = gauge(name, told, ["tenant"])
            for tenant, count in Tally(tenants).items():
                family.add_metric([tenant], count)
            yield family
        resident = gauge("resident_adapter", "1 for each adapter in memory.", ["digest"])
        for digest in sorted(now.resident):
            resident.add_metric([digest[:12]], 1)
        yield resident
        release = gauge("release", "The number of the release that an alias answers by.", ["alias", "digest", "role"])
        for released in now.released:
            release.add_metric([released.alias, (released.digest or "base")[:12], released.role], released.number)
        yield release


@contextmanager
def exposed(metrics: Metrics, host: str, port: int) -> Iterator[str]:
    """Answer Prometheus while the block runs, which is given the address; port 0 takes a free one.

    It is a listener of its own, since names of tenants are not for tenants.

    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            where="serve.metrics_port",
            fix="Choose another port (0 takes a free one), or stop what uses it.",
        ) from error
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
