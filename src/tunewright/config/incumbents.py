"""The config's evaluate.incumbents: models in use today, which the adapter may replace."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tunewright.config.endpoint import EndpointConfig

_PARAMETERS = {"temperature": 0, "max_tokens": 1024}


class IncumbentConfig(EndpointConfig):
    """A hosted model that answers dev and test as an arm. Requires base_url and model."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$",
            description="The arm's name after `incumbent-`; letters, digits, dot, hyphen and underscore.",
        ),
    ]
    parameters: Annotated[
        dict[str, Any],
        Field(
            description="Further parameters of every request, as your application sends them (temperature 0 makes "
            "answers reproducible; 1024 tokens cut few answers, and cut ones are counted)."
        ),
    ] = _PARAMETERS
    system_prompt: Annotated[
        str | None,
        Field(
            min_length=1, description="System prompt to send in place of the rows' own (null: the rows' own, if any)."
        ),
    ] = None
    trained_on: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="Added files of pairs that this model was itself trained on. Test rows from them favour it: "
            "they are counted, and the loss is also measured on the others."
        ),
    ] = ()
    budget: Annotated[
        float | None,
        Field(
            gt=0,
            description="Highest cost of this incumbent's answers, in the prices' currency (null: no limit). It "
            "requires prices and a limit on reply tokens.",
        ),
    ] = None
    frozen: Annotated[
        bool,
        Field(
            description="Use frozen answers only and send nothing, for an endpoint that is gone. Rows without a frozen "
            "answer are left out of the contrast and counted."
        ),
    ] = False

    @model_validator(mode="after")
    def _complete(self) -> IncumbentConfig:
        if self.base_url is None or self.model is None:
            raise ValueError("set base_url and model (also with frozen: they identify the frozen answers)")
        if self.budget is not None and self.price_input is None:
            raise ValueError("a budget requires price_input and price_output")
        if self.budget is not None and self.reply_limit is None:
            raise ValueError("a budget requires max_tokens or max_completion_tokens among the parameters")
        return self
