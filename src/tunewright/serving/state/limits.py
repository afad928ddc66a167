"""What a tenant may use, and how the command line says so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from tunewright.core.errors import UserError

_NONE = "none"


@dataclass(frozen=True)
class Limits:
    """What a tenant may use; None is no limit."""

    requests_per_minute: int | None = None
    """That start within any 60 seconds."""
    tokens_per_minute: int | None = None
    """Of prompt and answer together, by the minute in which their request starts."""
    concurrency: int | None = None
    """Requests under way at once, those that wait for their turn included."""

    def as_dict(self) -> dict[str, int | None]:
        """Return the limits as ``--json`` prints them."""
        return asdict(self)


UNLIMITED = Limits()


def changed_limits(limits: Limits, *, requests: str | None, tokens: str | None, concurrency: str | None) -> Limits:
    """Return the limits with those replaced that are given: a number, or ``none`` for no limit.

    Raises:
        UserError: what is neither.
    """
    given = {"requests_per_minute": requests, "tokens_per_minute": tokens, "concurrency": concurrency}
    options = {"requests_per_minute": "--requests", "tokens_per_minute": "--tokens", "concurrency": "--concurrency"}
    changes = {name: _limit(text, options[name]) for name, text in given.items() if text is not None}
    return replace(limits, **changes)


def _limit(text: str, where: str) -> int | None:
    if text == _NONE:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**53):
        raise UserError(f"{text!r} is no limit", where=where, fix=f"Write a number from 1 to 2^53 - 1, or {_NONE}.")
    return int(text)


def check_limits(limits: Limits) -> None:
    """Refuse what limits nothing sensibly.

    Raises:
        UserError: a limit below 1.
    """
    for name, value in limits.as_dict().items():
        if value is not None and value < 1:
            raise UserError(
                f"{name} of {value}: a limit is at least 1", fix="`tunewright tenant disable` shuts a tenant out."
            )
