"""Who may ask for what: with tenants :mod:`tunewright.serving.tenancy` says so, without everybody may ask for all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tunewright.adapters.system_prompt import SystemPrompt
from tunewright.serving.protocol import AnyRequest, ApiError
from tunewright.serving.state.meter import Used


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter to load, and the system prompt that it was trained with."""

    folder: Path
    system_prompt: SystemPrompt


@dataclass(frozen=True)
class Target:
    """What answers a request."""

    name: str
    """As the client asks for it."""
    digest: str | None
    """The adapter's; None: the base."""
    release_id: int | None = None
    shadow: str | None = None
    """The digest of an adapter that is asked the same, and not heard."""
    system_prompt: str | None = None
    """What a request without a system message gets as one; None: nothing."""
    shadow_system_prompt: str | None = None
    """The same of the shadow."""


@dataclass(frozen=True)
class Released:
    """What answers to an alias, or is tried beside it."""

    alias: str
    digest: str | None
    """None: the base."""
    role: Literal["live", "canary", "shadow"]
    number: int
    """The release's; 0 where there are no releases."""


@dataclass(frozen=True)
class Shadow:
    """An adapter that is to be asked the same once the answer is given, and is only recorded.

    Args:
        digest: the adapter's.
        system_prompt: what a request without a system message gets as one from this adapter; None: nothing.
        hold: keeps the adapter until ``let_go``, and says whether it is there still.
        let_go: to be called once after a ``hold`` that said so.
        record: to be told the answer, and the shadow's or why there is none.
    """

    digest: str
    system_prompt: str | None
    hold: Callable[[], bool]
    let_go: Callable[[], None]
    record: Callable[[str, str | None, str | None], None]


@dataclass(frozen=True)
class Admission:
    """A request that may be answered.

    Args:
        settle: to be told once what it came to.
        shadow: who is to be asked the same afterwards.
    """

    settle: Callable[[Used], None]
    shadow: Shadow | None = None


class Visitor(Protocol):
    """Who has sent a request."""

    @property
    def name(self) -> str:
        """Whose turn it is in the fair queue."""

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that prompts and answers of one request may have together; None: no limit."""

    def models(self) -> list[str]:
        """Return the names that it may ask for."""

    def target(self, asked: AnyRequest) -> Target:
        """Return what answers its request.

        Raises:
            ApiError: 404, nothing of that name does.
        """

    async def admit(self, target: Target, tokens: int, end_user: str | None) -> Admission:
        """Take its request into account. Call it right after :meth:`target`.

        Args:
            target: what answers it.
            tokens: the most that its prompts and answers can have together.
            end_user: the client's own label of whom it asks for.

        Raises:
            ApiError: 429 or 400, it may not have that.
        """


def model_not_found(name: str, visitor: Visitor) -> ApiError:
    """Return the refusal of a model that does not exist; one that belongs to another tenant looks the same."""
    there = ", ".join(visitor.models()) or "none"
    message = f"The model {name} does not exist, or you have no access to it. Yours: {there}."
    return ApiError(message, status=404, param="model", code="model_not_found")


class Access(Protocol):
    """The gateway's doorkeeper."""

    tells_load: bool
    """Whether `/health` says how much is under way."""

    @property
    def names(self) -> list[str]:
        """All that can be asked for by whoever may."""

    @property
    def released(self) -> list[Released]:
        """What they stand for at this moment; asked from any thread."""

    @property
    def resident(self) -> list[str]:
        """Digests of the adapters that are loaded; asked from any thread."""

    @property
    def system_prompts(self) -> dict[str, str]:
        """What requests without a system message get as one, by the name that they ask for."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Return what has to run beside the server."""

    async def enter(self, authorization: str | None) -> Visitor:
        """Who it is, by the header ``Authorization``.

        Raises:
            ApiError: 401, nobody that may come in.
        """


class OpenAccess:
    """Everybody may ask for everything: the base and adapters by name, on a machine of one's own.

    Args:
        models: digests of adapters (None: the base) by the names that clients ask for.
        system_prompts: what requests without a system message get as one, by those names.
    """

    tells_load = True
    name = "everybody"
    most_tokens = None

    def __init__(self, models: Mapping[str, str | None], system_prompts: Mapping[str, str] | None = None) -> None:
        self._models = dict(models)
        self.system_prompts = dict(system_prompts or {})

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def released(self) -> list[Released]:
        return [Released(name, digest, "live", 0) for name, digest in self._models.items()]

    @property
    def resident(self) -> list[str]:
        return sorted({digest for digest in self._models.values() if digest is not None})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def enter(self, authorization: str | None) -> OpenAccess:  # noqa: ARG002 - clients send a key unasked
        return self

    def models(self) -> list[str]:
        return list(self._models)

    def target(self, asked: AnyRequest) -> Target:
        if asked.model not in self._models:
            raise model_not_found(asked.model, self)
        return Target(asked.model, self._models[asked.model], system_prompt=self.system_prompts.get(asked.model))

    async def admit(self, target: Target, tokens: int, end_user: str | None) -> Admission:  # noqa: ARG002 - no usage is kept
        return Admission(settle=lambda _used: None)
