"""Servers for tenants on the tiny base, with adapters on disk that releases load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted_engine import until as until  # tests import it from here
from served_model import CONTEXT, LIMITS, STOPS, TOKENIZER, build_base, build_model, texts

from tunewright.adapters.lineage import SystemPrompt
from tunewright.adapters.registry import adapter_digest
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines.peft import PeftEngine
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import ServedAdapter
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.releases import Grounds

SHIP = Grounds("ship", "0123456789ab")
QUESTION = "Which court is this?"
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]


@dataclass(frozen=True)
class Stored:
    """An adapter on disk."""

    name: str
    folder: Path
    digest: str
    system_prompt: str | None = None


def store_adapters(folder: Path) -> dict[str, Stored]:
    """The three adapters of the served model, each in a folder of its own."""
    build_model().save_pretrained(folder)
    found = {}
    for name in ("one", "two", "three"):
        found[name] = Stored(name, folder / name, adapter_digest(folder / name))
    return found


class StopAfter(LogReporter):
    """A reporter that keeps its messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)

    def warn(self, message: str) -> None:
        self.messages.append(f"Warning: {message}")


@dataclass
class Running:
    """A server under test."""

    url: str
    engine: PeftEngine
    reported: StopAfter
    clients: list[Any] = field(default_factory=list)

    @property
    def loaded(self) -> set[str]:
        """Digests of the adapters in memory."""
        return set(self.engine._loaded)

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)
        self.clients.append(made)
        return made


@contextmanager
def tenant_server(
    state_url: str,
    adapters: Mapping[str, Stored],
    *,
    stop_ids: frozenset[int] = STOPS,
    max_num_seqs: int = 8,
    record_key: KeyFile | None = None,
) -> Iterator[Running]:
    """A server that answers tenants by the state."""
    by_digest = {stored.digest: stored for stored in adapters.values()}

    def locate(name: str, digest: str) -> ServedAdapter:
        if digest not in by_digest:
            raise UserError(f"The released adapter {name} is missing")
        stored = by_digest[digest]
        return ServedAdapter(stored.folder, SystemPrompt(stored.system_prompt))

    pad = TOKENIZER.pad_token_id
    engine = PeftEngine(build_base(), stop_ids=stop_ids, pad_id=pad, max_num_seqs=max_num_seqs, context_length=CONTEXT)
    reported = StopAfter()
    access = TenantAuth(State(state_url, serving=True), engine, locate, reported, record_key)
    try:
        with serving(Gateway(engine, access, texts(), LIMITS).app) as url:
            running = Running(url, engine, reported)
            yield running
            for client in running.clients:
                client.close()
    finally:
        engine.stop()


def deploy(state: State, alias: str, stored: Stored) -> None:
    """Release an adapter."""
    state.releases.deploy(alias, stored.name, stored.digest, SHIP)


def ask(
    client: openai.OpenAI, alias: str, content: str = QUESTION, max_tokens: int = 12, **more: Any
) -> tuple[str, str]:
    """The answer, and the digest in its header."""
    messages: list[Any] = [{"role": "user", "content": content}]
    raw_answer = client.chat.completions.with_raw_response.create(
        model=alias, messages=messages, max_tokens=max_tokens, **more
    )
    answer: Any = raw_answer.parse()
    return answer.choices[0].message.content, raw_answer.headers["x-tunewright-adapter"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return store_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model that says what each adapter answers alone."""
    return build_model()


@pytest.fixture
def two_tenants(state: State, adapters: dict[str, Stored]) -> dict[str, str]:
    """The keys of acme, which may call courts, and of globex, which may call recipes."""
    keys = {}
    for tenant, alias, adapter in (("acme", "courts", "one"), ("globex", "recipes", "two")):
        deploy(state, alias, adapters[adapter])
        state.tenants.add(tenant, [alias])
        keys[tenant], _ = state.keys.create(tenant)
    return keys


@pytest.fixture
def server(state_url: str, two_tenants: dict[str, str], adapters: dict[str, Stored]) -> Iterator[Running]:
    with tenant_server(state_url, adapters) as running:
        yield running
