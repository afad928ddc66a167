"""The config's judge section: which model compares answers, and what it may cost."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tunewright.config.section import Section

_PARAMETERS = {"temperature": 0, "max_tokens": 512}
_OURS = {"model", "messages", "stream", "stream_options", "n"}


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible API."""

    url: Annotated[
        str | None,
        Field(
            pattern=r"^https?://[^@\s]+$",
            description="The API's root, such as https://api.openai.com/v1 (no password in it: key_env is for that).",
        ),
    ] = None
    model: Annotated[str | None, Field(min_length=1, description="The model's name there.")] = None
    key_env: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
            description="Name of the environment variable that holds the API key (null: none is sent).",
        ),
    ] = None
    parameters: Annotated[
        dict[str, Any],
        Field(
            description="Sent with every request as they are (temperature 0: a reply that can be had again; 512 "
            "tokens: room for a short reason. A reasoning model wants its own, such as max_completion_tokens: 4096)."
        ),
    ] = _PARAMETERS
    concurrency: Annotated[int, Field(ge=1, le=256, description="Requests under way at once.")] = 8
    requests_per_minute: Annotated[
        float | None, Field(gt=0, description="Most requests sent in a minute, retries included (null: no limit).")
    ] = None
    timeout: Annotated[float, Field(gt=0, description="Seconds that a reply may take.")] = 120.0
    retries: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="How often a request is sent again after a lost connection or status 408, 409, 429 or 5xx; "
            "waits as Retry-After says, else 1, 2, 4, ... seconds.",
        ),
    ] = 5
    price_input: Annotated[
        float | None, Field(ge=0, description="Price of a million prompt tokens, in any one currency.")
    ] = None
    price_output: Annotated[float | None, Field(ge=0, description="Price of a million reply tokens.")] = None

    @field_validator("parameters")
    @classmethod
    def _none_of_ours(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(_OURS & parameters.keys()):
            raise ValueError(f"{name} is set by the judge itself")
        return parameters

    @model_validator(mode="after")
    def _both_prices(self) -> EndpointConfig:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output go together")
        return self

    @property
    def reply_limit(self) -> int | None:
        """The most tokens that a reply may have, if the parameters say so."""
        for name in ("max_completion_tokens", "max_tokens"):
            if isinstance(self.parameters.get(name), int):
                return int(self.parameters[name])
        return None


class ReferenceModelConfig(EndpointConfig):
    """A model whose answers the tuned ones are held against: asked for them, or its answers in a file."""

    answers: Annotated[
        str | None,
        Field(
            min_length=1,
            description='A JSONL file of {"key": PAIR KEY, "answer": TEXT}, relative to this file, in place of url.',
        ),
    ] = None

    @model_validator(mode="after")
    def _one_source(self) -> ReferenceModelConfig:
        if (self.answers is None) == (self.url is None):
            raise ValueError("either answers (a file) or url and model (an endpoint)")
        if self.url is not None and self.model is None:
            raise ValueError("url needs a model")
        return self


class JudgeConfig(EndpointConfig):
    """Which model judges answers, held to controls on every run. Needs url and model."""

    criteria: Annotated[
        str | None,
        Field(min_length=1, description="What counts here, added to the judge's instructions (null: nothing)."),
    ] = None
    budget: Annotated[
        float | None,
        Field(gt=0, description="Most that judging one evaluation may cost, in the prices' currency (null: no cap)."),
    ] = None
    controls: Annotated[
        int,
        Field(
            ge=14,
            description="Items, at most, on which the judge itself is tested (30: up to two failures of a control "
            "pass; with fewer than 14 even none proves 80%).",
        ),
    ] = 30
    reference_model: Annotated[
        ReferenceModelConfig | None,
        Field(description="Another model to hold the tuned answers against: url and model, or answers (null: none)."),
    ] = None

    @model_validator(mode="after")
    def _priced_budget(self) -> JudgeConfig:
        if self.budget is None:
            return self
        asked = [self, self.reference_model] if self.reference_model and self.reference_model.url else [self]
        for endpoint in asked:
            if endpoint.price_input is None:
                raise ValueError("a budget needs price_input and price_output of every endpoint")
            if endpoint.reply_limit is None:
                raise ValueError("a budget needs max_tokens or max_completion_tokens among the parameters")
        return self
