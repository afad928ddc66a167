"""The config's judge section: the model that compares answers, and its budget."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tunewright.config.section import Section

_PARAMETERS = {"temperature": 0, "max_tokens": 512}
_OURS = {"model", "messages", "stream", "stream_options", "n"}


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible API."""

    base_url: Annotated[
        str | None,
        Field(
            pattern=r"^https?://[^@\s]+$",
            description="The API's root, such as https://api.openai.com/v1 (no password in it: api_key_env is "
            "for that).",
        ),
    ] = None
    model: Annotated[str | None, Field(min_length=1, description="The model's name at that endpoint.")] = None
    api_key_env: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
            description="Name of the environment variable that holds the API key (null: no key is sent).",
        ),
    ] = None
    parameters: Annotated[
        dict[str, Any],
        Field(
            description="Further parameters of every request (temperature 0 makes replies reproducible; 512 tokens "
            "leave room for a short reason). A reasoning model needs others, such as max_completion_tokens: 4096."
        ),
    ] = _PARAMETERS
    concurrency: Annotated[int, Field(ge=1, le=256, description="Requests in flight at once.")] = 8
    requests_per_minute: Annotated[
        float | None,
        Field(gt=0, description="Maximum number of requests sent per minute, retries included (null: no limit)."),
    ] = None
    timeout: Annotated[float, Field(gt=0, description="Seconds to wait for a reply.")] = 120.0
    max_retries: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="Retries of a request after a lost connection or status 408, 409, 429 or 5xx. Waits follow "
            "Retry-After, else 1, 2, 4, ... seconds.",
        ),
    ] = 5
    price_input: Annotated[
        float | None, Field(ge=0, description="Price of a million prompt tokens, in any currency.")
    ] = None
    price_output: Annotated[
        float | None, Field(ge=0, description="Price of a million reply tokens, in the same currency.")
    ] = None

    @field_validator("parameters")
    @classmethod
    def _none_of_ours(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(_OURS & parameters.keys()):
            raise ValueError(f"{name} is set by the judge itself; remove it")
        return parameters

    @model_validator(mode="after")
    def _both_prices(self) -> EndpointConfig:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("set both price_input and price_output, or neither")
        return self

    @property
    def reply_limit(self) -> int | None:
        """Maximum number of tokens that the parameters allow a reply; None if they set no limit."""
        for name in ("max_completion_tokens", "max_tokens"):
            if isinstance(self.parameters.get(name), int):
                return int(self.parameters[name])
        return None


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
