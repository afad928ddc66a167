"""Fine-tune Llama and Mistral for your domain, and prove it beat prompting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunewright._version import __version__
from tunewright.errors import UserError

if TYPE_CHECKING:
    from tunewright.progress import Reporter
    from tunewright.road import Road

__all__ = ["UserError", "__version__", "open"]


def open(root: str | Path = ".", reporter: Reporter | None = None) -> Road:  # noqa: A001
    """Open the project in folder ``root``; what it can do is what the command line can: ``open(".").train()``.

    Raises:
        UserError: there is no ``tunewright.yaml``, or it has a fault.
    """
    from tunewright.project import Project
    from tunewright.road import Road

    project = Project(Path(root))
    _ = project.recipe
    return Road(project, reporter)
