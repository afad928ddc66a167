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
from typing import Any, NoReturn
from urllib.parse import urlsplit

import ray
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
_ANSWER_S = 120.0  # time for a machine to start its first process, with a cold disk
_CHECK_S = 3600.0  # a base of 70B parameters is read once, from a cold disk

_EQUAL = "Use one image on all machines: the same tunewright, Ray, Python and libraries."
_PACKAGES = (
    *("ray", "numpy", "scipy"),
    *("torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "bitsandbytes", "llguidance"),
)

Node = Mapping[str, Any]
"""A machine of the cluster, as Ray describes it."""


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Connect to the cluster that the config names, or stay with the same one if this process is connected to it."""
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


def require_available(kind: str, there: int, wanted: int | None) -> int:
    """Return the number of processes with a CPU or GPU each: the wanted number, or as many as exist."""
    if wanted is not None and wanted > there:
        fix = "Lower compute.workers, or add machines to the cluster."
        raise UserError(f"Too few {kind}s in the cluster: {there} (compute.workers: {wanted})", where=WHERE, fix=fix)
    return wanted or there


def _connect(cluster: str) -> None:
    """Start or join a cluster."""
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
        # A client server answers with its own traceback, whose last line is the reason.
        reason = lines[-1 if "Traceback (most recent call last):" in lines else 0]
        fix = "Check that it runs there (ray status), with the same versions of Ray and Python and the same token."
        raise UserError(f"No connection to the cluster: {reason}", where=f"{WHERE}: {cluster}", fix=fix) from None
    finally:
        # Ray ends the process at SIGTERM, but the command line handles SIGTERM itself.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


def _require_reachable(address: str) -> None:
    """Refuse an address without an answer, or of another machine if this one uses no token authentication."""
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


@dataclass(frozen=True)
class Image:
    """The versions and digests that decide a result, and the config as JSON, from which every machine computes them."""

    config: str
    facts: Mapping[str, str]

    def require_here(self) -> None:
        """Check this process's machine against the image; it may have joined after the others were compared."""
        self.require(_facts(self.config), socket.gethostname())

    def require(self, theirs: Mapping[str, str], host: str) -> None:
        unequal = [
            f"{name} {theirs.get(name)} (here {own})" for name, own in self.facts.items() if theirs.get(name) != own
        ]
        if unequal:
            raise UserError(f"The machine {host} has {', '.join(unequal)}", where=WHERE, fix=_EQUAL)


@cache
def _facts(config: str) -> dict[str, str]:
    """Return this machine's versions and digests. A machine that reads the config differently has other defaults."""
    try:
        read = digest(Config.model_validate_json(config).model_dump(mode="json"))[:12]
    except ValidationError:
        read = "not valid there"
    # Two states of a repository can have the same version.
    folder, source = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    found = {"tunewright": f"{__version__} ({source.hexdigest()[:12]})", "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return {**found, "config": read}


def _probe(config: str) -> tuple[dict[str, str], bool]:
    """Return a machine's versions and digests, and whether its processes require a token."""
    return _facts(config), is_token_auth_enabled()


@dataclass(frozen=True)
class Cluster:
    """Machines of a cluster with equal software."""

    machines: tuple[Node, ...]
    image: Image

    @classmethod
    def of_equal(cls, machines: Sequence[Node], config: Config) -> Cluster:
        """Return these machines, once each has answered and has the same image as this one."""
        text = config.model_dump_json()
        found = cls(tuple(machines), Image(text, _facts(text)))
        here = ray.util.get_node_ip_address()
        for host, (theirs, has_token) in found.ask(_probe, text, seconds=_ANSWER_S):
            if host != here and not _is_loopback(host) and not has_token:
                _refuse(host)
            found.image.require(theirs, host)
        return found

    def ask(self, question: Callable[..., Any], needed: Any, seconds: float = _CHECK_S) -> list[tuple[str, Any]]:
        """Call a function of a module on every machine immediately, busy or not; return names and answers.

        Raises:
            UserError: one does not answer within ``seconds``, cannot run tunewright, or raises a UserError, which then
                names the machine.
        """
        ask = ray.remote(num_cpus=0, max_retries=0)(question)
        asked = []
        for node in self.machines:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            reference = ask.options(scheduling_strategy=there).remote(needed)
            asked.append((str(node["NodeManagerAddress"]), reference))
        return [(host, _answer(host, reference, seconds)) for host, reference in asked]


def _answer(host: str, reference: Any, seconds: float) -> Any:
    try:
        return ray.get(reference, timeout=seconds)
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


def require_head() -> None:
    """Check that the head answers, before Ray is asked for anything.

    Without a head, Ray ends the process: immediately and without a message if it then touches objects of a lost
    machine, otherwise after a minute.

    Raises:
        UserError: the head's address does not answer.
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
    if ray.util.client.ray.is_connected():
        return True
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _REACH_S).close()
    except OSError:
        return False
    return True
