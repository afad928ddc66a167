"""References that no answer can equal, because of the config's own rules for answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.versions import Member
from tunewright.evaluation.generations import Generator

_SHOWN = 3


def warn_of_unreachable(generator: Generator, members: Sequence[Member], reporter: Reporter) -> None:
    """Warn of rows whose reference holds a stop string or does not match the grammar of the answers.

    Raises:
        UserError: no reference can be reached, or the grammar cannot be used.
    """

    def is_cut(text: str) -> bool:
        return any(stop in text for stop in generator.stop)

    if generator.stop:
        _warn("evaluate.stop", "hold a stop string, so every answer ends before", is_cut, members, reporter)
    constraint = generator.constraint
    if constraint is not None:

        def differs(text: str) -> bool:
            return not constraint.matches(text)

        what = "do not match the grammar, so no constrained answer can equal"
        _warn("evaluate.structured_outputs", what, differs, members, reporter)


def _warn(where: str, what: str, wrong: Callable[[str], bool], members: Sequence[Member], reporter: Reporter) -> None:
    found = [member for member in members if wrong(member.example.output)]
    if not found:
        return
    rows = "; ".join(f"{m.key[:12]} {m.example.output.strip().splitlines()[:1]}" for m in found[:_SHOWN])
    message = f"{len(found):,} of {len(members):,} references {what} them: {rows}"
    if len(found) > _SHOWN:
        message += f"; and {len(found) - _SHOWN:,} more"
    if len(found) == len(members):
        raise UserError(message, where=where, fix="Change it in tunewright.yaml, or the rows.")
    reporter.warn(f"{where}: {message}")
