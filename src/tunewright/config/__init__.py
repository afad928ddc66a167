"""The config: everything that decides a result, as frozen, validated types.

Each field's description names the source of its default; the commented file that ``tunewright init`` writes and
the JSON Schema that ``tunewright config schema`` prints are both made from these descriptions.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tunewright.config.advise import AdviseConfig, PriceConfig
from tunewright.config.compute import ComputeConfig
from tunewright.config.data import DataConfig, Duplicates, Findable, MixConfig
from tunewright.config.endpoint import EndpointConfig
from tunewright.config.gateway import GatewayConfig
from tunewright.config.generate import GenerateConfig
from tunewright.config.incumbents import IncumbentConfig
from tunewright.config.judge import JudgeConfig, ReferenceModelConfig
from tunewright.config.metrics import Metric, MetricName, metric_name
from tunewright.config.prompt_optimization import PromptOptimizationConfig, ReflectionModelConfig
from tunewright.config.regressions import RegressionsConfig
from tunewright.config.section import (
    AnswerEngineName,
    DemonstrationOrder,
    EngineName,
    Quantization,
    RetrieverName,
    Section,
)
from tunewright.config.structured_outputs import ConstrainConfig
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


class EvaluateConfig(Section):
    """Measurement of the arms, and the gain that counts as better."""

    metric: Annotated[
        Metric,
        Field(
            description="The metric that decides: exact_match, bleu, chrf, token_f1, json (F1 over an object's fields) "
            "or json_valid; for function calls, call_exact_match, call_ast_match, call_name_match, call_argument_f1, "
            "call_schema_valid or irrelevance_detection; with settings, {exact_match: {ignore_case: true}}, {choices: "
            "[granted, denied]}, {json: {fields: [name, date]}}, {regex: '[A-Z]+-[0-9]+'}, {python: 'module:function'}."
        ),
    ] = "exact_match"
    extra_metrics: Annotated[
        tuple[Metric, ...],
        Field(description="Further metrics to report, which decide nothing: [bleu, chrf]."),
    ] = ()
    num_fewshot: Annotated[
        tuple[Annotated[int, Field(ge=1, le=256)], ...],
        Field(
            min_length=1,
            description="Numbers of demonstrations to try, static and retrieved; the best arm on dev goes to the test. "
            "They double, as in Bertsch et al. 2024 (arXiv 2405.00200). Arms that exceed the base's context are left "
            "out.",
        ),
    ] = (1, 2, 4, 8, 16)
    static_seeds: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="Random draws of static demonstrations for each number (0: no static arms). One draw says "
            "little, because scores vary with the draw (Zhao et al. 2021, arXiv 2102.09690).",
        ),
    ] = 3
    retrievers: Annotated[
        tuple[RetrieverName, ...],
        Field(
            description="Retrievers of demonstrations similar to the question: bm25 (words), tfidf (character "
            "n-grams), dense (the base's own hidden states) and sentence-transformers (embedding_model); [] for no "
            "retrieved arms."
        ),
    ] = ("bm25", "tfidf")
    embedding_model: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Model of the retriever sentence-transformers: a folder, relative to this file, or a hub id. "
            "It needs tunewright[sentence-transformers].",
        ),
    ] = None
    mmr_lambda: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(
            min_length=1,
            description="Weights of similarity against diversity in retrieved demonstrations, by maximal marginal "
            "relevance (Carbonell and Goldstein 1998); each is tried. 1 is similarity alone.",
        ),
    ] = (1.0,)
    demonstration_order: Annotated[
        tuple[DemonstrationOrder, ...],
        Field(
            min_length=1,
            description="Orders of retrieved demonstrations to try: the most similar one next to the question "
            "(similar_last, as in Liu et al. 2022, arXiv 2101.06804) or first (similar_first).",
        ),
    ] = ("similar_last",)
    instructions: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="Alternative instructions to try in place of the pairs' own: their system turn, or the text "
            "that all inputs begin with."
        ),
    ] = ()
    prompt_optimization: Annotated[
        PromptOptimizationConfig | None,
        Field(
            description="Reflection model and limits of `tunewright optimize-prompt` (null: the judge's endpoint, and "
            "the defaults)."
        ),
    ] = None
    screening_items: Annotated[
        int | None,
        Field(
            ge=10,
            description="Dev items that every prompting arm answers. Only the finalists answer all of dev (null: all "
            "arms do).",
        ),
    ] = 64
    finalists: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum number of prompting arms that answer all of dev, of those that are not worse than "
            "the leader on "
            "the screening items.",
        ),
    ] = 3
    tuned_retrieved: Annotated[
        bool,
        Field(description="Also measure the adapter with the best retrieved demonstrations in its prompt."),
    ] = True
    max_new_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="Longest answer in tokens (null: the 99th percentile of the training answers plus a quarter, "
            "at least 8).",
        ),
    ] = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | None,
        Field(
            description="Texts that end an answer; they are not part of it (null: with a chat template none, else the "
            "headings ### Instruction and ### Response, which a base may write after its answer)."
        ),
    ] = None
    structured_outputs: Annotated[
        ConstrainConfig | None,
        Field(
            description="Form that constrained arms enforce while they decode, measured alongside the free arms: "
            "{choices: [a, b]}, {regex: PATTERN}, {json_schema: FILE} or {tools: auto} (calls of each row's functions)."
        ),
    ] = None
    engine: Annotated[
        AnswerEngineName,
        Field(
            description="Engine that computes the answers of all arms. peft is built in; vllm needs the environment "
            "that `tunewright engine install vllm` creates. auto uses vllm where that environment and a CUDA GPU are "
            "present, else peft, and says why."
        ),
    ] = "auto"
    batch_size: Annotated[
        int,
        Field(ge=1, description="Conversations generated at once; vllm on a GPU takes as many as fit (up to 256)."),
    ] = 32
    quantization: Annotated[
        Quantization | None,
        Field(description="Quantization of the base, the same for all arms (null: as in the adapter's training)."),
    ] = None
    margin: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Smallest gain over the best prompting arm that is worth shipping: 0.02 is 2 points.",
        ),
    ] = 0.02
    incumbents: Annotated[
        tuple[IncumbentConfig, ...],
        Field(
            description="Models in use today, behind OpenAI-compatible endpoints, which answer dev and test as arms: "
            "name, base_url and model, with the other keys of `judge` that describe an endpoint, system_prompt, "
            "budget and frozen."
        ),
    ] = ()
    non_inferiority_margin: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="Largest loss against an incumbent that still counts as not worse; without incumbents it has "
            "no effect. (0.02: the default of `margin`, since a loss too small to ship for is too small to keep a "
            "model for; fixed before the test is opened, as ICH E9 asks, section 3.3.2).",
        ),
    ] = 0.02

    @field_validator("incumbents")
    @classmethod
    def _distinct(cls, incumbents: tuple[IncumbentConfig, ...]) -> tuple[IncumbentConfig, ...]:
        names = [incumbent.name for incumbent in incumbents]
        for name in sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two incumbents are named {name}")
        return incumbents

    @field_validator("extra_metrics")
    @classmethod
    def _once(cls, extra_metrics: tuple[Metric, ...], info: ValidationInfo) -> tuple[Metric, ...]:
        names = [metric_name(m) for m in extra_metrics]
        names += [metric_name(info.data["metric"])] if "metric" in info.data else []
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} is already measured")
        return extra_metrics

    @model_validator(mode="after")
    def _named_embedding_model(self) -> EvaluateConfig:
        if "sentence-transformers" in self.retrievers and self.embedding_model is None:
            raise ValueError("the retriever sentence-transformers requires embedding_model")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All metrics to measure; the first decides."""
        return (self.metric, *self.extra_metrics)


class ServeConfig(Section):
    """Settings of the server."""

    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on (0: any free one).")] = 8000
    engine: Annotated[
        EngineName,
        Field(
            description="Engine that computes the answers. peft is built in; vllm needs the environment that "
            "`tunewright engine install vllm` creates; llamacpp needs tunewright[llamacpp]."
        ),
    ] = "peft"
    metrics_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="Separate port for Prometheus metrics (0: any free one; null: off). It exposes the names of "
            "all tenants.",
        ),
    ] = None
    metrics_host: Annotated[str, Field(description="Address that the metrics port listens on.")] = "127.0.0.1"
    gguf: Annotated[
        Literal["f16", "q8_0"],
        Field(
            description="Type of the base's weights in the engine llamacpp: f16 keeps 16-bit weights; q8_0 takes half "
            "the memory and changes answers slightly (docs/benchmarks/serving.md has figures)."
        ),
    ] = "f16"
    max_num_seqs: Annotated[
        int | None,
        Field(
            ge=1,
            description="Maximum number of conversations generated at once, over all adapters (null: 16; with the "
            "engine vllm on a "
            "GPU 128, or 256 from 70 GB of memory).",
        ),
    ] = None
    engines: Annotated[
        tuple[str, ...],
        Field(
            description="Addresses of engines on other machines, such as http://gpu-1:8100, each started there with "
            "`tunewright engine serve` on the same base. A name with several addresses, such as that of a headless "
            "service, stands for all of them. Empty: `tunewright serve` starts one engine itself."
        ),
    ] = ()
    spare_adapters: Annotated[
        int,
        Field(
            ge=0,
            description="Slots in the engine vllm for adapters beyond those that are live at the start; used with "
            "tenants. A rollout takes one slot until the previous adapter is unloaded.",
        ),
    ] = 4
    quantization: Annotated[
        Quantization | None, Field(description="Quantization of the base (null: as in the adapters' training).")
    ] = None
    database_url: Annotated[
        str | None,
        Field(
            description="Database of tenants, keys, releases and usage: postgresql://USER@HOST/DATABASE, which several "
            "servers can share, or sqlite:///FILE (null: serving/state.sqlite in the project). Put a password into "
            "PGPASSWORD or ~/.pgpass."
        ),
    ] = None
    adapter_store: Annotated[
        str | None,
        Field(
            description="Folder or URL, such as s3://bucket/adapters, that `tunewright adapters push` copies to. With "
            "tenants, a server imports a released adapter from there that is missing here. Credentials are read from "
            "the environment."
        ),
    ] = None

    @field_validator("engines")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            _ = parts.port, (parts.hostname or "").encode("idna")  # each raises a ValueError that says what is wrong
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
                raise ValueError(f"{url!r} is not the address of an engine: use http://HOST:PORT")
        return tuple(url.rstrip("/") for url in urls)


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
