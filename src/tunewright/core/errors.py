"""The user's mistakes, told so that they can be mended."""

from __future__ import annotations


class UserError(ValueError):
    """Something only the user can mend: bad input, a wrong key, a missing file, a full disk.

    Args:
        what: what is wrong, one sentence.
        where: the place of it: ``file:line``, a config key or a path.
        fix: what to do about it.
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
        """The error as ``--json`` prints it."""
        return {"what": self.what, "where": self.where, "fix": self.fix}
