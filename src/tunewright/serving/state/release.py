"""What a release is: which adapter an alias answers with from then on, what is tried beside it, and why it may."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunewright.serving.state.isolation import IsolationTest
from tunewright.serving.state.times import iso

Action = Literal["deploy", "canary", "shadow", "promote", "rollback", "undeploy"]


@dataclass(frozen=True)
class Grounds:
    """Why an adapter may be released; of an undeployment, why it may not any more."""

    verdict: str | None = None
    """What its newest evaluation says; None: it has none."""
    evaluation: str | None = None
    """That evaluation's ID."""
    because: str | None = None
    """Why it is released without a verdict to ship, or undeployed."""
    isolation: IsolationTest | None = None
    """The test that it passed, with all else that was live."""
    untested: str | None = None
    """Why it is released without that test."""


@dataclass(frozen=True)
class Candidate:
    """An adapter that is tried beside the one that the alias answers with."""

    adapter: str
    digest: str
    share: float | None
    """Of the traffic, which it answers (a canary); None: it is asked too, but not heard (a shadow)."""
    system_prompt: bool = True
    """Whether requests without a system message get the one that it was trained with."""

    @property
    def told(self) -> str:
        """How it is tried, in words."""
        how = "in the shadow" if self.share is None else f"on {100 * self.share:.4g}% of the traffic"
        return how if self.system_prompt else f"{how} without its system prompt"


@dataclass(frozen=True)
class Release:
    """One line of an alias's history."""

    id: int
    """Over all aliases, in the order of time."""
    alias: str
    number: int
    """Within the alias, from 1."""
    action: Action
    adapter: str
    """What the alias answers with from here on; of an undeployment, what it does not answer with any more."""
    digest: str
    candidate: Candidate | None
    restores: int | None
    """Of a rollback: the number of the release that it brings back."""
    grounds: Grounds
    author: str | None
    created: float
    system_prompt: bool = True
    """Whether requests without a system message get the one that the adapter was trained with."""

    @property
    def undeployed(self) -> bool:
        """True if the alias answers nothing from here on."""
        return self.action == "undeploy"

    @property
    def answer(self) -> tuple[str, bool]:
        """What the alias answers with: two releases that are equal in this answer alike."""
        return self.digest, self.system_prompt

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """The adapters that it needs, by name and digest."""
        beside = [(self.candidate.adapter, self.candidate.digest)] if self.candidate else []
        return [(self.adapter, self.digest), *beside]

    @property
    def digests(self) -> frozenset[str]:
        """The adapters that it needs."""
        return frozenset(digest for _, digest in self.adapters)

    def as_dict(self) -> dict[str, Any]:
        """Return the release as ``--json`` prints it."""
        return {**asdict(self), "created": iso(self.created)}
