"""The workers that ``compute.cluster`` asks for. Ray is imported by ``cluster`` alone, which nothing else imports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.workers import THIS_PROCESS, Workers


@contextmanager
def open_workers(config: Config, reporter: Reporter) -> Iterator[Workers]:
    """Yield the workers of ``compute.cluster``, or this process without one.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached or has no token authentication, its machines
            have another version of tunewright, Ray, Python or their libraries, or it has too few CPUs.
    """
    if config.compute.cluster is None:
        yield THIS_PROCESS
        return
    if find_spec("ray") is None:
        fix = "Install it on every machine: pip install 'tunewright[ray]'"
        raise UserError("Ray is not installed", where="compute.cluster", fix=fix)
    from tunewright.compute.cluster import open_cluster

    with open_cluster(config, reporter) as workers:
        yield workers
