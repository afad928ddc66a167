"""Ray clusters of several raylets on this machine: the one that all tests share, and commands that use it."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from compute_helpers import built, many_pairs
from data_helpers import Pair

from tunewright.config import ComputeConfig, Config
from tunewright.core.workers import THIS_PROCESS

HERE = Path(__file__).resolve().parents[2]
PATH = f"{HERE / 'src'}:{HERE / 'tests' / 'compute'}"
"""What a raylet's processes import: this package, and functions of tests."""
TOKEN = secrets.token_hex(32)
"""Ray keeps the first token of a process, so all clusters of a run of tests have one."""
WAIT_S = 240
ONE: dict[str, Any] = {"num_cpus": 1}
"""A machine with one CPU."""


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
    import ray
    from ray.cluster_utils import Cluster
    from ray.experimental import internal_kv

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
            if ray.is_initialized():  # with another cluster, whose client was forgotten
                internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


class Machines:
    """The machines of a cluster, apart from its head."""

    def __init__(self, cluster: Any, client_port: int) -> None:
        self.cluster, self.client_port = cluster, client_port
        self._there: list[tuple[Any, dict[str, Any]]] = []

    def have(self, *wanted: dict[str, Any]) -> list[Any]:
        """Have exactly the machines of these options; those that are there already stay."""
        there = [(node, options) for node, options in self._there if node in self.cluster.worker_nodes]
        kept = []
        for options in wanted:
            match = next((each for each in there if each[1] == options), None)
            if match is None:
                match = (self.cluster.add_node(**options), options)
            else:
                there.remove(match)
            kept.append(match)
        self._there = kept
        for node in self.cluster.worker_nodes - {node for node, _ in kept}:
            self.kill(node)
        wait_until(lambda: self.alive() == len(kept))
        return [node for node, _ in kept]

    def kill(self, node: Any) -> None:
        """Kill a machine."""
        self.cluster.remove_node(node, allow_graceful=False)

    def alive(self) -> int:
        """Return the number of machines that Ray counts as alive."""
        return sum(bool(node["Alive"]) for node in self.cluster.global_state.node_table()) - 1


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def command(folder: Path, *arguments: str, cluster: str = "auto") -> subprocess.Popen[str]:
    """A command in a process of its own, which a test kills or stops."""
    return subprocess.Popen(
        [sys.executable, "-m", "tunewright", *arguments, "--cluster", cluster],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for a condition, which the process must meet before it ends."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    """A cluster, to which this process stays connected: the processes of its workers serve one test after the other."""
    # As small as Ray allows: larger results are written to the disk.
    port, store = free_port(), 80 * 2**20
    with token_required(), raylets(ray_client_server_port=port, object_store_memory=store) as cluster:
        from tunewright.compute.cluster import connected

        with connected(Config(compute=ComputeConfig(cluster="auto"))):
            yield Machines(cluster, port)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Pair], dict[str, str]]:
    """Pairs, and the files of their dataset without a cluster."""
    pairs = many_pairs(3000)
    return pairs, built(tmp_path_factory.mktemp("large") / "whole", pairs, THIS_PROCESS)[0]
