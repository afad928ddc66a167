"""Several prompts in one completion request: computed together, recorded once, aborted together."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_engine import LIMITS, TOKENIZATION, ScriptedEngine, scripted_server
from states import DIGESTS
from tenant_server import SHIP, Stored, deploy, tenant_server, until

from tunewright.adapters.lineage import SystemPrompt
from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import Delta, EngineStoppedError, RequestFailedError
from tunewright.generation.requests import Request
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import Admission, AnonymousAuth, ServedAdapter, Target
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.fair_scheduler import AdmissionQueue
from tunewright.serving.gateway.preprocess import RequestPreprocessor
from tunewright.serving.gateway.request_handler import RequestHandler
from tunewright.serving.gateway.schemas import CompletionRequest
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits
from tunewright.serving.tenants.releases import Candidate

pytest_plugins = ["tenant_server"]

URL = "/v1/completions"


class FailingEngine(ScriptedEngine):
    """Fails the prompt "bad" after the first token of each prompt."""

    firsts = 0

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        number = 0
        async for delta in super().deltas(request):
            number += 1
            if bytes(request.prompt_ids) == b"bad" and number == 2:
                while self.firsts % 3:
                    await asyncio.sleep(0.001)
                raise RequestFailedError("it cannot be computed")
            yield delta
            self.firsts += number == 1


def test_one_failed_prompt_ends_the_request_and_frees_the_others() -> None:
    engine = FailingEngine((0, 0, 60))
    with scripted_server(engine) as client:
        body = {"model": "base", "prompt": ["good", "bad", "good"], "max_tokens": 9}
        reply = client.post(URL, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "request_failed")
        until(lambda: engine.begun == 0)
        reply = client.post(URL, json=body | {"stream": True})
        *pieces, last = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
        assert last["error"]["code"] == "request_failed"
        assert {piece["choices"][0]["index"] for piece in pieces} == {0, 1, 2}
        assert "[DONE]" not in reply.text
        until(lambda: engine.begun == 0)
    assert engine.aborted == 6


def test_abort_before_the_first_chunk_reaches_the_client() -> None:
    async def run() -> None:
        engine = ScriptedEngine()
        preprocessor = RequestPreprocessor(TOKENIZATION, LIMITS, engine)
        body = CompletionRequest(model="base", prompt=["one", "two"])
        now, target = time.monotonic(), Target("base", None)
        requests = [
            preprocessor.request(body, target, tuple(text.encode()), tenant="acme", arrived=now) for text in body.texts
        ]
        handler = RequestHandler(requests, Admission(lambda _usage: None), engine, AdmissionQueue(engine.max_num_seqs))
        handler.abort(ApiError("The server is shutting down.", status=503))
        with pytest.raises(ApiError, match="shutting down"):
            await asyncio.wait_for(handler.complete(), 10)
        assert engine.asked == []

    asyncio.run(run())


def test_all_prompts_are_aborted_when_the_client_disconnects() -> None:
    engine = ScriptedEngine((0, 60), max_num_seqs=2)
    with scripted_server(engine) as client:
        body = {"model": "base", "prompt": ["a", "b", "c"], "stream": True}
        with client.stream("POST", URL, json=body) as reply:
            lines = reply.iter_lines()  # once it is gone, the connection is
            next(lines)
            until(lambda: engine.begun == 2)
        until(lambda: engine.begun == 0)
    assert len(engine.asked) == 2


@pytest.mark.slow
def test_prompts_do_not_time_out_behind_others_of_their_request() -> None:
    engine = ScriptedEngine((0.15, 0.15), max_num_seqs=1)
    with scripted_server(engine, queue_timeout_s=3) as client:
        reply = client.post(URL, json={"model": "base", "prompt": ["a"] * 12})
    assert reply.status_code == 200
    assert [choice["text"] for choice in reply.json()["choices"]] == ["aa"] * 12


def test_model_name_with_slashes_is_found() -> None:
    name = "meta-llama/Llama-3.1-8B"
    gateway = Gateway(ScriptedEngine(), AnonymousAuth({name: None}), TOKENIZATION, LIMITS)
    with serving(gateway.app) as url:
        for spelled in (name, name.replace("/", "%2F")):
            reply = httpx.get(f"{url}/v1/models/{spelled}", trust_env=False)
            assert (reply.status_code, reply.json()["id"]) == (200, name)


def test_request_with_several_prompts_is_recorded_once(tmp_path: Path, adapters: dict[str, Stored]) -> None:
    url = f"sqlite:///{tmp_path}/state.sqlite"
    with State(url, "ann") as state:
        deploy(state, "courts", adapters["one"])
        state.tenants.add("acme", ["courts"], Limits(concurrency=1, requests_per_minute=1))
        key, _ = state.keys.create("acme")
        with tenant_server(url, adapters) as server:
            client = server.client(key)
            how: Any = {"model": "courts", "prompt": ["one", "two!", "three"], "max_tokens": 4}
            answer = client.completions.create(**how, user="ann")
            assert answer.usage is not None
            until(lambda: state.usage.lines()[0].outcome is not None)
            (line,) = state.usage.lines()
            state.tenants.limit("acme", Limits())  # requests for models count too
            with pytest.raises(openai.NotFoundError, match=r"do not have access to it\. Available models: courts\."):
                client.models.retrieve("recipes")
            assert client.models.retrieve("courts").id == "courts"
    assert (line.prompt_tokens, line.completion_tokens) == (12, answer.usage.completion_tokens)
    assert line.end_user == "ann"
    assert answer.usage.prompt_tokens == 12


class DyingEngine(ScriptedEngine):
    """Dies after the first token of an answer of this adapter, and restarts."""

    dies_on: str | None = None

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        async for delta in super().deltas(request):
            yield delta
            if request.adapter == self.dies_on:
                raise EngineStoppedError("the engine died")


def has_shadows(state: State, count: int) -> bool:
    return len(state.usage.shadow_lines("courts")) == count


def test_shadow_whose_engine_dies_has_no_answer_and_the_live_one_stays(tmp_path: Path) -> None:
    url, engine = f"sqlite:///{tmp_path}/state.sqlite", DyingEngine()
    with State(url, "ann") as state:
        state.releases.deploy("courts", "one", DIGESTS["a"], SHIP)
        state.releases.start_candidate("courts", Candidate("two", DIGESTS["b"], None), SHIP)
        state.tenants.add("acme", ["courts"])
        key, _ = state.keys.create("acme")
        folder = ServedAdapter(tmp_path, SystemPrompt(None))
        auth = TenantAuth(State(url, serving=True), engine, lambda _name, _digest: folder, LogReporter())
        with scripted_server(engine, auth) as client:
            for number, dies_on in enumerate((None, DIGESTS["b"], None), 1):
                engine.dies_on = dies_on
                asked = {"model": "courts", "prompt": "one"}
                reply = client.post(URL, json=asked, headers={"Authorization": f"Bearer {key}"})
                assert (reply.status_code, reply.json()["choices"][0]["text"]) == (200, "aa")
                until(partial(has_shadows, state, number))
        before, died, after = state.usage.shadow_lines("courts")
    assert (before.shadow_answer, before.why_not) == (after.shadow_answer, after.why_not) == ("aa", None)
    assert (died.answer, died.shadow_answer, died.why_not) == ("aa", None, "the engine died")


def test_shadow_skips_requests_with_several_prompts(tmp_path: Path, adapters: dict[str, Stored]) -> None:
    url = f"sqlite:///{tmp_path}/state.sqlite"
    with State(url, "ann") as state:
        deploy(state, "courts", adapters["one"])
        state.tenants.add("acme", ["courts"])
        key, _ = state.keys.create("acme")
        with tenant_server(url, adapters) as server:
            client = server.client(key)
            state.releases.start_candidate("courts", Candidate("three", adapters["three"].digest, None), SHIP)
            until(lambda: any("release 2 is live" in message for message in server.reported.messages))
            choices = client.completions.create(model="courts", prompt=["one", "two"], max_tokens=4).choices
            client.completions.create(model="courts", prompt=["one"], max_tokens=4)
            until(lambda: len(state.usage.shadow_lines("courts")) == 2)
            listed, single = state.usage.shadow_lines("courts")
    assert (listed.shadow_answer, listed.why_not) == (None, "the request had 2 answers")
    assert listed.answer == f"{choices[0].text}\n\n{choices[1].text}"
    assert single.shadow_answer is not None
