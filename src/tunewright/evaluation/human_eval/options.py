"""Valid combinations of the command's options."""

from __future__ import annotations

from tunewright.core.errors import UserError


def check_options(*, results: bool, export: bool, sheet: bool, items: bool, reviewer: bool, reference: bool) -> None:
    """Refuse options of ``tunewright human-eval`` that would be ignored; each argument is True if given.

    Raises:
        UserError: options conflict; the message names them.
    """
    actions = [name for name, there in (("--results", results), ("--export", export), ("--import", sheet)) if there]
    if len(actions) > 1:
        raise UserError("one at a time", where=" ".join(actions))
    if reference and not export:
        raise UserError("the references go into a sheet, and none is written", where="--reference", fix="Add --export.")
    idle = [name for name, there in (("--items", items), ("--reviewer", reviewer)) if there]
    if results and idle:
        raise UserError(f"{' '.join(idle)} changes nothing here", where="--results", fix="Leave it out.")
    if sheet and items:
        raise UserError("--items changes nothing here", where="--import", fix="Leave it out.")
