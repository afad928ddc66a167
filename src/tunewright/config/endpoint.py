"""A model behind an OpenAI-compatible API, as config sections name it."""

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
            raise ValueError(f"{name} is set by tunewright; remove it")
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
