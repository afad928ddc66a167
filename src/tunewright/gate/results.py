"""Results of the isolation test, the serving check and the check of an export, with their limits and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.config import MetricName
from tunewright.core.text import count_of
from tunewright.evidence.common import Part
from tunewright.metrics import score_text
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
    """Versions of packages; versions in the engine's environment as ``vllm:torch``."""
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


ServedAs = Literal["adapter", "identity", "merged"]
"""A model of the serving check: the adapter, an adapter of the same shape that changes nothing, or base and adapter
merged into one model."""


@dataclass(frozen=True)
class IntervalEstimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ServingFigures:
    """One model's answers through the engine, compared with the same model's answers under PEFT.

    The identity adapter is compared with the base, the other two with the adapter.
    """

    served: ServedAs
    prompts: int
    places: int
    """Places of the answers at which distributions were compared."""
    kl: IntervalEstimate | None
    """Mean KL divergence from PEFT to the engine, in nats; None if the engine reported no place."""
    kl_limit: float
    effect: float
    """Mean KL divergence from the reference to the base at the same places, in nats; 0 for the identity adapter."""
    same: IntervalEstimate
    """The share of answers that are the same, token by token."""
    wrong: IntervalEstimate
    """The share of answers that leave the reference's answer at a token that is not nearly as likely."""
    formed: int
    """The number of prompts whose ideal answer is JSON or has calls."""
    well_formed: IntervalEstimate | None
    """The share of these prompts whose answer is well-formed; None without such prompts."""
    trained_well_formed: IntervalEstimate | None
    change: IntervalEstimate | None
    """The first share minus the second, paired."""


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


def _share(estimate: IntervalEstimate) -> str:
    return f"{100 * estimate.value:.0f}% ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"


# An artifact of an export answers the same held-out prompts as the trained model (the base as quantized in training,
# with the adapter), and scores the trained model's answers token by token. Only rounding may differ.

TOP = 100
"""The trained model's likeliest tokens at a place whose log-probabilities are compared. No decoding reaches the tokens
below them, and engines list only a limited number.
"""

Precision = Literal["16-bit", "8-bit", "fp8", "5-bit", "4-bit"]


class Figures(Part):
    """Measurements of an artifact against the trained model."""

    prompts: Annotated[int, Field(description="Held-out prompts that were answered.")]
    places: Annotated[int, Field(description="Places of the trained model's answers at which distributions compare.")]
    arithmetic: Annotated[str, Field(description="Device and precision of the artifact.")]
    max_logit: Annotated[
        float,
        Field(description="Largest change of a log-probability, among the 100 likeliest tokens of each place."),
    ]
    kl: Annotated[float, Field(description="Mean KL divergence from the trained model to the artifact, nats.")]
    effect: Annotated[float, Field(description="The same from the trained model to its base: what the adapter does.")]
    lost: Annotated[
        float, Field(description="kl / effect: 0 where both agree, 1 for the base itself, or of no effect at all.")
    ]
    from_base: Annotated[float, Field(description="The same from the base to the artifact.")]
    top1: Annotated[float, Field(description="Share of the places at which both find the same token likeliest.")]
    greedy: Annotated[float, Field(description="Share of the prompts with the same greedy answer, token by token.")]
    metric: MetricName
    score: Annotated[float, Field(description="The artifact's score by the config's metric on these prompts.")]
    trained_score: Annotated[float, Field(description="The trained model's.")]
    rendered: Annotated[int, Field(description="Prompts that the artifact itself renders to the ids of training.")]
    functions: Annotated[
        int, Field(description="Conversations with function calls and results that were rendered as well.")
    ] = 0
    functions_rendered: Annotated[int, Field(description="Those rendered to the ids of training.")] = 0


class Limits(Part):
    """Limits of the differences from the trained model; docs/how-to/export.md has the reasons."""

    max_logit: float
    kl: float
    lost: float
    top1: float
    greedy: float
    score: float


EFFECT = 1e-3
"""Nats: an adapter that changes the base's distributions by less has no effect that could be lost or kept."""

FEW = 2
"""Number of places, or prompts, that may differ in any case: one near tie in 30 places is already 3%."""

LIMITS: dict[Precision, Limits] = {
    "16-bit": Limits(max_logit=1.0, kl=0.002, lost=0.02, top1=0.98, greedy=0.9, score=0.05),
    "8-bit": Limits(max_logit=3.0, kl=0.02, lost=0.05, top1=0.95, greedy=0.8, score=0.1),
    # A number in FP8 has 3 bits after the first, so that single log-probabilities move as far as with 5-bit integers.
    "fp8": Limits(max_logit=6.0, kl=0.02, lost=0.05, top1=0.95, greedy=0.8, score=0.1),
    "5-bit": Limits(max_logit=5.0, kl=0.05, lost=0.08, top1=0.9, greedy=0.7, score=0.1),
    "4-bit": Limits(max_logit=8.0, kl=0.1, lost=0.1, top1=0.85, greedy=0.6, score=0.1),
}


def shortcomings(figures: Figures, limits: Limits) -> list[str]:
    """Return why an artifact fails, one sentence each; empty if it passes."""
    found = []
    if figures.effect < EFFECT:
        found.append(
            f"the adapter has no effect on these prompts (KL from the base {figures.effect:.1e} nats; at least "
            f"{EFFECT:g} needed)"
        )
    elif figures.lost > limits.lost:
        found.append(
            f"it lost {100 * figures.lost:.1f}% of the adapter's effect (KL {figures.kl:.2g} of {figures.effect:.2g} "
            f"nats; {100 * limits.lost:g}% allowed)" + (": it is the base" if figures.from_base < EFFECT else "")
        )
    if figures.kl > limits.kl:
        found.append(f"mean KL {figures.kl:.2g} nats, {limits.kl:g} allowed")
    if figures.max_logit > limits.max_logit:
        found.append(f"a log-probability moved by {figures.max_logit:.2f}, {limits.max_logit:g} allowed")
    if _too_many(figures.top1, limits.top1, figures.places):
        found.append(f"the likeliest token is the same at {100 * figures.top1:.1f}%, {100 * limits.top1:g}% needed")
    if _too_many(figures.greedy, limits.greedy, figures.prompts):
        found.append(f"{100 * figures.greedy:.1f}% of the greedy answers are the same, {100 * limits.greedy:g}% needed")
    if figures.trained_score - figures.score > limits.score:
        own, trained = (score_text(figures.metric, score) for score in (figures.score, figures.trained_score))
        found.append(f"it scores {own} where the trained model scores {trained}")
    if figures.rendered < figures.prompts:
        found.append(
            f"it renders {figures.prompts - figures.rendered} of {figures.prompts} prompts to other tokens than "
            "training did"
        )
    if figures.functions_rendered < figures.functions:
        found.append(
            f"it renders {figures.functions - figures.functions_rendered} of {figures.functions} conversations with "
            "functions to other tokens than training would"
        )
    return found


def _too_many(same: float, needed: float, of: int) -> bool:
    """Return whether more differ than allowed."""
    return round((1 - same) * of) > max((1 - needed) * of, FEW)


def figures_blocks(found: Figures, limits: Limits) -> tuple[Block, ...]:
    """Return the figures next to their limits."""
    own, trained = (score_text(found.metric, score) for score in (found.score, found.trained_score))
    rows = [
        ("mean KL, nats", f"{found.kl:.2g}", f"{limits.kl:g}"),
        ("of the adapter's effect lost", f"{100 * found.lost:.2g}%", f"{100 * limits.lost:g}%"),
        ("largest change of a log-probability", f"{found.max_logit:.2g}", f"{limits.max_logit:g}"),
        ("same likeliest token", f"{100 * found.top1:.1f}%", f"{100 * limits.top1:g}%"),
        ("same greedy answer", f"{100 * found.greedy:.1f}%", f"{100 * limits.greedy:g}%"),
        ("score", own, f"{trained} - {100 * limits.score:g}"),
        ("prompts rendered as in training", f"{found.rendered}", f"{found.prompts}"),
    ]
    if found.functions:
        rows.append(("conversations with functions, likewise", f"{found.functions_rendered}", f"{found.functions}"))
    rows.append(("KL from the base, nats", f"{found.from_base:.2g}", ""))
    title = f"Compared with the trained model on {found.prompts} dev prompts ({found.places} answer tokens)"
    return Lead(title), table(title, ("", "Measured", "Allowed"), rows)
