"""The metrics, read by Prometheus's parser after requests with known outcomes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import LIMITS, MODELS, TOKENIZATION, ScriptedEngine
from states import DIGESTS, SHIP, Clock

from tunewright.adapters.lineage import SystemPrompt
from tunewright.config import GatewayConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth, ServedAdapter
from tunewright.serving.gateway.metrics import ENDED_SECONDS, Metrics, ServerState, exposed
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import Auth, TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits, RequestUsage
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.releases import Candidate

HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def server(engine: ScriptedEngine, access: Auth, limits: GatewayConfig = LIMITS) -> Iterator[tuple[httpx.Client, str]]:
    """A client, and where Prometheus asks."""
    gateway = Gateway(engine, access, TOKENIZATION, limits)
    with (
        exposed(gateway.metrics, "127.0.0.1", 0) as metrics,
        serving(gateway.app) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        yield client, metrics


def scraped(url: str) -> Mapping[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by its name and labels."""
    page = httpx.get(url, trust_env=False).text
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return {
        (sample.name.removeprefix("tunewright_"), frozenset(sample.labels.items())): sample.value for sample in samples
    }


def value(url: str, name: str, **labels: str) -> float | None:
    return scraped(url).get((name, frozenset(labels.items())))


def until(url: str, name: str, expected: float | None, **labels: str) -> None:
    end = time.monotonic() + 300
    while (found := value(url, name, **labels)) != expected:
        assert time.monotonic() < end, found
        time.sleep(0.02)


def test_metrics_count_requests_tokens_and_times_by_outcome() -> None:
    engine = ScriptedEngine((0.01, 0.2, 0))
    whose = {"tenant": "everybody", "alias": "courts"}
    with server(engine, AnonymousAuth(MODELS)) as (client, metrics):
        for stream in (False, True):
            reply = client.post("/v1/chat/completions", json={"model": "courts", "messages": HELLO, "stream": stream})
            assert reply.status_code == 200
        until(metrics, "requests_total", 2, **whose, outcome="length")
        message = client.post("/v1/completions", json={"model": "base", "prompt": "hello"}).json()["usage"]
        other = {"tenant": "everybody", "alias": "base"}
        until(metrics, "requests_total", 1, **other, outcome="length")
        assert value(metrics, "prompt_tokens_total", **other) == message["prompt_tokens"]
        assert value(metrics, "completion_tokens_total", **other) == message["completion_tokens"] == 3
        assert value(metrics, "completion_tokens_total", **whose) == 6
        for name in ("first_token_seconds", "queue_seconds", "request_seconds"):
            assert value(metrics, f"{name}_count", **whose) == 2
        first, total = (value(metrics, f"{name}_seconds_sum", **whose) for name in ("first_token", "request"))
        assert first is not None and total is not None
        assert 0.02 <= first <= total - 0.4


def test_metrics_count_refusals_by_code_without_client_text_as_labels() -> None:
    with server(ScriptedEngine(), AnonymousAuth(MODELS)) as (client, metrics):
        bodies = [{"model": f"secret-{number}", "messages": HELLO} for number in range(3)]
        for body in (*bodies, {"model": "base", "messages": HELLO, "secret-field": 1}):
            assert client.post("/v1/chat/completions", json=body).status_code in (400, 404)
        assert value(metrics, "refusals_total", tenant="everybody", code="model_not_found") == 3
        assert value(metrics, "refusals_total", tenant="everybody", code="unsupported_parameter") == 1
        assert "secret" not in httpx.get(metrics).text


@pytest.mark.slow
def test_metrics_have_waiting_and_running_requests_only_while_there_are_any() -> None:
    engine = ScriptedEngine((0, 60), max_num_seqs=1)
    body = {"model": "base", "messages": HELLO, "stream": True}
    whose = {"tenant": "everybody"}
    with server(engine, AnonymousAuth(MODELS)) as (client, metrics):
        assert value(metrics, "ready") == 1
        with client.stream("POST", "/v1/chat/completions", json=body) as first:
            lines = first.iter_lines()  # once it is gone, the connection is
            next(lines)
            assert value(metrics, "running_requests", **whose) == 1
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body, timeout=2)
            until(metrics, "requests_total", 1, **whose, alias="base", outcome="disconnected")
        until(metrics, "running_requests", None, **whose)
        assert value(metrics, "waiting_requests", **whose) is None
        assert value(metrics, "queued_requests") == 0
        engine.stopped = "it is started again"
        assert value(metrics, "ready") == 0


def test_metrics_have_a_listener_of_their_own_with_tenants_aliases_and_releases(state_url: str, tmp_path: Path) -> None:
    with State(state_url, "ann") as state:
        state.releases.deploy("courts", "courts-1", DIGESTS["a"], SHIP)
        state.tenants.add("acme", ["courts"], Limits(requests_per_minute=1))
        key, _ = state.keys.create("acme")
        engine = ScriptedEngine()
        served = ServedAdapter(tmp_path, SystemPrompt(None))
        access = TenantAuth(State(state_url), engine, lambda _name, _digest: served, LogReporter())
        one, three = DIGESTS["a"][:12], DIGESTS["c"][:12]
        with server(engine, access) as (client, metrics):
            client.headers["Authorization"] = f"Bearer {key}"
            body = {"model": "courts", "messages": HELLO}
            codes = [client.post("/v1/chat/completions", json=body).status_code for _ in range(3)]
            assert codes == [200, 429, 429]
            client.headers["Authorization"] = "Bearer wrong"
            assert client.post("/v1/chat/completions", json=body).status_code == 401
            until(metrics, "requests_total", 1, tenant="acme", alias="courts", outcome="length")
            assert [whose for _, whose in engine.asked] == ["acme"], "whose cache it is"
            assert value(metrics, "refusals_total", tenant="acme", code="rate_limit_exceeded") == 2
            assert value(metrics, "refusals_total", tenant="", code="invalid_api_key") == 1
            assert value(metrics, "release", alias="courts", digest=one, role="live") == 1
            assert value(metrics, "resident_adapter", digest=one) == 1
            state.releases.start_candidate("courts", Candidate("courts-3", DIGESTS["c"], 0.5), SHIP)
            until(metrics, "release", 2, alias="courts", digest=three, role="canary")
            assert value(metrics, "resident_adapter", digest=three) == 1
            state.releases.promote("courts")
            until(metrics, "release", 3, alias="courts", digest=three, role="live")
            until(metrics, "release", None, alias="courts", digest=one, role="live")
            until(metrics, "resident_adapter", None, digest=one)
            for path in ("/metrics", "/v1/metrics"):
                assert client.get(path).status_code == 404


def test_metrics_count_recorded_requests_and_gaps(state: State, state_url: str, tmp_path: Path) -> None:
    state.releases.deploy("courts", "courts-1", DIGESTS["a"], SHIP)
    state.tenants.add("acme", ["courts"])
    key, _ = state.keys.create("acme")
    file = KeyFile(tmp_path / "record.key")
    state.records.start("acme", "DPA-17", 30, 1.0, file)
    served = ServedAdapter(tmp_path, SystemPrompt(None))
    engine = ScriptedEngine()
    access = TenantAuth(State(state_url), engine, lambda _name, _digest: served, LogReporter(), KeyFile(file.path))
    with server(engine, access) as (client, metrics):
        client.headers["Authorization"] = f"Bearer {key}"
        for path in (file.path.with_name("moved"), file.path):
            (file.path if path != file.path else path.with_name("moved")).rename(path)
            assert client.post("/v1/chat/completions", json={"model": "courts", "messages": HELLO}).status_code == 200
        until(metrics, "recorded_requests_total", 1, tenant="acme")
        until(metrics, "unrecorded_requests_total", 1, tenant="acme")


def test_metrics_name_the_port_when_the_address_is_in_use() -> None:
    gateway = Gateway(ScriptedEngine(), AnonymousAuth(MODELS), TOKENIZATION, LIMITS)
    with exposed(gateway.metrics, "127.0.0.1", 0) as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        with (
            pytest.raises(UserError, match=f"Cannot listen on 127.0.0.1 port {port}"),
            exposed(gateway.metrics, "127.0.0.1", port),
        ):
            pass


USAGE = RequestUsage(3, 5, 0.1, 0.2, 0.3, "stop")


def counting(clock: Clock) -> Metrics:
    """Metrics without a server."""
    return Metrics(lambda: ServerState(True, (), (), (), ()), clock)


def owners(metrics: Metrics) -> Counter[tuple[str, str]]:
    """Return the number of series by tenant and alias (or error code)."""
    labels = (sample.labels for family in metrics.registry.collect() for sample in family.samples)
    named = (one for one in labels if "tenant" in one)
    return Counter((one["tenant"], one.get("alias", one.get("code", ""))) for one in named)


def test_metrics_of_an_ended_tenant_remain_for_ten_minutes_and_return_with_it() -> None:
    clock = Clock()
    metrics = counting(clock)
    metrics.settled("acme", "courts", USAGE)
    metrics.keep({})
    clock.now += ENDED_SECONDS - 1
    metrics.keep({})
    assert ("acme", "courts") in owners(metrics)
    metrics.keep({"acme": ["courts"]})  # it has a key again
    clock.now += ENDED_SECONDS
    metrics.keep({})
    assert ("acme", "courts") in owners(metrics), "counted from the second end"
    clock.now += ENDED_SECONDS
    metrics.keep({})
    assert not owners(metrics)
    metrics.settled("acme", "courts", USAGE)
    assert (
        metrics.registry.get_sample_value("tunewright_prompt_tokens_total", {"tenant": "acme", "alias": "courts"}) == 3
    )


def test_metrics_drop_an_alias_that_a_tenant_may_no_longer_call_and_keep_its_others() -> None:
    clock = Clock()
    metrics = counting(clock)
    for alias in ("courts", "recipes"):
        metrics.settled("acme", alias, USAGE)
    metrics.settled("globex", "recipes", USAGE)
    for tenant in ("", "acme", "globex"):
        metrics.refused(tenant, "invalid_api_key")
    for _ in range(2):
        metrics.keep({"acme": ["courts"]})
        clock.now += ENDED_SECONDS
    assert owners(metrics).keys() == {("acme", "courts"), ("", "invalid_api_key"), ("acme", "invalid_api_key")}


def test_metrics_learn_from_the_state_which_tenants_have_ended(
    state_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.serving.gateway.metrics.ENDED_SECONDS", 0.0)
    served = ServedAdapter(tmp_path, SystemPrompt(None))
    with State(state_url, "ann") as state:
        state.releases.deploy("courts", "courts-1", DIGESTS["a"], SHIP)
        keys = {}
        for name in ("acme", "globex"):
            state.tenants.add(name, ["courts"])
            keys[name], _ = state.keys.create(name)
        access = TenantAuth(State(state_url), ScriptedEngine(), lambda _name, _digest: served, LogReporter())
        with server(ScriptedEngine(), access) as (client, metrics):
            for name, key in keys.items():
                headers = {"Authorization": f"Bearer {key}"}
                body = {"model": "courts", "messages": HELLO}
                assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
                until(metrics, "requests_total", 1, tenant=name, alias="courts", outcome="length")
            state.tenants.disable("acme")
            for number in range(2):  # a release makes the server look at once
                state.releases.deploy("courts", f"courts-{number}", DIGESTS["bc"[number]], SHIP)
                until(metrics, "release", 2 + number, alias="courts", digest=DIGESTS["bc"[number]][:12], role="live")
            until(metrics, "requests_total", None, tenant="acme", alias="courts", outcome="length")
            assert value(metrics, "requests_total", tenant="globex", alias="courts", outcome="length") == 1
