"""Results of the isolation test and the serving check, and their records in a release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunewright.core.text import count_of
from tunewright.render.blocks import Block, Lead, Notes, table, words

IsolationVerdict = Literal["isolated", "not isolated", "can't tell"]
_MAX_REASONS = 8


@dataclass(frozen=True)
class Failure:
    """A wrong answer."""

    check: str
    asked: str
    """The model that should have answered."""
    shortfall: float
    """In nats."""
    like: str | None
    """The model that could have given this answer, if there is one."""


@dataclass(frozen=True)
class IsolationCheck:
    """One check of the test: one pattern of requests."""

    name: str
    asked: int
    """The number of requests."""
    wrong: int
    """The number of answers from a wrong model."""
    worst: float
    """The largest shortfall, in nats."""


@dataclass(frozen=True)
class IsolationResult:
    """The result of the test."""

    engine: str
    tolerance: float
    models: tuple[str, ...]
    checks: tuple[IsolationCheck, ...]
    failures: tuple[Failure, ...]
    alike: tuple[tuple[str, str], ...]
    """Pairs that no probe distinguishes: if one answered for the other, the test would not detect it."""

    @property
    def verdict(self) -> IsolationVerdict:
        """The verdict: any wrong answer decides it; without one, the probes must distinguish every pair of models."""
        if self.failures:
            return "not isolated"
        return "can't tell" if self.alike else "isolated"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons for a verdict other than "isolated", one per line, shortened to the first few and a count."""
        lines = [
            f"{failure.check}: a request for {failure.asked} got "
            + (
                f"the answer of {failure.like}"
                if failure.like
                else f"an answer that falls short by {failure.shortfall:.1f} nats"
            )
            for failure in self.failures
        ]
        if len(lines) > _MAX_REASONS:
            lines[_MAX_REASONS:] = [f"and {len(lines) - _MAX_REASONS} more"]
        return (
            *lines,
            *(f"{one} and {other} give the same answers to all prompts" for one, other in self.alike),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        failures: dict[str, list[dict[str, Any]]] = {check.name: [] for check in self.checks}
        for each in self.failures:
            shortfall = round(each.shortfall, 4)
            failures[each.check].append({"asked": each.asked, "shortfall": shortfall, "like": each.like})
        checks = [
            {"name": c.name, "asked": c.asked, "worst_shortfall": c.worst, "failures": failures[c.name]}
            for c in self.checks
        ]
        return {
            "verdict": self.verdict,
            "engine": self.engine,
            "tolerance_nats": self.tolerance,
            "models": list(self.models),
            "checks": checks,
            "alike": [list(pair) for pair in self.alike],
        }


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


def isolation_blocks(result: IsolationResult | IsolationTest, adapters: int) -> tuple[Block, ...]:
    """Return the checks, the failures, and the conclusion for the base and ``adapters`` adapters."""
    rows = []
    for check in result.checks:
        wrong = str(check.wrong or "none") if check.asked else "not run: needs two adapters"
        rows.append((check.name, str(check.asked), f"{check.worst:.3f} nats", wrong))
    title = f"Isolation of {result.engine}"
    head = ("Engine asked", "Answers", "Worst shortfall", *words("Wrong"))
    return Lead(title), table(title, head, rows), Notes((*result.reasons, _isolation_conclusion(result, adapters)))


def _isolation_conclusion(result: IsolationResult | IsolationTest, adapters: int) -> str:
    models = f"the base and {count_of(adapters, 'adapter')}"
    if result.verdict == "isolated":
        return (
            f"Isolated: {result.engine} keeps {models} apart; no token fell short of the reference's choice by over "
            f"{result.tolerance} nats."
        )
    if result.verdict == "not isolated":
        return f"NOT isolated: {result.engine} answers with a model other than the requested one. Do not serve."
    return f"Can't tell: no answer was wrong, but some of {models} give the same answers."


_SERVED = {"adapter": "the adapter", "identity": "an identity adapter", "merged": "merged into the base"}


def serving_blocks(check: ServingCheck) -> tuple[Block, ...]:
    """Return the figures of a serving check with their 95% intervals, and its conclusion."""
    rows = []
    for each in check.figures:
        kl = "none reported" if each.kl is None else f"{each.kl.value:.2g} ({each.kl.low:.2g} to {each.kl.high:.2g})"
        formed, change = "no JSON or calls", ""
        if each.well_formed is not None and each.change is not None:
            formed = f"{100 * each.well_formed.value:.0f}% of {each.formed}"
            change = f"{100 * each.change.value:+.0f} ({100 * each.change.low:+.0f} to {100 * each.change.high:+.0f})"
        same, wrong = _share(each.same), _share(each.wrong)
        rows.append((_SERVED[each.served], str(each.prompts), kl, f"{each.kl_limit:.2g}", same, wrong, formed, change))
    shares = words("The same", "Wrong", "Well-formed", "Change")
    head = ("Served", "Answers", *words("KL, nats"), "Allowed", *shares)
    title = f"Answers through {check.engine}, compared with PEFT's"
    left_out = [f"The merged model was not served: {check.left_out}."] if check.left_out else []
    if check.passes:
        conclusion = f"{check.engine} answers as the trained model does, within these intervals."
    else:
        conclusion = f"{check.engine} does NOT answer as the trained model does."
    return Lead(title), table(title, head, rows), Notes((*left_out, *check.reasons, conclusion))


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f}% ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"
