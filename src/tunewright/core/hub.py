"""The Hugging Face hub: whether it responds, and its refusals as user errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tunewright.core.errors import UserError

PATIENCE_S = 3.0
"""Seconds that the hub has for a first response, so that a command ends within five."""


def hub_silence(url: str) -> str | None:
    """Return why the hub does not respond to this address; None if it does.

    The hub's own client waits and retries for minutes, and a name that does not resolve blocks beyond any timeout. So a
    thread sends the request, and is abandoned if it takes too long.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    result: list[str | None] = []

    def ask() -> None:
        try:
            get_session().request("HEAD", url, timeout=PATIENCE_S, follow_redirects=False)
            result.append(None)
        except Exception as error:  # noqa: BLE001 - any error means no response, and is reported as the reason
            result.append(error_reason(error))

    thread = threading.Thread(target=ask, name="tunewright-hub", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return result[0] if result else f"no response within {PATIENCE_S:g} s"


def error_reason(error: BaseException) -> str:
    """Return an error's class and text."""
    return f"{type(error).__name__}: {error}"


@contextmanager
def hub_refusals(kind: str, repository: str, revision: str | None, where: str, revision_where: str) -> Iterator[None]:
    """Convert the hub's refusals of a repository, a "model" or a "dataset", into UserErrors.

    ``where`` and ``revision_where`` are the keys or arguments that name the repository and its revision.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repository} is gated",
            where=where,
            fix=f"Accept its licence on the page of {repository}, then run `hf auth login` (or set HF_TOKEN).",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision!r}", where=revision_where) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"The hub has no {kind} {repository}, or it is private",
            where=where,
            fix=f"Check the spelling. For a private {kind} run `hf auth login` (or set HF_TOKEN).",
        ) from None
