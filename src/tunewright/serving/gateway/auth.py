"""The adapters behind models: by name for access without keys, by releases for tenants (:mod:`.tenant_auth`)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright.adapters.lineage import SystemPrompt
from tunewright.chat.call_grammar import CallGrammars
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.engines.protocol import AdapterFailedError, Engine
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.recorder import Received
from tunewright.serving.gateway.schemas import RequestBody
from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import AsyncState
from tunewright.serving.tenants.quota import RequestUsage
from tunewright.serving.tenants.releases import Release


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter to load, and the system prompt that it was trained with."""

    folder: Path
    system_prompt: SystemPrompt
    grammar: str | None = None
    """Without tenants, the rule that constrains answers; None means any. With tenants, each release has its own."""


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
    """The adapter's digest; None means the base."""
    release_id: int | None = None
    system_prompt: str | None = None
    """The system message added to requests without one; None means that nothing is added."""
    grammar: str | None = None
    """The rule that constrains answers, text or calls; None means any."""
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
    record: Callable[[Sequence[dict[str, Any]]], None] | None = None
    """Records the request with its answers; None: it is not recorded."""


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
    recorder = None

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

    async def admit(
        self,
        target: Target,  # noqa: ARG002 - no quota
        tokens: int,  # noqa: ARG002
        response_id: str,  # noqa: ARG002
        received: Received,  # noqa: ARG002
        *,
        recorded: bool,  # noqa: ARG002
    ) -> Admission:
        return Admission(settle=lambda _usage: None)


class ReleaseRouter:
    """The live releases as this server has them: follows them, and loads and unloads adapters for them.

    The adapters of a new release are loaded first, then the alias is switched. The old adapter is unloaded
    after its last answer has ended. So a release drops no request, and no answer changes its adapter halfway.
    """

    def __init__(
        self,
        state: State,
        async_state: AsyncState,
        engine: Engine,
        locate: Callable[[str, str], ServedAdapter],
        reporter: Reporter,
    ) -> None:
        self._state = state
        self._async_state = async_state
        self._engine = engine
        self._locate = locate
        self._reporter = reporter
        self.routes: dict[str, Release] = {}
        """The live release of each alias."""
        self._loaded: dict[str, SystemPrompt] = {}
        self._users: Counter[str] = Counter()  # requests and shadows that need an adapter
        self._newest = -1
        self._failed: dict[str, tuple[int, str]] = {}  # by alias: the release that could not be loaded, and the reason

    @property
    def released(self) -> list[Released]:
        """The adapters of each alias: the live one and its candidate."""
        released = []
        for alias, release in sorted(self.routes.copy().items()):
            released.append(Released(alias, release.digest, "live", release.number))
            if release.candidate is not None:
                role: Literal["canary", "shadow"] = "shadow" if release.candidate.share is None else "canary"
                released.append(Released(alias, release.candidate.digest, role, release.number))
        return released

    @property
    def resident(self) -> list[str]:
        """The digests of the loaded adapters."""
        return sorted(self._loaded.copy())

    @property
    def system_prompts(self) -> dict[str, str]:
        """The system messages added to requests without one, by alias."""
        prompts = {
            alias: self.system_prompt(release.digest, release.system_prompt)
            for alias, release in self.routes.copy().items()
        }
        return {alias: text for alias, text in prompts.items() if text is not None}

    @property
    def incomplete(self) -> bool:
        """True if a live release could not be loaded."""
        return bool(self._failed)

    @property
    def newest_loaded(self) -> int:
        """The id of the newest release that this server has taken, with all before it."""
        return min((release_id - 1 for release_id, _ in self._failed.values()), default=self._newest)

    def system_prompt(self, digest: str, added: bool) -> str | None:
        """Return the system prompt of a loaded adapter, if its release has it ``added``."""
        return self._loaded[digest].text if added else None

    def acquire(self, digest: str) -> bool:
        """Keep an adapter loaded until :meth:`release`; return False if it is not loaded."""
        if digest not in self._loaded:
            return False
        self._users[digest] += 1
        return True

    def release(self, digest: str) -> None:
        """Undo one :meth:`acquire`."""
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]

    async def has_changed(self) -> bool:
        """Return whether there is a release that :meth:`update` has not seen."""
        return await self._async_state.read(self._state.releases.newest) != self._newest

    async def update(self) -> None:
        """Load the adapters of the live releases, then switch the aliases to them.

        A release whose adapters cannot be loaded is reported, and its alias keeps the release before it.
        """
        newest = await self._async_state.read(self._state.releases.newest)
        live = await self._async_state.read(self._state.releases.live)
        for alias in self.routes.keys() - live.keys():
            del self.routes[alias]
            self._reporter.say(f"{alias} is undeployed")
        for alias in self._failed.keys() - live.keys():
            del self._failed[alias]
        for alias, release in live.items():
            before = self.routes.get(alias)
            if before is not None and before.id == release.id:
                continue
            try:
                await self._load(release)
            except (UserError, AdapterFailedError) as error:
                self._report_failure(release, before, str(error))
                continue
            self._failed.pop(alias, None)
            self.routes[alias] = release
            self._report(release)
        self._newest = newest

    async def unload_unused(self) -> None:
        """Free the adapters that no alias and no running request needs."""
        needed = {digest for release in self.routes.values() for digest in release.digests}
        for digest in self._loaded.keys() - needed:
            if digest not in self._users:
                del self._loaded[digest]
                await self._engine.unload(digest)

    async def _load(self, release: Release) -> None:
        needed = {release.digest: release.adapter}
        if release.candidate:
            needed[release.candidate.digest] = release.candidate.adapter
        for digest, adapter in needed.items():
            if digest not in self._loaded:
                served = await asyncio.to_thread(self._locate, adapter, digest)
                await self._engine.load(digest, served.folder)
                self._loaded[digest] = served.system_prompt

    def _report_failure(self, release: Release, before: Release | None, error: str) -> None:
        """Warn of a release that could not be loaded, once for each reason."""
        if self._failed.get(release.alias) != (release.id, error):
            kept = f"release {before.number} stays live" if before else "the alias is not served"
            self._reporter.warn(f"{release.alias}: failed to load release {release.number}; {kept}: {error}")
        self._failed[release.alias] = (release.id, error)

    def _report(self, release: Release) -> None:
        candidate = release.candidate
        tried = f", and {candidate.adapter} {candidate.summary}" if candidate else ""
        self._reporter.say(f"{release.alias}: release {release.number} is live: {release.adapter}{tried}")
        adapters = [(release.adapter, *release.answer)]
        if candidate is not None:
            adapters.append((candidate.adapter, *candidate.answer))
        for adapter, digest, added, grammar in adapters:
            if grammar is not None:
                self._reporter.say(f"{release.alias}, {adapter}: {constraint_text(grammar)}")
            prompt = self._loaded[digest]
            if added:
                prompt.report(f"{release.alias}, {adapter}", self._reporter)
            elif prompt.text is not None:
                self._reporter.say(
                    f"{release.alias}, {adapter}: the release was made without the adapter's system prompt"
                )
        test = release.grounds.isolation
        if test is None or test.engine != self._engine.name:
            tested = f"tested for isolation on {test.engine} only" if test else "not tested for isolation"
            self._reporter.warn(
                f"{release.alias}: release {release.number} was {tested}, and this server runs {self._engine.name}. "
                f"`tunewright serve --engine {self._engine.name} --self-test` tests the live releases."
            )
