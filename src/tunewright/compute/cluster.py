"""The connection to a Ray cluster, and the checks that its head answers and all machines have equal software."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import numpy
import ray
import scipy
from pydantic import ValidationError
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, RayTaskError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunewright._version import __version__
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.workers import on_machine

WHERE = "compute.cluster"
AGAIN = "Start the cluster again, and run the same command again."
_REACH_S = 10.0
_TRIES = 3
_ANSWER_S = 120.0  # for a machine that starts its first process, with a cold disk
CHECK_S = 3600.0  # a base of 70B parameters is read once, from a cold disk

_MODEL_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "bitsandbytes", "llguidance")

Node = Mapping[str, Any]
"""A machine of the cluster, as Ray describes it."""
Image = Mapping[str, str]
"""Names of what decides a result, with their versions or digests."""


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Connect to the cluster that the config names, or stay with the same one if this process is connected to it.

    Raises:
        UserError: as for :func:`tunewright.compute.open_workers`.
    """
    before = ray.is_initialized()
    if before and config.compute.cluster != "auto":
        fix = "Set compute.cluster: auto to use that one, or call ray.shutdown()."
        raise UserError("This process is already connected to a Ray cluster", where=WHERE, fix=fix)
    if not before:
        _connect(str(config.compute.cluster))
    try:
        yield
    finally:
        if not before:
            ray.shutdown()


def machines_with(resource: str, least: int = 1) -> list[Node]:
    """Return the cluster's machines that have at least this much of a resource (``CPU``, ``GPU``)."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) >= least]


@dataclass(frozen=True)
class Places:
    """Room for processes with a model each: GPUs, or CPUs if the cluster has no GPU."""

    kind: Literal["GPU", "CPU"]
    machines: tuple[Node, ...]
    count: int

    def require(self, config: str, check: Callable[[Any], object], needed: object) -> None:
        """Check that the machines have equal software, and what each process needs.

        Args:
            config: the config as JSON.
            check: a function of a module, which every machine calls with ``needed``.
            needed: what every machine needs.

        Raises:
            UserError: as for :func:`require_equal`, or ``check`` refuses a machine.
        """
        require_equal(self.machines, config)
        for _ in asked(self.machines, check, needed, seconds=CHECK_S):
            pass


def places_for(cpus: int) -> Places:
    """Return the cluster's places, each with a GPU or with this many CPUs."""
    if machines := machines_with("GPU"):
        return Places("GPU", tuple(machines), sum(int(node["Resources"]["GPU"]) for node in machines))
    machines = machines_with("CPU", cpus)
    return Places("CPU", tuple(machines), sum(int(node["Resources"]["CPU"]) // cpus for node in machines))


def _connect(cluster: str) -> None:
    """Start or join a cluster.

    Raises:
        UserError: it cannot be reached, has another version of Ray or Python, or would accept commands from anyone.
    """
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray would print notices of lost machines on stdout, where a command's result belongs.
    ray._private.worker._worker_logs_enabled = False
    if cluster == "local":
        if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            _refuse("this machine")
        options = {**quiet, "address": "local", "include_dashboard": False}
    else:
        address = os.environ.get("RAY_ADDRESS", cluster) if cluster == "auto" else cluster
        if address != "auto":
            _require_reachable(address)
        options = {**quiet, "address": address}
    stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        fix = "Check that it runs there (ray status), with the same versions of Ray and Python and the same token."
        raise UserError(f"No connection to the cluster: {lines[0]}", where=f"{WHERE}: {cluster}", fix=fix) from None
    finally:
        # Ray ends the process at SIGTERM, and the command line has its own way to do so.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


def _require_reachable(address: str) -> None:
    """Refuse an address that nobody answers at, or that is another machine's without token authentication here."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = str(parts.hostname), parts.port
    except ValueError:
        host, port = "", None
    if not host or port is None:
        raise UserError("Not the address of a cluster", where=f"{WHERE}: {address}", fix="Use HOST:PORT.")
    if not _is_loopback(host) and not is_token_auth_enabled():
        _refuse(host)
    try:
        socket.create_connection((host, port), _REACH_S).close()
    except OSError as error:
        fix = "Check the address, and that the cluster runs (ray status)."
        what = f"The cluster cannot be reached: {error.strerror or error}"
        raise UserError(what, where=f"{WHERE}: {address}", fix=fix) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse(host: str) -> NoReturn:
    raise UserError(
        f"No token authentication on {host}: anyone who reaches such a cluster can run code on it",
        where=WHERE,
        fix="Start the cluster and this command with RAY_AUTH_MODE=token and the same token in RAY_AUTH_TOKEN_PATH.",
    )


def image(config: str) -> Image:
    """Return the versions and digests on a machine that decide a result.

    Args:
        config: the config as JSON. A machine that reads it in another way has other defaults or keys.
    """
    try:
        read = digest(Config.model_validate_json(config).model_dump(mode="json"))[:12]
    except ValidationError:
        read = "not valid there"
    return {
        "tunewright": f"{__version__} ({_source_digest()[:12]})",
        "ray": ray.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        **{name: _version(name) for name in _MODEL_PACKAGES},
        "config": read,
    }


own_image = cache(image)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


@cache
def _source_digest() -> str:
    """Return the SHA-256 of this package's modules: two states of a repository have one version."""
    folder = Path(__file__).parents[1]
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        whole.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return whole.hexdigest()


def _probe(config: str) -> tuple[Image, bool]:
    """Return the image of the machine that this runs on, and whether its processes require a token."""
    return image(config), is_token_auth_enabled()


def require_equal(machines: Sequence[Node], config: str) -> None:
    """Ask every machine for its image.

    Raises:
        UserError: one does not answer, differs, or accepts commands from anyone.
    """
    here, ours = ray.util.get_node_ip_address(), image(config)
    for host, (theirs, has_token) in asked(machines, _probe, config):
        if host != here and not _is_loopback(host) and not has_token:
            _refuse(host)
        require_same(ours, theirs, host)


def asked(
    machines: Sequence[Node], question: Callable[..., Any], *arguments: Any, seconds: float = _ANSWER_S
) -> Iterator[tuple[str, Any]]:
    """Have every machine answer a question at once, and yield their addresses and answers.

    Args:
        machines: asked whatever else they do.
        question: a function of a module.
        arguments: the function's.
        seconds: time that a machine has to answer.

    Raises:
        UserError: one does not answer, cannot run tunewright, or raises a UserError, which then names the machine.
    """
    ask = ray.remote(num_cpus=0, max_retries=0)(question)
    references = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(*arguments)
        for node in machines
    ]
    for node, reference in zip(machines, references, strict=True):
        host = str(node["NodeManagerAddress"])
        try:
            answer = ray.get(reference, timeout=seconds)
        except GetTimeoutError:
            what = f"The machine {host} did not answer within {seconds:.0f} s"
            raise UserError(what, where=WHERE, fix="Check it with `ray status`.") from None
        except (NodeDiedError, TaskUnschedulableError):
            # Its health checks fail for about half a minute before Ray counts it as lost.
            what = f"The machine {host} was lost before it answered"
            fix = "Run the same command again once `ray status` no longer lists it."
            raise UserError(what, where=WHERE, fix=fix) from None
        except (RayError, RuntimeError) as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                raise on_machine(host, error.cause) from None
            what = f"The machine {host} cannot run tunewright: {str(error).strip().splitlines()[-1]}"
            raise UserError(what, where=WHERE, fix=_EQUAL) from None
        yield host, answer


_EQUAL = "Use one image on all machines: the same tunewright, Ray, Python and libraries."


def require_same(ours: Image, theirs: Image, host: str) -> None:
    unequal = [f"{name} {theirs.get(name)} (here {mine})" for name, mine in ours.items() if theirs.get(name) != mine]
    if unequal:
        raise UserError(f"The machine {host} has {', '.join(unequal)}", where=WHERE, fix=_EQUAL)


def is_client() -> bool:
    """Return whether this process is connected by Ray's client, whose connection ends with the head."""
    connected: bool = ray.util.client.ray.is_connected()
    return connected


def require_head() -> None:
    """Check that the head answers, before Ray is asked for anything.

    Without a head, Ray ends the process: immediately and without a message if it then touches objects of a lost
    machine, otherwise after a minute.

    Raises:
        UserError: nobody answers at its address.
    """
    for attempt in range(_TRIES):
        if has_head():
            return
        if attempt < _TRIES - 1:
            time.sleep(1)
    head = ray.get_runtime_context().gcs_address
    raise UserError(f"The head of the cluster is lost: {head} does not answer", where=WHERE, fix=AGAIN)


def has_head() -> bool:
    """Return whether the head answers; for Ray's client, whose connection reports it, always true."""
    if is_client():
        return True
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _REACH_S).close()
    except OSError:
        return False
    return True
