"""The page that makes a project of an empty folder."""

from __future__ import annotations

import re

from starlette.responses import Response

from tunewright.api.new_project import new_project
from tunewright.config import PROJECT_NAME
from tunewright.core.errors import UserError
from tunewright.models.sources import BUNDLED, bundled_weights
from tunewright.studio.visit import Handlers, Visit

NEW_PROJECT = "/new"
_BUNDLED = f"bundled:{BUNDLED}"


def new_page(visit: Visit) -> Response:
    """Ask for the name and the base of a new project."""
    if visit.project.folder.has_config:
        return visit.go("/", "The folder has a project already.")
    return _form(visit, _name_from(visit.project.folder.root.name), "bundled" if _has_bundled() else "other", "")


def create(visit: Visit) -> Response:
    """Write the project's config, as ``tunewright init`` does."""
    name, choice = visit.form.get("name", "").strip(), visit.form.get("choice", "")
    other = visit.form.get("base_model", "").strip()
    try:
        if choice != "bundled" and not other:
            raise UserError("No base model was named", fix="Type its folder or hub id.")
        if choice == "bundled" and other:
            fix = "Choose the other model, or empty its field."
            raise UserError(f"SmolLM2 135M is chosen, and another base model is named: {other}", fix=fix)
        new_project(visit.project.folder.root, name=name, base_model=_BUNDLED if choice == "bundled" else other)
    except UserError as refusal:
        if visit.project.folder.has_config:  # made in another tab or a terminal meanwhile
            return visit.go("/", "The folder has a project already. Nothing was changed.")
        return _form(visit, name, choice, other, refusal)
    return visit.go("/data", f"Made the project {name}. Upload your examples next.")


def _form(visit: Visit, name: str, choice: str, base_model: str, refusal: UserError | None = None) -> Response:
    page = visit.page(
        "new_project.html.j2",
        "New project",
        folder=str(visit.project.folder.root),
        name=name,
        pattern=PROJECT_NAME,
        choice=choice,
        base_model=base_model,
        has_bundled=_has_bundled(),
        refusal=refusal,
    )
    page.status_code = 200 if refusal is None else 400
    return page


def _name_from(folder: str) -> str:
    """Return a valid project name that resembles the folder's."""
    return re.sub("[^a-z0-9]+", "-", folder.lower()).strip("-")[:40] or "my-model"


def _has_bundled() -> bool:
    try:
        bundled_weights(BUNDLED)
    except UserError:
        return False
    return True


HANDLERS: Handlers = {
    ("GET", NEW_PROJECT): new_page,
    ("POST", NEW_PROJECT): create,
}
