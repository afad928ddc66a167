"""The config: everything that decides a result, as frozen, validated types.

Each field's description names the source of its default; the commented file that ``tunewright init`` writes and
the JSON Schema that ``tunewright config schema`` prints are both made from these descriptions.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tunewright.config.data import DataConfig, Duplicates, FileSource, Findable, MixConfig, Overlap, Split, read_split
from tunewright.config.endpoint import (
    EndpointConfig,
    GenerateConfig,
    IncumbentConfig,
    JudgeConfig,
    PromptOptimizationConfig,
)
from tunewright.config.evaluate import ConstrainConfig, EvaluateConfig, RegressionsConfig
from tunewright.config.metrics import Metric, MetricName, metric_name
from tunewright.config.section import (
    ConfigSection,
    DemonstrationOrder,
    Quantization,
    RetrieverName,
)
from tunewright.config.train import BETA, PRESETS, Method, ReplayConfig, Tracker, TrainConfig
from tunewright.core.options import EngineName

__all__ = [
    "BETA",
    "PRESETS",
    "PROJECT_NAME",
    "AdviseConfig",
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
    "FileSource",
    "Findable",
    "GatewayConfig",
    "GenerateConfig",
    "IncumbentConfig",
    "JudgeConfig",
    "Method",
    "Metric",
    "MetricName",
    "MixConfig",
    "Overlap",
    "PriceConfig",
    "PromptOptimizationConfig",
    "Quantization",
    "ReasoningMode",
    "ReplayConfig",
    "RetrieverName",
    "ServeConfig",
    "Split",
    "Tracker",
    "TrainConfig",
    "metric_name",
    "read_split",
]

ReasoningMode = Literal["train", "mask", "strip"]

PROJECT_NAME = r"[a-z0-9][a-z0-9\-]{0,39}"  # HTML's patterns need the backslash


class PriceConfig(ConfigSection):
    """Prices of calls and training, in one currency; missing ones are measured on this machine."""

    input: Annotated[float | None, Field(ge=0)] = None
    """Price of a million input tokens (null: from the measured speed and `hour`)."""
    output: Annotated[float | None, Field(ge=0)] = None
    """Price of a million output tokens (null: from the measured speed and `hour`)."""
    cached_discount: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Discount on input tokens in a prefix cache, times the share of calls that hit it (0.9: cache
    reads in Anthropic's price list; 0: no cache).
    """
    hour: Annotated[float | None, Field(gt=0)] = None
    """Price of an hour of the machine that trains (and serves, if there are no token prices)."""
    training: Annotated[float | None, Field(ge=0)] = None
    """Price of training the adapter (null: the pilot's time, scaled to all rows, at `hour`)."""
    labelling: Annotated[float, Field(ge=0)] = 0
    """Cost of labelling the pairs, or those still to be labelled."""
    hosting: Annotated[float, Field(ge=0)] = 0
    """Monthly cost of hosting the adapter, on top of the base's."""

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


class AdviseConfig(ConfigSection):
    """Settings of `tunewright advise`, which estimates whether fine-tuning is worth it."""

    pilot_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the training rows for the pilot adapter: whole clusters, drawn by the seed, at least
    50 rows. A second pilot trains on half of them to estimate the trend (0.25: two doublings from
    all rows).
    """
    pilot_max_samples: Annotated[int, Field(ge=50)] = 500
    """Maximum number of rows of the pilot, whatever the share (500: minutes, not a weekend)."""
    calls_per_month: Annotated[float | None, Field(gt=0)] = None
    """Expected calls per month: turns the break-even point into a time."""
    months: Annotated[int, Field(ge=1)] = 12
    """Months that the adapter will serve before it is retrained."""
    prices: PriceConfig | None = None
    """Prices, such as {input: 0.2, output: 0.6, training: 40} (per million tokens) or {hour: 2.5}
    (null: costs are counted in hours of this machine).
    """


def _plain_date(value: Any) -> Any:
    """Return a value that YAML reads as a date; reject seconds since 1970, which pydantic would accept."""
    if isinstance(value, str) or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)):
        return value
    raise ValueError("write a date like 2024-07-26")


class ChatConfig(ConfigSection):
    """Rendering of conversations to tokens, in training, evaluation and serving."""

    template: Literal["auto", "own", "plain"] = "auto"
    """`own` is the base's chat template. `plain` writes ### Instruction and ### Response (the
    headings of Stanford Alpaca). `auto` is plain only for a base without a template.
    """
    date: Annotated[datetime.date, BeforeValidator(_plain_date)] = datetime.date(2024, 7, 26)
    """The current date for templates that write one, pinned so that training and serving write the
    same (2024-07-26: the date in Llama 3.1's template).
    """
    tools: Literal["own", "hermes"] = "own"
    """The form of functions, calls and results. `own` is that of the base's chat template. `hermes`
    writes the Hermes format (<tools>, <tool_call>, <tool_response>), for templates without a form.
    """
    reasoning: ReasoningMode = "train"
    """Use of the thinking in rows (reasoning_content): `train` trains it and the answer after it;
    `mask` shows it and trains only the answer; `strip` leaves it out (train: the adapter answers
    as its rows do; a base whose chat template has no thinking needs strip).
    """


class ServeConfig(ConfigSection):
    """Settings of the server."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on (0: any free one)."""
    engine: EngineName = "peft"
    """Engine that computes the answers. peft is built in; vllm needs the environment that
    `tunewright engine install vllm` creates; llamacpp needs tunewright[llamacpp].
    """
    metrics_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """Separate port for Prometheus metrics (0: any free one; null: off). It exposes the names of
    all tenants.
    """
    metrics_host: str = "127.0.0.1"
    """Address that the metrics port listens on."""
    gguf: Literal["f16", "q8_0"] = "f16"
    """Type of the base's weights in the engine llamacpp: f16 keeps 16-bit weights; q8_0 takes half
    the memory and changes answers slightly (docs/benchmarks/serving.md has figures).
    """
    max_num_seqs: Annotated[int | None, Field(ge=1)] = None
    """Maximum number of conversations generated at once, over all adapters (null: 16; with the
    engine vllm on a GPU 128, or 256 from 70 GB of memory).
    """
    engines: tuple[str, ...] = ()
    """Addresses of engines on other machines, such as http://gpu-1:8100, each started there with
    `tunewright engine serve` on the same base. A name with several addresses, such as that of a
    headless service, stands for all of them. Empty: `tunewright serve` starts one engine itself.
    """
    spare_adapters: Annotated[int, Field(ge=0)] = 4
    """Slots in the engine vllm for adapters beyond those that are live at the start; used with
    tenants. A rollout takes one slot until the previous adapter is unloaded.
    """
    gpu_adapters: Annotated[int | None, Field(ge=1)] = None
    """*Experimental*: most adapters on the GPU at once, in the engine vllm (null: all). The others stay
    in the machine's memory, and a request copies its adapter in place of the least recently used.
    """
    quantization: Quantization | None = None
    """Quantization of the base (null: as in the adapters' training)."""
    database_url: str | None = None
    """Database of tenants, keys, releases and usage: postgresql://USER@HOST/DATABASE, which several
    servers can share, or sqlite:///FILE (null: serving/state.sqlite in the project). Put a password
    into PGPASSWORD or ~/.pgpass.
    """
    adapter_store: str | None = None
    """Folder or URL, such as s3://bucket/adapters, that `tunewright adapters push` copies to. With
    tenants, a server imports a released adapter from there that is missing here. Credentials are
    read from the environment.
    """

    @field_validator("engines")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            _ = parts.port, (parts.hostname or "").encode("idna")  # each raises a ValueError that says what is wrong
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
                raise ValueError(f"{url!r} is not the address of an engine: use http://HOST:PORT")
        return tuple(url.rstrip("/") for url in urls)


class GatewayConfig(ConfigSection):
    """Limits that `tunewright serve` puts on the size and duration of requests."""

    max_body_bytes: Annotated[int | None, Field(ge=1024)] = None
    """Largest request body in bytes (null: 64 KiB plus 16 bytes for each token of the context; text
    has about 4 bytes a token, and JSON escapes some characters).
    """
    max_messages: Annotated[int, Field(ge=1)] = 128
    """Maximum number of messages in a conversation (128: rendered in 0.2 s; the time grows with the
    square).
    """
    max_n: Annotated[int, Field(ge=1, le=128)] = 16
    """Largest n: answers to one prompt, each of which takes a row of the batch and counts in limits
    (16: as many as a batch has rows by default; OpenAI takes 128).
    """
    max_prompt_tokens: Annotated[int | None, Field(ge=1)] = None
    """Longest prompt in tokens (null: what fits the context)."""
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    """Longest answer in tokens. A larger max_tokens is capped to it, and it is the default of a
    request without max_tokens (null: what fits the context).
    """
    max_connections: Annotated[int, Field(ge=1)] = 4096
    """Maximum number of open connections. At the maximum, a new one takes the place of the one that
    has waited longest for a request (4096: over 100 MiB if each sends the largest headers).
    """
    header_timeout_s: Annotated[float, Field(gt=0)] = 10
    """Seconds in which the request line and all headers must arrive."""
    keep_alive_timeout_s: Annotated[float, Field(gt=0)] = 75
    """Seconds that a connection may wait for its next request (75: longer than a proxy keeps an
    idle connection, so that it never sends a request into a closed one).
    """
    body_timeout_s: Annotated[float, Field(gt=0)] = 30
    """Seconds in which the whole body must arrive."""
    queue_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Seconds that a request may wait in the queue."""
    first_token_timeout_s: Annotated[float, Field(gt=0)] = 120
    """Seconds from admission to the first token (120: a long prompt without a GPU)."""
    inter_token_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Seconds between two tokens."""
    total_timeout_s: Annotated[float, Field(gt=0)] = 600
    """Seconds for the whole request (600: the default timeout of OpenAI's client)."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30
    """Seconds that running answers have to finish when the server shuts down."""
    record: bool = False
    """Record the requests of the tenants that `tunewright tenant record` names, encrypted and without secrets
    and personal data (false: no request's text is stored).
    """


class ComputeConfig(ConfigSection):
    """Machines that compute. They decide how long a step takes, and are no input of its result."""

    cluster: Annotated[
        str | None, Field(pattern=r"^(local|auto|ray://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5})$")
    ] = None
    """Experimental: Ray cluster that works on rows, trains and answers prompts: local (started on this machine
    for one command), auto (RAY_ADDRESS, or the cluster that runs on this machine) or
    ray://HOST:PORT; null: this process. It needs tunewright[ray].
    """
    workers: Annotated[int | None, Field(ge=1)] = None
    """Experimental: processes of the cluster that compute at once (null: as many as its CPUs or GPUs allow; to
    train, one for each GPU, and without GPUs this process).
    """
    fsdp: bool = False
    """Shard the base over the processes that train (FSDP2), if it does not fit on one GPU."""


class Config(ConfigSection):
    """The whole configuration of a project."""

    name: Annotated[str, Field(pattern=f"^{PROJECT_NAME}$")] = "my-model"
    """The project's name, and the start of its adapters' names."""
    base_model: Annotated[str, Field(min_length=1)] = "bundled:smollm2-135m-instruct"
    """The open-weight base model: a folder, a hub id such as meta-llama/Llama-3.1-8B-Instruct,
    bundled:smollm2-135m-instruct or package:gemma-3-270m. A causal decoder that passes its proofs.
    """
    revision: str | None = None
    """Branch, tag or commit of a hub base (null: main), pinned to its commit at first use."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice: split, order, weights."""
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
