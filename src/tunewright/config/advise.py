"""The config's advise section: the pilot that `tunewright advise` trains, and prices of calls and training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tunewright.config.section import Section


class PriceConfig(Section):
    """Prices of calls and training, in one currency; missing ones are measured on this machine."""

    input: Annotated[
        float | None,
        Field(ge=0, description="Price of a million input tokens (null: from the measured speed and `hour`)."),
    ] = None
    output: Annotated[
        float | None,
        Field(ge=0, description="Price of a million output tokens (null: from the measured speed and `hour`)."),
    ] = None
    cached_discount: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Discount on input tokens in a prefix cache, times the share of calls that hit it (0.9: cache "
            "reads in Anthropic's price list; 0: no cache).",
        ),
    ] = 0.9
    hour: Annotated[
        float | None,
        Field(
            gt=0, description="Price of an hour of the machine that trains (and serves, if there are no token prices)."
        ),
    ] = None
    training: Annotated[
        float | None,
        Field(
            ge=0, description="Price of training the adapter (null: the pilot's time, scaled to all rows, at `hour`)."
        ),
    ] = None
    labelling: Annotated[
        float, Field(ge=0, description="Cost of labelling the pairs, or those still to be labelled.")
    ] = 0
    hosting: Annotated[
        float,
        Field(ge=0, description="Monthly cost of hosting the adapter, on top of the base's."),
    ] = 0

    @model_validator(mode="after")
    def _check_units(self) -> PriceConfig:
        if (self.input is None) != (self.output is None):
            raise ValueError("set both input and output, or neither")
        if self.hour is None and (self.input is not None) != (self.training is not None):
            raise ValueError("without hour, set both the token prices and training, or neither")
        if self.hour is None and self.training is None and (self.labelling or self.hosting):
            raise ValueError("labelling and hosting require hour, or input, output and training")
        return self

    @property
    def in_currency(self) -> bool:
        """True if costs are in a currency; otherwise they are hours of this machine."""
        return self.hour is not None or self.input is not None


class AdviseConfig(Section):
    """Settings of `tunewright advise`, which estimates whether fine-tuning is worth it."""

    pilot_fraction: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Share of the training rows for the pilot adapter: whole clusters, drawn by the seed, at least "
            "50 rows. A second pilot trains on half of them to estimate the trend (0.25: two doublings from all rows).",
        ),
    ] = 0.25
    pilot_max_samples: Annotated[
        int,
        Field(
            ge=50, description="Maximum number of rows of the pilot, whatever the share (500: minutes, not a weekend)."
        ),
    ] = 500
    calls_per_month: Annotated[
        float | None, Field(gt=0, description="Expected calls per month: turns the break-even point into a time.")
    ] = None
    months: Annotated[int, Field(ge=1, description="Months that the adapter will serve before it is retrained.")] = 12
    prices: Annotated[
        PriceConfig | None,
        Field(
            description="Prices, such as {input: 0.2, output: 0.6, training: 40} (per million tokens) or {hour: 2.5} "
            "(null: costs are counted in hours of this machine)."
        ),
    ] = None
