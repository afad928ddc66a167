"""The check of a cluster's machines before work: each needs the project's folder and the base.

It imports neither torch nor Ray.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.locks import in_use, remove_abandoned
from tunewright.models.bases import Base, base_here

_FIX = "Mount the project's folder at the same path on every machine, writable."


class Site(NamedTuple):
    """The things that every machine must have: a file in the project's folder, and the base."""

    root: Path
    file: Path
    text: str
    """The content of the file, which no copy of the folder has."""
    base: Base


@contextmanager
def open_site(project: ProjectFolder, base: Base) -> Iterator[Site]:
    """Yield what every machine must have; its file is removed at the end."""
    places = project.work.resolve() / "machines"
    places.mkdir(exist_ok=True)
    remove_abandoned(places.iterdir())
    own = Path(tempfile.mkdtemp(dir=places))
    try:
        with in_use(own):
            site = Site(project.root.resolve(), own / "seen", own.name, base)
            write_text(site.file, site.text)
            yield site
    finally:
        shutil.rmtree(own, ignore_errors=True)


def require_site(site: Site) -> Base:
    """Return this machine's copy of the base."""
    try:
        seen = site.file.read_text(encoding="utf-8") == site.text
    except OSError:
        seen = False
    if not seen:
        raise UserError("The project's folder is not there, or is another one", where=str(site.root), fix=_FIX)
    try:
        with tempfile.TemporaryFile(dir=site.file.parent):
            pass
    except OSError as error:
        what = f"The project's folder cannot be written to: {error.strerror}"
        raise UserError(what, where=str(site.root), fix=_FIX) from None
    return base_here(site.base)
