"""The error for mistakes that only the user can fix."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from tunewright.core.installation import install_command

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """A problem that only the user can fix: bad input, a wrong key, a missing file, a full disk.

    Args:
        what: the problem in one sentence.
        where: ``file:line``, a config key or a path.
        fix: the action that solves it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n{self.fix}" if self.fix else text

    def as_dict(self) -> dict[str, str | None]:
        """Return the error as ``--json`` prints it."""
        return {"what": self.what, "where": self.where, "fix": self.fix}


def first_fault(error: ValidationError) -> str:
    """Return the first fault of a document: the path of its key, and pydantic's message."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))  # empty if the text is not JSON
    return f"{key}: {first['msg']}" if key else first["msg"]


OUT_OF_MEMORY = UserError("Not enough memory", fix="Close other programs, or use a smaller base or batch size.")

TRAIN_PACKAGES = {"accelerate", "bm25s", "gguf", "peft", "torch", "trl"}
"""Packages of `tunewright[train]`, which an installation without extras lacks."""


def require_torch() -> None:
    """Refuse an installation without ``[train]`` before anything is written or downloaded."""
    if find_spec("torch") is None and (error := missing_extra(ModuleNotFoundError(name="torch"))):
        raise error


def missing_extra(error: Exception) -> UserError | None:
    """Return the UserError for a model package that is missing without ``[train]``; None for another error."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "").partition(".")[0] not in TRAIN_PACKAGES:
        return None
    return UserError(f"This needs {error.name}, which is not installed", fix=install_command("train"))
