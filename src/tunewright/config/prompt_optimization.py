"""The config's section on prompt optimization: the reflection model, and the limits of a run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tunewright.config.endpoint import EndpointConfig
from tunewright.config.section import Section

_PARAMETERS = {"temperature": 1.0, "max_tokens": 4096}


class ReflectionModelConfig(EndpointConfig):
    """The model that reads answers with their faults and proposes instructions. Requires base_url and model."""

    parameters: Annotated[
        dict[str, Any],
        Field(
            description="Further parameters of every request (temperature 1 varies the proposals; 4,096 tokens leave "
            "room for a long instruction). A reasoning model needs others, such as max_completion_tokens: 8192."
        ),
    ] = _PARAMETERS


class PromptOptimizationConfig(Section):
    """Optimization of the instruction by GEPA, which `tunewright optimize-prompt` runs."""

    reflection_model: Annotated[
        ReflectionModelConfig | None,
        Field(description="The model that proposes instructions (null: the judge's endpoint and parameters)."),
    ] = None
    budget: Annotated[
        float | None,
        Field(gt=0, description="Highest cost of one optimization, in the prices' currency (null: no limit)."),
    ] = None
    max_reflection_calls: Annotated[
        int, Field(ge=1, description="Maximum number of requests to the reflection model in one optimization.")
    ] = 50
    max_metric_calls: Annotated[
        int,
        Field(
            ge=10,
            description="Scored answers of the base after which no further instruction is tried (GEPA's measure of "
            "its budget); at least two passes over the validation rows.",
        ),
    ] = 600
    minibatch_size: Annotated[
        int, Field(ge=1, le=32, description="Training rows that the reflection model sees at once (3: GEPA's default).")
    ] = 3
    val_items: Annotated[
        int,
        Field(
            ge=2,
            description="Training rows, in whole clusters, that score the instructions; the others are shown to the "
            "reflection model. At most half of the training rows.",
        ),
    ] = 50
    seed: Annotated[
        int | None, Field(ge=0, lt=2**31, description="Seed of the optimization (null: the project's seed).")
    ] = None
