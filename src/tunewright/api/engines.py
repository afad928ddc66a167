"""The verbs on engines that are installed beside tunewright: ``tunewright engine …``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter

if TYPE_CHECKING:
    from tunewright.engines.vllm.environment import Build, Environment


class EnginesApi:
    """Engines with an environment of their own; they belong to the machine, not to a project."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def install(
        self, name: str, *, to: Path | None = None, build: Build | None = None, torch_index: str | None = None
    ) -> Environment:
        """Make an engine's environment, or go on where an earlier call was cut off.

        Args:
            name: "vllm"; the other engines need none.
            to: its folder (None: in the user's cache).
            build: "cpu" or "cuda" (None: by whether there is a GPU).
            torch_index: where PyTorch's builds without CUDA are (None: where pip looks anyway).

        Raises:
            UserError: no such engine, no build of it for this machine, no room on the disk, or pip fails.
        """
        from tunewright.engines.vllm.environment import install

        _require_vllm(name)
        return install(self._reporter, to=to, build=build, torch_index=torch_index)

    def show(self, name: str) -> Environment:
        """Return the environment that is installed.

        Raises:
            UserError: no such engine, or it is not installed.
        """
        from tunewright.engines.vllm.environment import find

        _require_vllm(name)
        return find()


def _require_vllm(name: str) -> None:
    if name != "vllm":
        raise UserError(
            f"{name!r} has no environment of its own",
            fix="`vllm` has. The engine peft is part of tunewright, and needs none.",
        )
