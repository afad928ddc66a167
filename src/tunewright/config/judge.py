"""The config's judge section: the model that compares answers, and its budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tunewright.config.endpoint import EndpointConfig


class ReferenceModelConfig(EndpointConfig):
    """A model to compare the tuned answers with: an endpoint, or its answers in a file."""

    answers: Annotated[
        str | None,
        Field(
            min_length=1,
            description='A JSONL file of {"key": PAIR KEY, "answer": TEXT}, relative to this file, in place of '
            "base_url.",
        ),
    ] = None

    @model_validator(mode="after")
    def _one_source(self) -> ReferenceModelConfig:
        if (self.answers is None) == (self.base_url is None):
            raise ValueError("set either answers (a file) or base_url and model (an endpoint)")
        if self.base_url is not None and self.model is None:
            raise ValueError("base_url requires model")
        return self


class JudgeConfig(EndpointConfig):
    """The model that judges answers; controls test it on every run. Requires base_url and model."""

    criteria: Annotated[
        str | None,
        Field(min_length=1, description="Criteria to add to the judge's instructions (null: none)."),
    ] = None
    budget: Annotated[
        float | None,
        Field(gt=0, description="Highest cost of judging one evaluation, in the prices' currency (null: no limit)."),
    ] = None
    controls: Annotated[
        int,
        Field(
            ge=14,
            description="Maximum number of items on which the judge itself is tested (30: a control passes with up "
            "to two failures; "
            "fewer than 14 cannot prove 80% even without a failure).",
        ),
    ] = 30
    reference_model: Annotated[
        ReferenceModelConfig | None,
        Field(
            description="Another model to compare the tuned answers with: base_url and model, or answers (null: none)."
        ),
    ] = None

    @model_validator(mode="after")
    def _priced_budget(self) -> JudgeConfig:
        if self.budget is None:
            return self
        asked = [self, self.reference_model] if self.reference_model and self.reference_model.base_url else [self]
        for endpoint in asked:
            if endpoint.price_input is None:
                raise ValueError("a budget requires price_input and price_output of every endpoint")
            if endpoint.reply_limit is None:
                raise ValueError("a budget requires max_tokens or max_completion_tokens among the parameters")
        return self
