"""Limits as the command line gives them."""

from __future__ import annotations

from dataclasses import replace

from tunewright.errors import UserError
from tunewright.serving.state.tenants import Limits

_NONE = "none"


def changed_limits(limits: Limits, *, requests: str | None, tokens: str | None, concurrency: str | None) -> Limits:
    """The limits with those replaced that are given: a number, or ``none`` for no limit.

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
