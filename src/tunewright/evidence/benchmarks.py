"""The evidence's section on regression benchmarks, and the rule on it; readable without torch or the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.evidence.common import Interval, Part

SuiteKind = Literal["samples", "choices", "instructions", "lm_eval"]
Unit = Literal["share", "nats per token"]
Result = Literal["not worse", "worse", "can't tell"]


class Control(Part):
    """A measurement with a known outcome, which shows that the suite measures what it should."""

    name: Annotated[str, Field(description="The measurement, e.g. 'questions dealt to other items'.")]
    score: float
    items: int
    wanted: Annotated[str, Field(description="The required outcome in words, e.g. 'at least 90%'.")]
    passed: bool


class Suite(Part):
    """One suite on the same items with the adapter off and on."""

    name: str
    kind: SuiteKind
    unit: Unit
    metric: Annotated[str, Field(description="Score of an item, e.g. acc_norm; for a loss, lower is better.")]
    items: int
    clusters: Annotated[
        int | None, Field(description="Independent clusters among the items; null: items are drawn independently.")
    ] = None
    left_out: Annotated[
        tuple[str, ...], Field(description="Reason to number of items that could not be measured.")
    ] = ()
    base: Annotated[float, Field(description="Adapter off.")]
    tuned: Annotated[float, Field(description="Adapter on.")]
    drop: Annotated[float, Field(description="Drop of the score with the adapter on; negative if it is better.")]
    interval: Annotated[Interval, Field(description="Two-sided 95% interval of the drop.")]
    limit: Annotated[float, Field(description="One-sided 95% upper limit of the drop.")]
    method: Annotated[str, Field(description="Method of the interval and the limit.")]
    margin: Annotated[float | None, Field(description="The largest acceptable drop; null: none was set.")]
    changed: Annotated[
        float | None,
        Field(description="Share of items right in only one of the two; null if items are not right or wrong."),
    ]
    items_needed: Annotated[
        int | None,
        Field(
            description="Items needed to show no loss with 80% power, from the observed changes; null without a margin."
        ),
    ]
    expected_items: Annotated[
        int | None,
        Field(description="The same, computed beforehand for a tenth of the items changed; null: not computed."),
    ] = None
    divergence: Annotated[
        float | None,
        Field(description="On samples: Kullback-Leibler divergence from base to tuned, in nats per token."),
    ] = None
    divergence_interval: Interval | None = None
    truncated: Annotated[
        tuple[int, int] | None, Field(description="Answers cut at the token limit, adapter off and on.")
    ] = None
    controls: tuple[Control, ...]
    result: Annotated[
        Result, Field(description="Result from limit and interval against the margin; can't tell without a margin.")
    ]

    @property
    def failed(self) -> tuple[Control, ...]:
        """The controls that failed."""
        return tuple(control for control in self.controls if not control.passed)

    @property
    def gates(self) -> bool:
        """True if the suite may decide: a margin is set and all its controls passed."""
        return self.margin is not None and not self.failed


class Benchmarks(Part):
    """All measured regression benchmarks."""

    id: Annotated[str, Field(description="12 hex digits of a digest of everything that determines the measurement.")]
    adapter: Annotated[str, Field(description="The adapter's digest.")]
    suites: tuple[Suite, ...]
    not_measured: Annotated[
        tuple[str, ...], Field(description="Suites without a margin that could not be measured, with the reason.")
    ] = ()
    lineage: Annotated[
        dict[str, Any], Field(description="Base, template, weights, packages, digests of files, UTC time.")
    ]


@dataclass(frozen=True)
class RegressionResult:
    """Result of all benchmarks, with a reason per suite in plain sentences."""

    result: Result | None
    """None if no suite has a margin, so that there is no question to answer."""
    decides: bool
    """True if any suite may decide; the result is "can't tell" if suites have margins but none may decide."""
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: not worse, or no margin set; 3: worse; 4: can't tell."""
        return {None: 0, "not worse": 0, "worse": 3, "can't tell": 4}[self.result]


def standing(benchmarks: Benchmarks) -> RegressionResult:
    """Return *worse* if any deciding benchmark is worse, *not worse* if none can be, else *can't tell*.

    All must be shown to be not worse, so the level needs no correction (an intersection-union test, Berger 1982).
    Without a margin there is no question, so the answer is not "can't tell".
    """
    deciding = [suite for suite in benchmarks.suites if suite.gates]
    asked = [suite for suite in benchmarks.suites if suite.margin is not None]
    reasons = tuple(suite_text(suite) for suite in benchmarks.suites) + tuple(
        f"Not measured: {reason}" for reason in benchmarks.not_measured
    )
    return RegressionResult(_together(asked, deciding), bool(deciding), reasons)


def _together(asked: list[Suite], deciding: list[Suite]) -> Result | None:
    results = {suite.result for suite in deciding}
    if not asked:
        return None
    if "worse" in results:
        return "worse"
    return "not worse" if results == {"not worse"} else "can't tell"


def suite_text(suite: Suite) -> str:
    """Return a sentence about a suite: its measurement and result."""
    return f"{_measured(suite)} {_follows(suite)}"


def _measured(suite: Suite) -> str:
    if suite.unit == "share":
        scores = f"{suite.base:.1%} with the adapter off, {suite.tuned:.1%} with it on"
    else:
        scores = f"{suite.base:.3f} nats per token with the adapter off, {suite.tuned:.3f} with it on"
    limit = _amount(suite, suite.limit)
    if suite.drop < 0:
        change = f"better by {_amount(suite, -suite.drop)}, worse by at most {limit} (95%)"
    else:
        change = f"worse by {_amount(suite, suite.drop)}, at most {limit} (95%)"
    alike = "" if suite.clusters in (None, suite.items) else f" in {suite.clusters:,} clusters"
    return f"{suite.name}, {suite.items:,} items{alike}: {scores}; {change}."


def _follows(suite: Suite) -> str:
    if suite.margin is None:
        return "It has no margin, so it decides nothing."
    margin = _amount(suite, suite.margin)
    if suite.failed:
        failed = suite.failed[0]
        return f"It decides nothing: {failed.name} scored {_score(suite, failed.score)}, but must be {failed.wanted}."
    if suite.result == "worse":
        return f"The whole interval lies above the margin of {margin}: the adapter is worse here than the base."
    if suite.result == "not worse":
        return f"That is below the margin of {margin}: not worse."
    needed = f" About {suite.items_needed:,} items would settle it." if suite.items_needed else ""
    return f"Against a margin of {margin} this many items can't tell.{needed}"


def _amount(suite: Suite, drop: float) -> str:
    if suite.unit == "share":
        return f"{round(100 * drop, 1) + 0.0:g} points"
    return f"{round(drop, 3) + 0.0:g} nats"


def _score(suite: Suite, score: float) -> str:
    return f"{score:.1%}" if suite.unit == "share" else f"{score:.3f} nats"
