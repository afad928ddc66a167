"""Workers on a Ray cluster: parts of a step as tasks, after a check that every machine has equal software.

A lost machine costs time only: Ray runs its parts again elsewhere, and results are taken in the order of the parts.
"""

from __future__ import annotations

import gc
import hashlib
import ipaddress
import logging
import os
import pickle
import platform
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

# Ray reads these when it is imported. Nothing is reported to anyone, and `uv run` gives workers no other environment.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy
import numpy.typing
import ray
import scipy
from pydantic import ValidationError
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunewright._version import __version__
from tunewright.compute.head import AGAIN, has_head, require_head
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import count_of
from tunewright.core.workers import ONE_CPU, Machine, Needs, Part, Result, Shared, Step, Workers, on_machine

WHERE = "compute.cluster"
_REACH_S = 10.0
_ANSWER_S = 120.0  # for a machine that starts its first process, with a cold disk
_LOOK_S = 3.0  # between two looks at the head and the machines while a part is computed
_REPLACED_S = 600.0  # for a lost machine to be replaced, if no other can do its work
_STOP_S = 15.0  # for parts that are being stopped: a training saves its last step
CHECK_S = 3600.0  # a base of 70B parameters is read once, from a cold disk
RETRIES = 3  # runs of a part after the first, if its machine or process is lost

_MODEL_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "bitsandbytes", "llguidance")

Node = Mapping[str, Any]
"""A machine of the cluster, as Ray describes it."""
Image = Mapping[str, str]
"""Names of what decides a result, with their versions or digests."""


@contextmanager
def open_cluster(config: Config, reporter: Reporter) -> Iterator[Workers]:
    """Connect to the cluster that the config names, check it, and yield its workers.

    Raises:
        UserError: as for :func:`tunewright.compute.open_workers`.
    """
    with connected(config):
        machines = machines_with("CPU")
        cpus = sum(int(node["Resources"]["CPU"]) for node in machines)
        count = _count(config, cpus)
        text = config.model_dump_json()
        require_equal(machines, text)
        reporter.say(f"Cluster: {count_of(len(machines), 'machine')} with {count_of(cpus, 'CPU')}")
        if ray.available_resources().get("CPU", 0) < 1:
            reporter.warn("Other work uses every CPU of the cluster: this command waits for it.")
        # More parts than CPUs, so that no worker waits for this process to send the next one.
        yield _RayWorkers(machines, count, 2 * count if count == cpus else count, image(text), text, reporter)


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


def _count(config: Config, cpus: int) -> int:
    wanted = config.compute.workers
    if not cpus:
        raise UserError("The cluster has no machine with a CPU for workers", where=WHERE, fix="Add one to it.")
    if wanted is not None and wanted > cpus:
        fix = "Lower compute.workers, or add machines to the cluster."
        raise UserError(f"Too few CPUs in the cluster: {cpus} (compute.workers: {wanted})", where=WHERE, fix=fix)
    return wanted or cpus


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


_Packed = list[numpy.typing.NDArray[numpy.uint8]]


def _packed(value: Any) -> _Packed:
    """Return a value as bytes, and its arrays apart, none of which Ray copies.

    Ray's own pickler asks Python code about each object, which takes twice the time for rows. The bytes are arrays too,
    because Ray's client cannot forward other buffers.
    """
    buffers: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))]
    parts += [buffer.raw() for buffer in buffers]
    return [numpy.frombuffer(part, dtype=numpy.uint8) for part in parts]


def _unpacked(packed: _Packed) -> Any:
    data, *arrays = packed
    return pickle.loads(data.data, buffers=arrays)


class _RayWorkers:
    """Tasks of a cluster.

    Args:
        nodes: the machines that were there at the start, as Ray describes them.
        count: number of parts computed at once, if each takes one CPU.
        ahead: number of parts sent and not yet returned; it bounds the memory of this process and of the cluster.
        ours: the image that every machine must have, those that join later too.
        config: the config, as the image's.
        reporter: is warned of parts that wait for a machine.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        count: int,
        ahead: int,
        ours: Image,
        config: str,
        reporter: Reporter,
    ) -> None:
        self.count, self._ahead, self._image, self._config, self._nodes = count, ahead, ours, config, nodes
        self._reporter = reporter
        self.machines = [_machine(node) for node in nodes]

    def check(self, question: Callable[[Shared], object], shared: Shared) -> None:
        """Call a function on each machine."""
        for _ in asked(self._nodes, question, shared, seconds=CHECK_S):
            pass

    def map(
        self,
        step: Step[Shared, Part, Result],
        shared: Shared,
        parts: Iterable[Part],
        task: Task,
        batch: int = 1,
        needs: Needs = ONE_CPU,
    ) -> Iterator[Result]:
        """Yield the result of each part, in order."""
        run = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=RETRIES)(_run)
        require_head()
        held = ray.put(_packed(shared))
        source = iter(parts)
        sent: deque[Any] = deque()
        try:
            while some := list(islice(source, batch)):
                require_head()
                sent.append(run.remote(self._image, self._config, step, [held], _packed(some)))
                if len(sent) >= self._ahead:
                    yield from self._taken(sent[0], task, needs)
                    sent.popleft()
            while sent:
                yield from self._taken(sent[0], task, needs)
                sent.popleft()
        finally:
            if sent and ray.is_initialized() and has_head():
                _stop(list(sent))

    def _taken(self, reference: Any, task: Task, needs: Needs) -> list[Any]:
        """Return the results of some parts, and count what they have done."""
        collecting = gc.isenabled()
        gc.disable()  # each of some thousand new objects would have it look at all rows
        try:
            first_done([reference], needs, self._reporter)
            require_head()
            packed, steps = ray.get(reference)
            results = _unpacked(packed)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ConnectionError as error:  # of Ray's client
            what = f"The connection to the cluster is lost: {error}"
            raise UserError(what, where=WHERE, fix=AGAIN) from None
        except RayError as error:
            require_head()
            what = f"The cluster lost a part of the work {RETRIES + 1} times: {type(error).__name__}"
            fix = "Check its machines and their memory (ray status), and run the same command again."
            raise UserError(what, where=WHERE, fix=fix) from None
        finally:
            if collecting:
                gc.enable()
        task.advance(steps)
        return list(results)


def first_done(references: Sequence[Any], needs: Needs, reporter: Reporter) -> Any:
    """Wait for the first of some parts, as long as the head answers and a machine has room for one; return it.

    Raises:
        UserError: the head is lost, or no machine has had room for minutes.
    """
    lost: float | None = None
    while not (done := ray.wait(list(references), timeout=_LOOK_S, fetch_local=False)[0]):
        require_head()
        if any(_machine(node).room(needs) for node in ray.nodes() if node["Alive"]):
            lost = None
        elif lost is None:
            lost = time.monotonic()
            reporter.warn("The cluster has lost every machine that can compute this: waiting for another.")
        elif time.monotonic() - lost > _REPLACED_S:
            what = f"The cluster has had no machine that can compute this for {_REPLACED_S:.0f} s"
            raise UserError(what, where=WHERE, fix="Add machines, and run the same command again.")
    return done[0]


def _machine(node: Node) -> Machine:
    resources = node["Resources"]
    return Machine(str(node["NodeManagerAddress"]), int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _stop(sent: list[Any]) -> None:
    """Cancel parts, and wait for those in progress: their files are free for the next command then."""
    for reference in sent:
        ray.cancel(reference)
    ray.wait(sent, num_returns=len(sent), timeout=_STOP_S)


class _Counter:
    """A task that counts the steps of some parts, for the process that shows the progress."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count the steps."""
        del note
        self.steps += steps

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Nothing: the parts of a step have no curves."""


_kept: dict[str, Any] = {}
"""In a worker: what the parts of the current step share, by its object's id. It is read once, not for each part."""


def _run(expected: Image, config: str, step: Step[Any, Any, Any], held: list[Any], parts: _Packed) -> Any:
    """Compute some parts in a worker, and count what they have done."""
    require_same(expected, own_image(config), socket.gethostname())
    reference = held[0]
    name = reference.hex()
    if name not in _kept:
        _kept.clear()
        _kept[name] = _unpacked(ray.get(reference))
    task = _Counter()
    return _packed([step(_kept[name], part, task) for part in _unpacked(parts)]), task.steps


own_image = cache(image)
