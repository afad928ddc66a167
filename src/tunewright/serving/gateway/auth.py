"""Authentication: its interface, and access without keys. Tenants authenticate in :mod:`.tenant_auth`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tunewright.adapters.lineage import SystemPrompt
from tunewright.chat.call_grammar import CallGrammars
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.schemas import RequestBody
from tunewright.serving.tenants.quota import RequestUsage


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter to load, and the system prompt that it was trained with."""

    folder: Path
    system_prompt: SystemPrompt
    grammar: str | None = None
    """Without tenants, the rule that constrains answers; None: any. With tenants, each release has its own."""


def constraint_text(grammar: str) -> str:
    """Return what a rule constrains, in words."""
    calls = CallGrammars.from_rule(grammar)
    if calls is None:
        return "requests that set no form get constrained answers"
    return f"calls are constrained to the functions of each request ({calls.choice})"


@dataclass(frozen=True)
class Target:
    """The adapter that answers a request, and its shadow."""

    name: str
    """The model's name in the request."""
    digest: str | None
    """The adapter's digest; None: the base."""
    release_id: int | None = None
    system_prompt: str | None = None
    """The system message added to requests without one; None: nothing is added."""
    grammar: str | None = None
    """The rule that constrains answers, text or calls; None: any."""
    shadow: Target | None = None
    """The candidate that gets the same request, and whose answer is only recorded."""


@dataclass(frozen=True)
class Released:
    """An adapter that an alias has: its live one, or a candidate."""

    alias: str
    digest: str | None
    """None: the base."""
    role: Literal["live", "canary", "shadow"]
    number: int
    """The release's number; 0 on a server without releases."""


@dataclass(frozen=True)
class Shadow:
    """An adapter that gets a request after its live answer, and whose answer is only recorded.

    Args:
        target: the adapter.
        acquire: keeps the adapter loaded until ``release``; returns False if it is not loaded any more.
        release: to be called once after each ``acquire`` that returned True.
        record: stores the live answer, with the shadow's answer or the reason why it has none.
    """

    target: Target
    acquire: Callable[[], bool]
    release: Callable[[], None]
    record: Callable[[str, str | None, str | None], None]


@dataclass(frozen=True)
class Admission:
    """The permission to answer a request."""

    settle: Callable[[RequestUsage], None]
    shadow: Shadow | None = None


class Principal(Protocol):
    """The authenticated sender of a request."""

    @property
    def name(self) -> str:
        """The name under which the fair queue counts it."""

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens that the prompts and answers of one request may have together; None: no limit."""

    def counting(self) -> AbstractAsyncContextManager[None]:
        """Return a context in which a request is handled; it counts even if it is refused."""

    def models(self) -> list[str]:
        """Return the names of the models it may use."""

    def target(self, body: RequestBody) -> Target:
        """Return the adapter that answers a request."""

    async def admit(self, target: Target, tokens: int, end_user: str | None) -> Admission:
        """Reserve quota for a request. Call it right after :meth:`target`.

        Args:
            target: the adapter that answers.
            tokens: the most that the prompts and answers can have together.
            end_user: the client's label for its user.

        Raises:
            ApiError: 429 or 400, the request is over a limit.
        """


def model_not_found(name: str, principal: Principal) -> ApiError:
    """Return the error for a model that does not exist; a model of another tenant looks the same."""
    models = ", ".join(principal.models()) or "none"
    message = f"The model {name} does not exist or you do not have access to it. Available models: {models}."
    return ApiError(message, status=404, param="model", code="model_not_found")


class Auth(Protocol):
    """Authenticates requests, and knows which models there are."""

    reports_load: bool
    """True if `/health` reports the number of requests: not to tenants, which could observe each other by it."""

    @property
    def available(self) -> bool:
        """False while requests are refused because nobody can be authenticated."""

    @property
    def released(self) -> list[Released]:
        """The adapters behind these names now; safe to read from any thread."""

    @property
    def resident(self) -> list[str]:
        """The digests of the loaded adapters; safe to read from any thread."""

    @property
    def system_prompts(self) -> dict[str, str]:
        """The system messages added to requests without one, by model."""

    def running(self, keep: Callable[[Mapping[str, Collection[str]]], None]) -> AbstractAsyncContextManager[None]:
        """Return a context that runs the background work while the server runs.

        Args:
            keep: called now and then with the tenants that can send requests, and their aliases.
        """

    async def authenticate(self, authorization: str | None) -> Principal:
        """Return the sender of a request, given its ``Authorization`` header."""


class AnonymousAuth:
    """Access without keys: every client may use the base and all adapters, by name."""

    reports_load = True
    available = True
    name = "everybody"
    max_tokens = None

    def __init__(
        self,
        models: Mapping[str, str | None],
        system_prompts: Mapping[str, str] | None = None,
        grammars: Mapping[str, str] | None = None,
    ) -> None:
        self._models = dict(models)
        self.system_prompts = dict(system_prompts or {})
        self._grammars = dict(grammars or {})

    @property
    def released(self) -> list[Released]:
        return [Released(name, digest, "live", 0) for name, digest in self._models.items()]

    @property
    def resident(self) -> list[str]:
        return sorted({digest for digest in self._models.values() if digest is not None})

    @asynccontextmanager
    async def running(self, keep: Callable[[Mapping[str, Collection[str]]], None]) -> AsyncIterator[None]:  # noqa: ARG002 - all models stay
        yield

    async def authenticate(self, authorization: str | None) -> AnonymousAuth:  # noqa: ARG002 - SDKs always send a key
        return self

    def counting(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()  # no quota

    def models(self) -> list[str]:
        return list(self._models)

    def target(self, body: RequestBody) -> Target:
        if body.model not in self._models:
            raise model_not_found(body.model, self)
        prompt, grammar = self.system_prompts.get(body.model), self._grammars.get(body.model)
        return Target(body.model, self._models[body.model], system_prompt=prompt, grammar=grammar)

    async def admit(self, target: Target, tokens: int, end_user: str | None) -> Admission:  # noqa: ARG002 - no quota
        return Admission(settle=lambda _usage: None)
