"""A release: the adapter of an alias, its candidate, its isolation test, and the grounds for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunewright.gate.results import IsolationTest, ServingCheck
from tunewright.serving.tenants.times import iso

Answer = tuple[str, bool, str | None]
"""The adapter's digest, True if its system prompt is added, and the rule that constrains answers."""

Action = Literal["deploy", "canary", "shadow", "promote", "rollback", "undeploy"]


@dataclass(frozen=True)
class Grounds:
    """The reasons for a release, or for a withdrawal."""

    verdict: str | None = None
    """The verdict of the adapter's newest evaluation; None: it has none."""
    evaluation: str | None = None
    """The ID of that evaluation."""
    because: str | None = None
    """The reason for a release without a verdict to ship, or for a withdrawal."""
    isolation: IsolationTest | None = None
    """The isolation test that it passed, together with all live adapters."""
    untested: str | None = None
    """The reason for a release without that test, and without the serving check."""
    serving: ServingCheck | None = None
    """The serving check of its adapter."""


@dataclass(frozen=True)
class Candidate:
    """An adapter on trial next to the live one."""

    adapter: str
    digest: str
    share: float | None
    """The share of the traffic that it answers, as a canary; None: its answers are only recorded, as a shadow."""
    system_prompt: bool = True
    """True if its trained system prompt is added to requests without one."""
    grammar: str | None = None
    """The rule that constrains its answers, text or calls; None: any."""

    @property
    def answer(self) -> Answer:
        """As :attr:`Release.answer`."""
        return self.digest, self.system_prompt, self.grammar

    @property
    def summary(self) -> str:
        """The kind of trial, in words."""
        how = "in the shadow" if self.share is None else f"on {100 * self.share:.4g}% of the traffic"
        how = how if self.grammar is None else f"{how}, constrained"
        return how if self.system_prompt else f"{how} without its system prompt"


@dataclass(frozen=True)
class Release:
    """One entry of an alias's history."""

    id: int
    """Counts over all aliases, in the order of time."""
    alias: str
    number: int
    """Counts within the alias, from 1."""
    action: Action
    adapter: str
    """The alias's adapter from this release on; for an undeployment, the adapter until then."""
    digest: str
    candidate: Candidate | None
    restores: int | None
    """For a rollback, the number of the restored release."""
    grounds: Grounds
    author: str | None
    created: float
    system_prompt: bool = True
    """True if the adapter's trained system prompt is added to requests without one."""
    grammar: str | None = None
    """The rule that constrains answers, text or calls; None: any."""

    @property
    def undeployed(self) -> bool:
        """True if the alias has no adapter from this release on."""
        return self.action == "undeploy"

    @property
    def answer(self) -> Answer:
        """The part of a release that decides the alias's answers: equal for two releases that answer alike."""
        return self.digest, self.system_prompt, self.grammar

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """The adapters it needs, by name and digest."""
        candidate = [(self.candidate.adapter, self.candidate.digest)] if self.candidate else []
        return [(self.adapter, self.digest), *candidate]

    @property
    def digests(self) -> frozenset[str]:
        """The digests of the adapters it needs."""
        return frozenset(digest for _, digest in self.adapters)

    def as_dict(self) -> dict[str, Any]:
        """Return the release as ``--json`` prints it."""
        return {**asdict(self), "created": iso(self.created)}
