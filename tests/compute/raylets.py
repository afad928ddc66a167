"""Ray clusters of several raylets on this machine."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[2]
PATH = f"{HERE / 'src'}:{HERE / 'tests' / 'compute'}"
"""What a raylet's processes import: this package, and functions of tests."""
TOKEN = secrets.token_hex(32)
"""Ray keeps the first token of a process, so all clusters of a run of tests have one."""


@contextmanager
def token_required() -> Iterator[None]:
    """Require tokens, as off loopback: Ray reads this when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("PYTHONPATH", PATH)
        yield


@contextmanager
def raylets(**options: Any) -> Iterator[Any]:
    """A head without CPUs for workers, and the address in RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        try:
            yield cluster
        finally:
            cluster.shutdown()
