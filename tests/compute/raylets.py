"""Ray clusters of several raylets on this machine."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterator
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

    with pytest.MonkeyPatch.context() as patch:
        # Ray's client server forks while gRPC's threads run. With gRPC's fork handlers, a child in three died on a busy
        # machine before it could say why.
        patch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
        # On a busy machine, the process that serves one client may take longer to start than Ray's 30 seconds.
        patch.setenv("RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", "200")
        # Ray's 15 would have each worker wait for all other work of the machine.
        patch.setenv("RAY_worker_niceness", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **options})
        patch.setenv("RAY_ADDRESS", cluster.address)
        try:
            if port := options.get("ray_client_server_port"):
                # Ray starts this server last and does not wait for it.
                wait_until(lambda: _listens(port))
            yield cluster
        finally:
            cluster.shutdown()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
