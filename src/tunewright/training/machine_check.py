"""The check of a machine of a cluster before work, made there. It imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.models.bases import Base, base_here


def require_folder_and_base(project: ProjectFolder, mark: Path, base: Base) -> None:
    """Check that this machine sees the project's folder and has the base.

    Raises:
        UserError: it does not.
    """
    fix = "Mount the project's folder at the same path on every machine, writable."
    if not mark.exists():
        raise UserError("The project's folder is not visible", where=str(project.root), fix=fix)
    try:
        with TemporaryFile(dir=mark.parent):
            pass
    except OSError as error:
        what = f"The project's folder cannot be written: {error.strerror}"
        raise UserError(what, where=str(project.root), fix=fix) from None
    base_here(base)
