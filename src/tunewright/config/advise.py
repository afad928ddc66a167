"""The config's advise section: what `tunewright advise` may spend on a pilot, and what calls cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tunewright.config.section import Section


class PriceConfig(Section):
    """What a call and a training cost, in one currency; what is left out is measured on this machine."""

    input: Annotated[
        float | None,
        Field(ge=0, description="A million input tokens (null: from the speed measured here and `hour`)."),
    ] = None
    output: Annotated[
        float | None,
        Field(ge=0, description="A million output tokens (null: from the speed measured here and `hour`)."),
    ] = None
    cached_discount: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="What is taken off input tokens that a prefix cache holds, times the share of calls that find "
            "them there (0.9: cache reads in Anthropic's price list; 0: there is no cache).",
        ),
    ] = 0.9
    hour: Annotated[
        float | None, Field(gt=0, description="An hour of the machine that trains (and serves, without token prices).")
    ] = None
    training: Annotated[
        float | None,
        Field(ge=0, description="Training the whole adapter (null: the pilot's time, scaled to all rows, at `hour`)."),
    ] = None
    labelling: Annotated[float, Field(ge=0, description="What the pairs cost, or those that are still to be made.")] = 0
    hosting: Annotated[
        float,
        Field(ge=0, description="Each month that the adapter is hosted, beyond what the base costs anyway."),
    ] = 0

    @model_validator(mode="after")
    def _check_units(self) -> PriceConfig:
        if (self.input is None) != (self.output is None):
            raise ValueError("input and output are named both or neither")
        if self.hour is None and (self.input is not None) != (self.training is not None):
            raise ValueError(
                "without hour, the price of tokens and that of training are named both or neither: neither can be "
                "told from the other's measured time"
            )
        if self.hour is None and self.training is None and (self.labelling or self.hosting):
            raise ValueError("labelling and hosting are money: name hour too, or input, output and training")
        return self

    @property
    def in_money(self) -> bool:
        """True if costs come out in the config's currency; else in hours of this machine."""
        return self.hour is not None or self.input is not None


class AdviseConfig(Section):
    """How `tunewright advise` finds out whether fine-tuning is worth it."""

    pilot_share: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Part of the training rows that the pilot adapter is trained on, whole clusters by the seed; "
            "at least 50 rows, if there are so many. Half of the part is trained on too, to see where it leads "
            "(0.25: two doublings are left to all rows).",
        ),
    ] = 0.25
    pilot_rows: Annotated[
        int, Field(ge=50, description="The most rows of the pilot, whatever the share (500: minutes, not a weekend).")
    ] = 500
    calls_per_month: Annotated[
        float | None, Field(gt=0, description="How often the model will be called: turns the break-even into time.")
    ] = None
    months: Annotated[
        int, Field(ge=1, description="How long the adapter will serve, at most, before it is trained anew.")
    ] = 12
    prices: Annotated[
        PriceConfig | None,
        Field(
            description="What calls and training cost, such as {input: 0.2, output: 0.6, training: 40} (tokens by the "
            "million), or {hour: 2.5}; null: all is counted in hours of this machine."
        ),
    ] = None
