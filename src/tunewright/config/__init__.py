"""The config: everything that decides a result, as frozen, validated types.

Each field's description names the source of its default; the commented file that ``tunewright init`` writes and
the JSON Schema that ``tunewright config schema`` prints are both made from these descriptions.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunewright.config.data import DataConfig, Duplicates, Findable, MixConfig
from tunewright.config.endpoint import (
    EndpointConfig,
    GenerateConfig,
    IncumbentConfig,
    JudgeConfig,
    PromptOptimizationConfig,
    ReferenceModelConfig,
    ReflectionModelConfig,
)
from tunewright.config.evaluate import ConstrainConfig, EvaluateConfig
from tunewright.config.metrics import Metric, MetricName, metric_name
from tunewright.config.regressions import RegressionsConfig
from tunewright.config.section import (
    AnswerEngineName,
    DemonstrationOrder,
    EngineName,
    Quantization,
    RetrieverName,
    Section,
)
from tunewright.config.serve import GatewayConfig, ServeConfig
from tunewright.config.train import BETA, PRESETS, Method, ReplayConfig, Tracker, TrainConfig

__all__ = [
    "BETA",
    "PRESETS",
    "PROJECT_NAME",
    "AdviseConfig",
    "AnswerEngineName",
    "ChatConfig",
    "ComputeConfig",
    "Config",
    "ConstrainConfig",
    "DataConfig",
    "DemonstrationOrder",
    "Duplicates",
    "EndpointConfig",
    "EngineName",
    "EvaluateConfig",
    "Findable",
    "GatewayConfig",
    "GenerateConfig",
    "IncumbentConfig",
    "JudgeConfig",
    "Method",
    "Metric",
    "MetricName",
    "MixConfig",
    "PriceConfig",
    "PromptOptimizationConfig",
    "Quantization",
    "ReferenceModelConfig",
    "ReflectionModelConfig",
    "RegressionsConfig",
    "ReplayConfig",
    "RetrieverName",
    "ServeConfig",
    "Tracker",
    "TrainConfig",
    "metric_name",
]

PROJECT_NAME = r"[a-z0-9][a-z0-9\-]{0,39}"  # HTML's patterns need the backslash


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


def _plain_date(value: Any) -> Any:
    """Return a value that YAML reads as a date; reject seconds since 1970, which pydantic would accept."""
    if isinstance(value, str) or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)):
        return value
    raise ValueError("write a date like 2024-07-26")


class ChatConfig(Section):
    """Rendering of conversations to tokens, in training, evaluation and serving."""

    template: Annotated[
        Literal["auto", "own", "plain"],
        Field(
            description="`own` is the base's chat template. `plain` writes ### Instruction and ### Response (the "
            "headings of Stanford Alpaca). `auto` is plain only for a base without a template."
        ),
    ] = "auto"
    date: Annotated[
        datetime.date,
        BeforeValidator(_plain_date),
        Field(
            description="The current date for templates that write one, pinned so that training and serving write the "
            "same (2024-07-26: the date in Llama 3.1's template)."
        ),
    ] = datetime.date(2024, 7, 26)
    tools: Annotated[
        Literal["own", "hermes"],
        Field(
            description="The form of functions, calls and results. `own` is that of the base's chat template. `hermes` "
            "writes the Hermes format (<tools>, <tool_call>, <tool_response>), for templates without a form."
        ),
    ] = "own"


class ComputeConfig(Section):
    """Machines that compute. They decide how long a step takes, and are no input of its result."""

    cluster: Annotated[
        str | None,
        Field(
            pattern=r"^(local|auto|ray://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5})$",
            description="Ray cluster that works on rows, trains and answers prompts: local (started on this machine "
            "for one command), auto (RAY_ADDRESS, or the cluster that runs on this machine) or ray://HOST:PORT; null: "
            "this process. It needs tunewright[ray].",
        ),
    ] = None
    workers: Annotated[
        int | None,
        Field(
            ge=1,
            description="Processes of the cluster that compute at once (null: as many as its CPUs or GPUs allow; to "
            "train, one for each GPU, and without GPUs this process).",
        ),
    ] = None
    fsdp: Annotated[
        bool,
        Field(description="Shard the base over the processes that train (FSDP2), if it does not fit on one GPU."),
    ] = False


class Config(Section):
    """The whole configuration of a project."""

    name: Annotated[
        str,
        Field(
            pattern=f"^{PROJECT_NAME}$",
            description="The project's name, and the start of its adapters' names.",
        ),
    ] = "my-model"
    base_model: Annotated[
        str,
        Field(
            min_length=1,
            description="The open-weight base model: a folder, a hub id such as meta-llama/Llama-3.1-8B-Instruct, or "
            "bundled:smollm2-135m-instruct. Llama and Mistral architectures.",
        ),
    ] = "bundled:smollm2-135m-instruct"
    revision: Annotated[
        str | None,
        Field(description="Branch, tag or commit of a hub base (null: main), pinned to its commit at first use."),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Seed of every random choice: split, order, weights.")] = 0
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()
    advise: AdviseConfig = AdviseConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    regressions: RegressionsConfig = RegressionsConfig()
    judge: JudgeConfig = JudgeConfig()
    generate: GenerateConfig = GenerateConfig()
    serve: ServeConfig = ServeConfig()
    gateway: GatewayConfig = GatewayConfig()
    compute: ComputeConfig = ComputeConfig()

    def deciding(self) -> dict[str, Any]:
        """Return all values but those of ``compute``, which are no input of a result, as JSON for lineages."""
        return self.model_dump(mode="json", exclude={"compute"})
