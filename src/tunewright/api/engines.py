"""Commands on engines that have their own environment: ``tunewright engine …``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter

if TYPE_CHECKING:
    from tunewright.engines.vllm.environment import Build, Environment


class EnginesApi:
    """Methods on engines with their own environment, which belong to the machine and not to a project."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def install(
        self, name: str, *, to: Path | None = None, build: Build | None = None, torch_index: str | None = None
    ) -> Environment:
        """Create an engine's environment, or resume an interrupted installation.

        Args:
            name: "vllm"; the other engines need no environment.
            to: its folder (None: in the user's cache).
            build: "cpu" or "cuda" (None: "cuda" if there is a GPU).
            torch_index: index of PyTorch's CPU builds (None: pip's default).

        Raises:
            UserError: unknown engine, no build for this machine, not enough disk, or pip fails.
        """
        from tunewright.engines.vllm.environment import install

        _require_vllm(name)
        return install(self._reporter, to=to, build=build, torch_index=torch_index)

    def show(self, name: str) -> Environment:
        """Return the environment that is installed.

        Raises:
            UserError: unknown engine, or it is not installed.
        """
        from tunewright.engines.vllm.environment import find

        _require_vllm(name)
        return find()


def _require_vllm(name: str) -> None:
    if name != "vllm":
        raise UserError(
            f"unknown engine {name!r}: only vllm has its own environment",
            fix="The engine peft is part of tunewright and needs no installation.",
        )
