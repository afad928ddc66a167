"""A new project with its commented config, for ``tunewright init`` and the studio."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tunewright.config import PROJECT_NAME
from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE, ProjectFolder, create_project
from tunewright.core.errors import UserError
from tunewright.models.sources import BUNDLED, BUNDLED_TRAINING


def new_project(root: Path, *, name: str | None = None, base_model: str | None = None) -> ProjectFolder:
    """Write ``tunewright.yaml`` in a folder that has none; the bundled base, if named, gets its training settings.

    Args:
        root: the project's folder, created if it is missing.
        name: the project's name (None: the config's default).
        base_model: a folder, a hub id or the bundled base (None: the config's default, unchecked). A hub id is only
            checked by its form; nothing is downloaded.

    Raises:
        UserError: an invalid name, an unusable base, or the folder has a config.
    """
    if name is not None and not re.fullmatch(PROJECT_NAME, name):
        fix = "Use at most 40 lower-case letters, digits and hyphens, such as customer-support."
        raise UserError(f"Invalid project name {name!r}", where="name", fix=fix)
    if base_model is not None:
        from tunewright.models.bases import check_spec

        check_spec(base_model, root)
    given = {"name": name, "base_model": base_model}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if base_model == f"bundled:{BUNDLED}":
        values["train"] = BUNDLED_TRAINING
    return create_project(root, {CONFIG_FILE: write_config(values)})
