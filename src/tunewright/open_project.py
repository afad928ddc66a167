"""An open project, the first parameter of every verb that needs its base, its chat format or its workers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tunewright.config import PROJECT_NAME
from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE, OpenFolder, ProjectFolder, create_project, require_absent
from tunewright.config.train import BUNDLED_TRAINING
from tunewright.core.errors import UserError
from tunewright.core.text import normalize
from tunewright.core.workers import Workers
from tunewright.models.bases import Base, resolve_base
from tunewright.models.sources import PACKAGED

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat

_WITHOUT_DECOMPOSITION = str.maketrans(
    {"æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"}
)
"""Latin letters that Unicode does not decompose into a letter and marks."""


class OpenProject(OpenFolder):
    """An open project. Its base and chat format are loaded once, when first needed."""

    @cached_property
    def base(self) -> Base:
        """The config's base, found, downloaded and checked."""
        config = self.folder.config
        return resolve_base(config.base_model, config.revision, self.folder.root, self.reporter)

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format that turns conversations into tokens."""
        from tunewright.chat import open_chat

        return open_chat(self.base, self.folder.config.chat, self.reporter)

    def workers(self) -> AbstractContextManager[Workers]:
        """Return the workers of ``compute.cluster``, to be entered; they are checked then."""
        from tunewright.compute import open_workers

        return open_workers(self.folder.config, self.reporter)


def project_name(root: Path) -> str:
    """Return a valid project name that resembles the folder's name."""
    letters = normalize(root.resolve().name.casefold().translate(_WITHOUT_DECOMPOSITION), "NFKD")
    plain = "".join(each for each in letters if not unicodedata.combining(each))
    name = re.sub("[^a-z0-9]+", "-", plain).strip("-")
    return name[:40] or "my-model"


def check_new_project(root: Path, name: str | None, base_model: str | None) -> None:
    """Check the arguments of :func:`new_project` before other work."""
    if name is not None and not re.fullmatch(PROJECT_NAME, name):
        fix = "Use at most 40 lower-case letters, digits and hyphens, such as customer-support."
        raise UserError(f"Invalid project name {name!r}", where="name", fix=fix)
    if base_model is not None:
        from tunewright.models.bases import check_spec

        check_spec(base_model, root)
    require_absent(root, [CONFIG_FILE])


def new_project(
    root: Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    sections: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> ProjectFolder:
    """Write ``tunewright.yaml`` in a folder that has none; a packaged base gets its training settings.

    Args:
        root: the project's folder, created if it is missing.
        name: the project's name (None: like the folder's).
        base_model: a folder, a hub id or a packaged base (None: the config's default, which is the bundled one). A
            hub id is only checked by its form; nothing is downloaded.
        sections: values of further sections, such as data and evaluate.

    Raises:
        UserError: an invalid name, an unusable base, or the folder has a config.
    """
    check_new_project(root, name, base_model)
    values: dict[str, Any] = {"name": name or project_name(root), **sections}
    if base_model is not None:
        values["base_model"] = base_model
    if base_model in (None, *PACKAGED):
        values["train"] = BUNDLED_TRAINING
    return create_project(root, {CONFIG_FILE: write_config(values)})
