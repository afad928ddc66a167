"""A release: the adapter of an alias, its candidate, its isolation test, and the grounds for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunewright.serving.tenants.times import iso

IsolationVerdict = Literal["isolated", "not isolated", "can't tell"]


@dataclass(frozen=True)
class IsolationCheck:
    """One check of the test: one pattern of requests."""

    name: str
    asked: int
    wrong: int
    """The number of answers from a wrong model."""
    worst: float
    """The largest shortfall, in nats."""


@dataclass(frozen=True)
class IsolationTest:
    """A run of the test, and its result."""

    verdict: IsolationVerdict
    subject: str
    """The SHA-256 of everything the result depends on; an equal subject need not be tested again."""
    engine: str
    device: str
    """The GPU's name, or the kind of processor."""
    base: str
    """The base's digest."""
    adapters: tuple[str, ...]
    """The digests of all adapters that were loaded together."""
    versions: dict[str, str]
    """Versions of packages; those of the engine's environment as ``vllm:torch``."""
    tolerance: float
    """Maximum nats by which a correct token may be less likely than the reference's choice."""
    checks: tuple[IsolationCheck, ...]
    alike: tuple[tuple[str, str], ...]
    """Pairs of models, by name, that no prompt distinguishes."""
    reasons: tuple[str, ...]
    """The reasons why the result is "not isolated" or "can't tell"."""
    tested: str
    """The time of the end, as ISO 8601 in UTC."""
    seconds: float

    @property
    def summary(self) -> str:
        """The result in a few words."""
        return f"{self.verdict} on {self.engine}"

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> IsolationTest:
        """Return the test that the state has stored as JSON."""
        lists = {
            "adapters": tuple(stored["adapters"]),
            "checks": tuple(IsolationCheck(**check) for check in stored["checks"]),
            "alike": tuple((one, other) for one, other in stored["alike"]),
            "reasons": tuple(stored["reasons"]),
        }
        return cls(**{**stored, **lists})


ServedAs = Literal["adapter", "identity", "merged"]
"""A model of the serving check: the adapter, an adapter of the same shape that changes nothing, or base and adapter
merged into one model."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ServingFigures:
    """One model's answers through the engine, compared with those of the same model under PEFT.

    The identity adapter is compared with the base, the other two with the adapter.
    """

    served: ServedAs
    prompts: int
    places: int
    """Places of the answers at which distributions were compared."""
    kl: Estimate | None
    """Mean KL divergence from PEFT to the engine, in nats; None if the engine reported no place."""
    kl_limit: float
    effect: float
    """Mean KL divergence from the reference to the base at the same places, in nats; 0 for the identity adapter."""
    same: Estimate
    """The share of answers that are the same, token by token."""
    wrong: Estimate
    """The share of answers that leave the reference's at a token that is not nearly as likely."""
    formed: int
    """The number of prompts whose ideal answer is JSON or has calls."""
    well_formed: Estimate | None
    """The share of these whose answer is well-formed; None without such prompts."""
    trained_well_formed: Estimate | None
    change: Estimate | None
    """The first share minus the second, paired."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> ServingFigures:
        """Return the figures that the state has stored as JSON."""
        fields: dict[str, Any] = {k: Estimate(**v) if isinstance(v, dict) else v for k, v in stored.items()}
        return cls(**fields)


@dataclass(frozen=True)
class ServingCheck:
    """A run of the serving check, and its result."""

    subject: str
    """The SHA-256 of everything the result depends on; an equal subject need not be checked again."""
    engine: str
    device: str
    base: str
    """The base's digest."""
    adapter: str
    """The adapter's digest."""
    versions: dict[str, str]
    tolerance: float
    """Nats by which another token may be less likely in an answer that is not wrong."""
    figures: tuple[ServingFigures, ...]
    left_out: str | None
    """The reason why the merged model was not served."""
    reasons: tuple[str, ...]
    """The reasons why the check fails; empty if it passes."""
    checked: str
    """The time of the end, as ISO 8601 in UTC."""
    seconds: float

    @property
    def passes(self) -> bool:
        """True if no figure is beyond its limit."""
        return not self.reasons

    @property
    def summary(self) -> str:
        """The result in a few words."""
        return f"{'passed' if self.passes else 'failed'} on {self.engine}"

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> ServingCheck:
        """Return the check that the state has stored as JSON."""
        figures = tuple(ServingFigures.of(each) for each in stored["figures"])
        return cls(**{**stored, "figures": figures, "reasons": tuple(stored["reasons"])})


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
