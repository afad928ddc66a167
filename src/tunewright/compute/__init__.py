"""The workers that ``compute.cluster`` asks for. Modules that import Ray are reached through these functions only."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.progress import Reporter
from tunewright.core.workers import THIS_PROCESS, ModelWorkers, Workers

Needed = TypeVar("Needed")

if TYPE_CHECKING:
    from tunewright.compute.group import WorkerGroup


def open_workers(config: Config, reporter: Reporter) -> AbstractContextManager[Workers]:
    """Open the workers of ``compute.cluster``, or this process without one.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached or has no token authentication, its machines
            have another version of tunewright, Ray, Python or their libraries, or it has too few CPUs.
    """
    if config.compute.cluster is None:
        return nullcontext(THIS_PROCESS)
    _require_ray()
    from tunewright.compute.workers import open_tasks

    return open_tasks(config, reporter)


def open_model_workers(
    config: Config, check: Callable[[Needed], object], needed: Needed, release: Callable[[], object], reporter: Reporter
) -> AbstractContextManager[ModelWorkers]:
    """Open the workers of ``compute.cluster`` that keep a model each: one for each GPU.

    If the cluster has none, there is one for as many CPUs as this process computes with: equal numbers of threads
    add in equal orders. Every machine calls ``check`` with ``needed`` before any work, and a process calls
    ``release`` before it is ended, to free resources that would outlive it. Both are functions of a module.

    Raises:
        UserError: as for :func:`open_workers`; or ``check`` refuses a machine.
    """
    _require_ray()
    import torch

    from tunewright.compute.workers import open_actors

    return open_actors(config, torch.get_num_threads(), check, needed, release, reporter)


def open_group(config: Config, reporter: Reporter) -> AbstractContextManager[WorkerGroup | None]:
    """Open the processes of ``compute.cluster`` that compute one thing together: ``compute.workers``, or one a GPU.

    None: there is no cluster, or it has no GPU and the config asks for one process at most.
    """
    if config.compute.cluster is None:
        return nullcontext()
    _require_ray()
    from tunewright.compute.group import open_group as opened

    return opened(config, reporter)


def _require_ray() -> None:
    """Check that Ray is installed, before it is imported."""
    if find_spec("ray") is None:
        fix = f"Install it on every machine: {install_command('ray', 'train')}"
        raise UserError("Ray is not installed", where="compute.cluster", fix=fix)
    # Read when Ray is imported: nothing is reported to anyone, and `uv run` gives workers no other environment.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
