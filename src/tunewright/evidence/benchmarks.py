"""The evidence's section on regression benchmarks; readable without torch or the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.evidence.base import Interval, Part

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
