"""A server with two tenants, each with its own adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from served_model import build_model
from tenant_server import Running, Stored, deploy, store_adapters, tenant_server

from tunewright.serving.tenants import State


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return store_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model that says what each adapter answers alone."""
    return build_model()


@pytest.fixture
def state(state_url: str) -> Iterator[State]:
    with State(state_url, "ann") as opened:
        yield opened


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
