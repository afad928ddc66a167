"""The evidence's section on what the base could do before; readable without torch or the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.evidence.base import Interval, Part

SuiteKind = Literal["samples", "choices", "instructions", "lm_eval"]
Unit = Literal["share", "nats per token"]
Result = Literal["not worse", "worse", "can't tell"]


class Control(Part):
    """A measurement whose outcome is known beforehand, if the suite measures what it is meant to."""

    name: Annotated[str, Field(description="What was measured, e.g. 'questions dealt to other items'.")]
    score: float
    items: int
    wanted: Annotated[str, Field(description="In words, e.g. 'at least 90%'.")]
    passed: bool


class Suite(Part):
    """One suite on the same items with the adapter off and on."""

    name: str
    kind: SuiteKind
    unit: Unit
    metric: Annotated[str, Field(description="What an item scores, e.g. acc_norm; of a loss, less is better.")]
    items: int
    clusters: Annotated[
        int | None, Field(description="Independent groups among the items; null: items are drawn independently.")
    ] = None
    left_out: Annotated[tuple[str, ...], Field(description="Items that could not be measured, and why, counted.")] = ()
    base: Annotated[float, Field(description="Adapter off.")]
    tuned: Annotated[float, Field(description="Adapter on.")]
    drop: Annotated[float, Field(description="How much worse tuned is; negative where it is better.")]
    interval: Annotated[Interval, Field(description="95%, two-sided, of the drop.")]
    limit: Annotated[float, Field(description="One-sided 95% upper limit of the drop.")]
    method: Annotated[str, Field(description="How interval and limit were made.")]
    margin: Annotated[float | None, Field(description="The drop that is still no loss; null: none was set.")]
    changed: Annotated[
        float | None, Field(description="Share of items right under one only; null: not right or wrong.")
    ]
    items_needed: Annotated[
        int | None,
        Field(description="Items that would show no loss with 80% power, by what was observed; null without margin."),
    ]
    expected_items: Annotated[
        int | None, Field(description="The same as said beforehand, for a tenth of items changed; null: not said.")
    ] = None
    divergence: Annotated[
        float | None, Field(description="Of samples: Kullback-Leibler divergence from base to tuned, nats per token.")
    ] = None
    divergence_interval: Interval | None = None
    truncated: Annotated[
        tuple[int, int] | None, Field(description="Answers that ran into the token limit, adapter off and on.")
    ] = None
    controls: tuple[Control, ...]
    result: Annotated[Result, Field(description="By limit and interval against the margin; can't tell without one.")]

    @property
    def failed(self) -> tuple[Control, ...]:
        """The controls that did not come out as they have to."""
        return tuple(control for control in self.controls if not control.passed)

    @property
    def gates(self) -> bool:
        """True if it may decide: a margin is set and all its controls passed."""
        return self.margin is not None and not self.failed


class Benchmarks(Part):
    """Everything measured of what the base could do before."""

    id: Annotated[str, Field(description="12 hex digits: a digest of all that decides the measurement.")]
    adapter: Annotated[str, Field(description="Its digest.")]
    suites: tuple[Suite, ...]
    not_measured: Annotated[
        tuple[str, ...], Field(description="Suites without a margin that could not be measured, and why.")
    ] = ()
    lineage: Annotated[
        dict[str, Any], Field(description="Base, template, weights, packages, files by digest, UTC time.")
    ]
