"""What a gateway asks of an engine, whichever it is.

An engine knows no tenants, aliases or templates: it is given token ids, which the gateway renders with the function
that training uses, and the digest of the adapter that is to go on from there; and it gives token ids back. So what the
model sees does not depend on the engine, and a name that moves to another adapter is nothing that an engine could
mistake.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tunewright.generation.requests import Finish, Request


@dataclass(frozen=True)
class Delta:
    """The newest tokens of one answer; ``finish`` is set on the last delta (which may be without tokens)."""

    ids: tuple[int, ...]
    finish: Finish | None


class RequestFailedError(Exception):
    """The model could not compute this one request; the engine goes on."""


class AdapterFailedError(Exception):
    """An adapter could not be put beside the others, or let go; the engine goes on without that change."""


class EngineStoppedError(Exception):
    """The engine answers nothing now: it has stopped, or has died and is being started again."""


class Engine(Protocol):
    """The base and any number of its adapters, each called by its digest."""

    name: str
    """As in ``serve --engine``."""
    max_batch: int
    """The most requests that it works on at once."""
    context_length: int
    """The most tokens that prompt and answer may have together."""

    @property
    def stopped(self) -> str | None:
        """Why it answers nothing now, or None while it does."""

    @property
    def dead(self) -> bool:
        """True if it stays stopped, so that the server has to be started again."""

    @property
    def under_way(self) -> tuple[int, int]:
        """Requests at work, and requests that wait inside the engine."""

    def stream(self, request: Request, *, whose: str = "") -> AsyncGenerator[Delta, None]:
        """Tokens as they come, those that end an answer left out; closing the iterator early aborts the request.

        Args:
            request: its ``adapter`` is the digest of one that is loaded, or None for the base; without stop strings.
            whose: what one of them makes the engine remember (of prefixes, say) serves no other one. It may count
                for when the prompt is read.

        Raises:
            RequestFailedError: this request could not be computed.
            EngineStoppedError: the engine has stopped, before or meanwhile.
        """

    async def load(self, digest: str, folder: Path) -> None:
        """Have an adapter ready; nothing happens if it is.

        Raises:
            UserError: its files are not those of the digest, or the engine cannot hold it, or no further one.
            AdapterFailedError: the engine failed at it.
            EngineStoppedError: the engine has stopped.
        """

    async def unload(self, digest: str) -> None:
        """Let an adapter go; no request under way may need it.

        Raises:
            EngineStoppedError: the engine has stopped.
        """

    def stop(self) -> None:
        """Stop at once: what is under way gets :class:`EngineStoppedError`. Returns when all has ended."""
