"""Traces of requests: the client's span, the request's, its time in the queue and at the engine."""

from __future__ import annotations

import httpx
import pytest
from scripted_engine import MODELS, ScriptedEngine, scripted_server

from making.otlp_collector import Collector, traced
from tunewright.core import tracing

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a secret of the client"
CHAT: dict[str, object] = {"model": "courts", "messages": [{"role": "user", "content": SECRET}]}


def _post(
    monkeypatch: pytest.MonkeyPatch, *bodies: dict[str, object], pause: float = 0.0, **limits: float
) -> tuple[Collector, list[httpx.Response]]:
    headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
    with traced(monkeypatch) as collector, scripted_server(ScriptedEngine((pause, 0, 0)), **limits) as client:
        replies = [client.post("/v1/chat/completions", json=body, headers=headers) for body in bodies]
    return collector, replies


@pytest.mark.parametrize("stream", [False, True])
def test_request_continues_the_clients_trace_to_queue_and_engine(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    collector, _ = _post(monkeypatch, {**CHAT, "stream": stream})
    request, queue, engine = (collector.one(name) for name in ("POST /v1/chat/completions", "queue", "engine"))
    assert {span.trace for span in collector.spans} == {TRACE}
    assert request.parent == CLIENT
    assert queue.parent == engine.parent == request.id
    assert request.start <= queue.start <= queue.end <= engine.start <= engine.end <= request.end
    assert collector.routes == ["/v1/traces"]


def test_spans_have_counts_and_names_and_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, (reply,) = _post(monkeypatch, CHAT)
    usage = reply.json()["usage"]
    request, engine = collector.one("POST /v1/chat/completions"), collector.one("engine")
    assert request.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert request.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 3
    assert request.attributes["gen_ai.request.model"] == "courts"
    assert request.attributes["tunewright.tenant"] == "everybody"
    assert request.attributes["tunewright.adapter"] == MODELS["courts"] == engine.attributes["tunewright.adapter"]
    assert request.attributes["tunewright.outcome"] == "length"
    assert request.attributes["http.response.status_code"] == 200
    assert engine.attributes["gen_ai.usage.output_tokens"] == 3
    assert request.resource["service.name"] == "tunewright"
    assert SECRET not in repr(collector.spans)


def test_refused_and_failed_requests_end_their_spans_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, replies = _post(monkeypatch, {**CHAT, "model": "none"}, CHAT, first_token_timeout_s=0.1, pause=60)
    assert [reply.status_code for reply in replies] == [404, 504]
    refused, late = (span for span in collector.spans if span.name.startswith("POST"))
    assert (refused.attributes["error.type"], refused.failed) == ("model_not_found", False)
    assert (late.attributes["error.type"], late.failed) == ("first_token_timeout", True)
    assert late.attributes["tunewright.outcome"] == "timed out"


def test_request_without_traceparent_begins_a_trace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with traced(monkeypatch) as collector, tracing.span("around"), scripted_server(ScriptedEngine()) as client:
        client.post("/v1/chat/completions", json=CHAT)
    request = collector.one("POST /v1/chat/completions")
    assert request.parent == ""
    assert request.trace != collector.one("around").trace
