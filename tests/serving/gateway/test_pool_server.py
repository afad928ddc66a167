"""A server over engines at addresses: tenants, canaries, limits and metrics, while one stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from engine_kinds import COMPILER
from prometheus_client.parser import text_string_to_metric_families
from recorded_engine import BASE, ORIGIN
from served_model import LIMITS, build_base, build_model, expected_answer, running_engine, texts
from tenant_server import SHIP, Stored, deploy, until

from tunewright.adapters.lineage import SystemPrompt
from tunewright.core.progress import LogReporter
from tunewright.engines.peft import PeftEngine
from tunewright.engines.pool import EnginePool
from tunewright.serving.engine_service import EngineApp
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import ServedAdapter
from tunewright.serving.gateway.metrics import exposed
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits
from tunewright.serving.tenants.releases import Candidate

pytest_plugins = ["tenant_server"]

TOKENS = 16
QUESTIONS = [f"Which court is number {number}?" for number in range(12)]
ALIASES = {"acme": "courts", "globex": "recipes"}


@dataclass
class Server:
    """A server over engines at addresses, by address."""

    url: str
    metrics_url: str
    engines: dict[str, PeftEngine]

    def ask(self, key: str, alias: str, question: str) -> httpx.Response:
        body = {"model": alias, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS}
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)

    def metrics(self, name: str, label: str = "engine") -> dict[str, float]:
        """The values by engine, or by another label."""
        page = httpx.get(self.metrics_url, trust_env=False).text
        samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
        found = [each for each in samples if each.name == f"tunewright_{name}"]
        return {each.labels.get(label, ""): each.value for each in found}


@contextmanager
def server(state_url: str, adapters: Sequence[Stored]) -> Iterator[Server]:
    """A server over two engines at addresses."""
    by_digest = {stored.digest: stored for stored in adapters}

    def locate(_name: str, digest: str) -> ServedAdapter:
        return ServedAdapter(by_digest[digest].folder, SystemPrompt(None))

    with ExitStack() as held:
        engines: dict[str, PeftEngine] = {}
        for _ in range(2):
            engine = held.enter_context(running_engine(build_base(), max_num_seqs=4))
            app = EngineApp(engine, ORIGIN, lambda _name, digest: by_digest[digest].folder, COMPILER).app
            engines[held.enter_context(serving(app))] = engine
        pool = EnginePool(list(engines), BASE, "none", LogReporter())
        held.callback(pool.stop)
        access = TenantAuth(State(state_url, serving=True), pool, locate, LogReporter())
        gateway = Gateway(pool, access, texts(), LIMITS)
        metrics_url = held.enter_context(exposed(gateway.metrics, "127.0.0.1", 0))
        yield Server(held.enter_context(serving(gateway.app)), metrics_url, engines)


@pytest.mark.slow
def test_tenants_get_their_own_adapters_answers_over_engines_of_which_one_stops(
    tmp_path: Path, adapters: dict[str, Stored]
) -> None:
    reference = build_model()
    names = {stored.digest: name for name, stored in adapters.items()}
    expected = {
        (name, question): expected_answer(reference, name, question, TOKENS)
        for name in adapters
        for question in QUESTIONS
    }
    url = f"sqlite:///{tmp_path}/state.sqlite"
    with State(url, "ann") as state:
        deploy(state, "courts", adapters["one"])
        deploy(state, "recipes", adapters["two"])
        state.releases.start_candidate("courts", Candidate("three", adapters["three"].digest, 0.5), SHIP)
        keys = {}
        for tenant, alias in ALIASES.items():
            state.tenants.add(tenant, [alias])
            keys[tenant], _ = state.keys.create(tenant)
        state.tenants.add("initech", ["recipes"], Limits(requests_per_minute=1))
        limited, _ = state.keys.create("initech")
        with server(url, list(adapters.values())) as running:
            half = threading.Barrier(2)

            def client(tenant: str, question: str, at: int) -> tuple[str, str]:
                """Return the adapter that answered, or the error's code."""
                if at == len(QUESTIONS):
                    half.wait(300)
                reply = running.ask(keys[tenant], ALIASES[tenant], question)
                if reply.status_code != 200:
                    return tenant, reply.json()["error"]["code"]
                answered = names[reply.headers["x-tunewright-adapter"]]
                text = reply.json()["choices"][0]["message"]["content"]
                assert text == expected[answered, question]
                return tenant, answered

            asked = [(tenant, question) for _ in range(2) for question in QUESTIONS for tenant in ALIASES]
            with ThreadPoolExecutor(8) as pool:
                pending = [pool.submit(client, *each, at) for at, each in enumerate(asked)]
                half.wait(300)
                stopped, other = running.engines
                running.engines[stopped].stop()
                found = [each.result() for each in pending]
            outcomes: dict[str, set[str]] = {
                tenant: {answer for who, answer in found if who == tenant} for tenant in keys
            }
            # An answer that had begun where the engine stopped fails with an error that says so.
            assert outcomes["acme"] - {"engine_stopped"} == {"one", "three"}
            assert outcomes["globex"] - {"engine_stopped"} == {"two"}
            assert sum(answer == "engine_stopped" for _, answer in found) <= 4, "at most those that ran there"
            until(lambda: running.metrics("engine_up") == {stopped: 0, other: 1})
            assert running.metrics("engine_adapters")[other] == 3
            codes = [running.ask(limited, "recipes", QUESTIONS[0]).status_code for _ in range(2)]
            assert codes == [200, 429]
            assert running.ask(keys["globex"], "courts", QUESTIONS[0]).status_code == 404
            state.releases.promote("courts")
            until(lambda: client("acme", QUESTIONS[0], 0) == client("acme", QUESTIONS[1], 0) == ("acme", "three"))
