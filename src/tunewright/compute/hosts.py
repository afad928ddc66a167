"""Objects in processes of their own on the machines of a Ray cluster, started again where one is lost."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from tunewright.compute.cluster import WHERE, Image, connected, image, own_image, places_for, require_same
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, duration
from tunewright.core.text import count_of

PROBE_SECONDS = 2.0
"""The time between two health checks."""
PATIENCE_SECONDS = 15.0
"""The timeout of a health check."""
START_SECONDS = 900.0
"""The longest start of an object, with its model."""

Needed = TypeVar("Needed")


class HostLostError(Exception):
    """The object's process has ended, or does not answer."""


@contextmanager
def open_hosts(
    config: Config, count: int, largest: int, check: Callable[[Needed], object], needed: Needed, reporter: Reporter
) -> Iterator[Hosts]:
    """Connect to the cluster of ``compute.cluster``, check it, and yield room for ``count`` objects at least.

    Raises:
        UserError: as for :func:`tunewright.compute.open_hosts`.
    """
    with connected(config):
        places = places_for(1)
        if places.count < count:
            what = f"Too few {places.kind}s in the cluster for {count} replicas: {places.count}"
            lower = f"Set it to {places.count} at most, or add" if places.count else "Add"
            fix = f"{lower} machines to the cluster."
            raise UserError(what, where="serve.replicas", fix=fix)
        text = config.model_dump_json()
        places.require(text, check, needed)
        machines = count_of(len(places.machines), "machine")
        number = count_of(count, "replica") if count == largest else f"{count} to {largest} replicas"
        reporter.say(f"Cluster: {machines}, {number} with one {places.kind} each")
        if places.count < largest:
            reporter.warn(
                f"The cluster has {count_of(places.count, places.kind)} now: more than {places.count} replicas need "
                "more machines."
            )
        hosts = Hosts(places.kind, text, reporter)
        try:
            yield hosts
        finally:
            hosts.give_up()


class Hosts:
    """A cluster's machines as places for objects.

    Args:
        kind: what each object occupies one of, "GPU" or "CPU".
        config: the config as JSON, which every machine must read alike.
    """

    def __init__(self, kind: str, config: str, reporter: Reporter) -> None:
        self._kind = kind
        self._config = config
        self._reporter = reporter
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """End the starts in progress, and refuse further ones."""
        self._given_up.set()

    def start(self, name: str, make: Callable[[Any], Any], setting: Any) -> Host:
        """Start an object on a machine with room, and wait until it is made.

        Args:
            name: its display name in messages.
            make: a function of a module, which makes the object from the setting. The object says whether it is
                ``healthy``; if not, its process is started again.

        Raises:
            UserError: no machine had room in time, the machine has another image, or ``make`` has raised it.
        """
        if ray.available_resources().get(self._kind, 0) < 1:
            self._reporter.warn(
                f"{name} waits for a machine with a free {self._kind}, for {duration(START_SECONDS)} at most."
            )
        resources: dict[str, Any] = {"num_gpus": 1} if self._kind == "GPU" else {"num_cpus": 1}
        actor = (
            ray.remote(_Process)
            .options(max_restarts=-1, max_concurrency=1000, scheduling_strategy="SPREAD", **resources)
            .remote()
        )
        return Host(name, actor, (image(self._config), self._config, make, setting), self._reporter, self._given_up)


class Host:
    """An object on another machine, seen from this process.

    Attributes:
        failure_reason: reason why it does not answer now; None while it does.
        restarts: the number of times that its process was started again.
        restore: called after a restart, before it answers again; it may call :meth:`call`.
    """

    def __init__(
        self, name: str, actor: Any, making: tuple[Any, ...], reporter: Reporter, given_up: threading.Event
    ) -> None:
        self.restarts = 0
        self.failure_reason: str | None = f"{name} is starting."
        self.restore: Callable[[], None] = lambda: None
        self._name = name
        self._actor = actor
        self._making = making
        self._reporter = reporter
        self._given_up = given_up
        self._stopping = threading.Event()
        try:
            self._begin()
        except BaseException:
            ray.kill(actor)
            raise
        self.failure_reason = None
        self._thread = threading.Thread(target=self._watch, name="tunewright-host", daemon=True)
        self._thread.start()

    async def events(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Yield what an async generator method of the object yields; closing this ends it there.

        Raises:
            HostLostError: the process has ended.
        """
        found = self._actor.events.options(num_returns="streaming").remote(method, *arguments)
        done = False
        try:
            async for reference in found:
                yield await reference
            done = True
        except RayError as error:
            raise HostLostError(f"{self._name} was lost.") from error
        finally:
            if not done:
                with suppress(RayError):
                    ray.cancel(found)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Return everything that an async generator method of the object yields.

        Raises:
            HostLostError: the process has ended.
        """
        try:
            return list(ray.get(self._actor.collect.remote(method, *arguments), timeout=START_SECONDS))
        except RayError as error:
            raise HostLostError(f"{self._name} was lost.") from error

    def stop(self) -> None:
        """End the process."""
        self._stopping.set()
        ray.kill(self._actor)  # first: the thread may be waiting for it to start
        self._thread.join()
        self.failure_reason = "The server is shutting down."

    def _begin(self) -> None:
        """Have the process make the object."""
        begun = self._actor.begin.remote(*self._making)
        until = time.monotonic() + START_SECONDS
        try:
            while not ray.wait([begun], timeout=1)[0]:
                if self._given_up.is_set():
                    raise UserError(f"{self._name} was not started: the server is shutting down")
                if time.monotonic() > until:
                    raise GetTimeoutError
            ray.get(begun)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except RayError as error:
            what = f"{self._name} did not start: {type(error).__name__}"
            raise UserError(what, where=WHERE, fix="Check the machines and their room with `ray status`.") from None

    def _watch(self) -> None:
        """Ask the process at intervals, and set the object up again once Ray has started a new process for it."""
        whole = True
        while not self._stopping.wait(PROBE_SECONDS):
            try:
                if not ray.get(self._actor.begun.remote(), timeout=PATIENCE_SECONDS):
                    self._lost()
                    whole = False
                    self._begin()
                    self.restarts += 1
                if not whole:
                    self.restore()
                    whole = True
                if self.failure_reason is not None:
                    self.failure_reason = None
                    self._reporter.say(f"{self._name} is running again.")
            except Exception as error:  # noqa: BLE001 - whatever Ray raises: it does not answer
                self._lost(f" ({error})" if isinstance(error, UserError) else "")

    def _lost(self, why: str = "") -> None:
        if self.failure_reason is None and not self._stopping.is_set():
            self._reporter.warn(f"{self._name} was lost and is started again{why}.")
        self.failure_reason = f"{self._name} was lost and is restarting. Try again in a minute."


class _Process:
    """The process on the other machine; its methods are called by Ray in one event loop."""

    def __init__(self) -> None:
        self._object: Any = None

    async def begin(self, expected: Image, config: str, make: Callable[[Any], Any], setting: Any) -> None:
        """Make the object, in a thread: it may take minutes."""
        require_same(expected, own_image(config), socket.gethostname())
        self._object = await asyncio.to_thread(make, setting)

    async def begun(self) -> bool:
        """Return whether the object is there: a process that Ray has started again has none."""
        if self._object is not None and not self._object.healthy:
            os._exit(1)  # Ray starts another one
        return self._object is not None

    async def events(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Yield the events of a method; a process without the object is lost for the caller."""
        if self._object is None:
            raise RuntimeError("the process was started again")
        async with aclosing(getattr(self._object, method)(*arguments)) as found:
            async for event in found:
                yield event

    async def collect(self, method: str, *arguments: Any) -> list[Any]:
        """Return the events of a method."""
        return [event async for event in self.events(method, *arguments)]
