"""The adapters behind models, and access without keys. Tenants authenticate in :mod:`.tenant_auth`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


def model_not_found(name: str, models: Sequence[str]) -> ApiError:
    """Return the error for a model that does not exist; a model of another tenant looks the same."""
    available = ", ".join(models) or "none"
    message = f"The model {name} does not exist or you do not have access to it. Available models: {available}."
    return ApiError(message, status=404, param="model", code="model_not_found")


class AnonymousAuth:
    """Access without keys: every client may use the base and all adapters, by name.

    It is its own principal, the authenticated sender of each request.
    """

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
            raise model_not_found(body.model, self.models())
        prompt, grammar = self.system_prompts.get(body.model), self._grammars.get(body.model)
        return Target(body.model, self._models[body.model], system_prompt=prompt, grammar=grammar)

    async def admit(self, target: Target, tokens: int, end_user: str | None) -> Admission:  # noqa: ARG002 - no quota
        return Admission(settle=lambda _usage: None)
