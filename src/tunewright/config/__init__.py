"""The config: everything that decides a result, as frozen, validated types.

Each field's description names the source of its default; the commented file that ``tunewright init`` writes and
the JSON Schema that ``tunewright config schema`` prints are both made from these descriptions.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from tunewright.config.advise import AdviseConfig, PriceConfig
from tunewright.config.constrain import ConstrainConfig
from tunewright.config.data import DataConfig, Duplicates, Findable, MixConfig
from tunewright.config.gateway import GatewayConfig
from tunewright.config.general import GeneralConfig
from tunewright.config.judge import EndpointConfig, JudgeConfig, ReferenceModelConfig
from tunewright.config.metrics import Metric, MetricName, metric_name
from tunewright.config.section import AnswerEngineName, EngineName, Quantize, RetrieverName, Section
from tunewright.config.train import PRESETS, ReplayConfig, Tracker, TrainConfig

__all__ = [
    "PRESETS",
    "AdviseConfig",
    "AnswerEngineName",
    "ChatConfig",
    "Config",
    "ConstrainConfig",
    "DataConfig",
    "Duplicates",
    "EndpointConfig",
    "EngineName",
    "EvaluateConfig",
    "Findable",
    "GatewayConfig",
    "GeneralConfig",
    "JudgeConfig",
    "Metric",
    "MetricName",
    "MixConfig",
    "PriceConfig",
    "Quantize",
    "ReferenceModelConfig",
    "ReplayConfig",
    "RetrieverName",
    "ServeConfig",
    "Tracker",
    "TrainConfig",
    "metric_name",
]


def _plain_date(value: Any) -> Any:
    """YAML reads 2024-07-26 as a date; seconds since 1970, which pydantic would take for one too, are a mistake."""
    if isinstance(value, str) or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)):
        return value
    raise ValueError("a date is written like 2024-07-26")


class ChatConfig(Section):
    """How conversations become tokens, for training, evaluation and serving alike."""

    template: Annotated[
        Literal["auto", "own", "plain"],
        Field(
            description="`own` is the base's chat template; `plain` writes ### Instruction and ### Response (the "
            "headings of Stanford Alpaca); `auto` is plain only for a base without a template."
        ),
    ] = "auto"
    date: Annotated[
        datetime.date,
        BeforeValidator(_plain_date),
        Field(
            description="Today, for templates that write it: pinned, so that training and serving write the same "
            "(2024-07-26: the date in Llama 3.1's own template)."
        ),
    ] = datetime.date(2024, 7, 26)


class EvaluateConfig(Section):
    """How the arms are measured and what counts as better."""

    metric: Annotated[
        Metric,
        Field(
            description="What decides: exact_match, bleu, chrf, token_f1, json (F1 over an object's fields) or "
            "json_valid; or, with settings, {exact_match: {casefold: true}}, {choices: [granted, denied]}, "
            "{json: {fields: [name, date]}}, {regex: '[A-Z]+-[0-9]+'}, {python: 'module:function'}."
        ),
    ] = "exact_match"
    also: Annotated[
        tuple[Metric, ...],
        Field(description="Metrics measured beside it, which decide nothing: [bleu, chrf]."),
    ] = ()
    shots: Annotated[
        tuple[Annotated[int, Field(ge=1, le=256)], ...],
        Field(
            min_length=1,
            description="Numbers of demonstrations to try, drawn once (static) and retrieved; the best on dev goes to "
            "the test. Doubling, as in Bertsch et al. 2024 (arXiv 2405.00200); what does not fit the base's context "
            "is left out.",
        ),
    ] = (1, 2, 4, 8, 16)
    static_seeds: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="Draws of static demonstrations for each number (0: no static arms). Which are drawn matters "
            "(Zhao et al. 2021, arXiv 2102.09690), so one draw says little.",
        ),
    ] = 3
    retrievers: Annotated[
        tuple[RetrieverName, ...],
        Field(
            description="How demonstrations like the question are found: bm25 (words) and tfidf (character n-grams); "
            "[] for no retrieved arms."
        ),
    ] = ("bm25", "tfidf")
    instructions: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="Other wordings to try in place of the pairs' own instruction: their system turn, or what all "
            "their inputs begin with."
        ),
    ] = ()
    first_items: Annotated[
        int | None,
        Field(
            ge=10,
            description="Dev items that every prompting arm answers; only the finalists answer all of dev (null: all "
            "arms do).",
        ),
    ] = 64
    finalists: Annotated[
        int,
        Field(
            ge=1,
            description="The most prompting arms that answer all of dev, of those that the first items do not show "
            "to be worse than the leader.",
        ),
    ] = 3
    tuned_retrieved: Annotated[
        bool,
        Field(description="Measure the adapter with the best retrieved demonstrations in its prompt, too."),
    ] = True
    max_new_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="Longest answer in tokens (null: the 99th percentile of the training answers and a quarter "
            "more, at least 8).",
        ),
    ] = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | None,
        Field(
            description="Texts that end an answer, which is what stands before them (null: the headings of the plain "
            "form, ### Instruction and ### Response on a line of their own, which a base without a chat template "
            "writes when it goes on; none with a chat template)."
        ),
    ] = None
    constrain: Annotated[
        ConstrainConfig | None,
        Field(
            description="What answers have to be, for arms that are held to it while they decode, measured beside the "
            "free ones: {choices: [a, b]}, {regex: PATTERN} or {json_schema: FILE}."
        ),
    ] = None
    engine: Annotated[
        AnswerEngineName,
        Field(
            description="What computes the answers of all arms: peft is built in; vllm needs the environment that "
            "`tunewright engine install vllm` makes; auto takes vllm where a CUDA card and that environment are there, "
            "else peft, and says why."
        ),
    ] = "auto"
    batch_size: Annotated[
        int,
        Field(ge=1, description="Conversations generated at once; vllm on a card takes as many as fit (up to 256)."),
    ] = 32
    quantize: Annotated[
        Quantize | None,
        Field(description="How the base is held, for all arms alike (null: as the adapter was trained on it)."),
    ] = None
    margin: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="The gain over the best prompting arm that is worth shipping: 0.02 is 2 points.",
        ),
    ] = 0.02

    @field_validator("also")
    @classmethod
    def _once(cls, also: tuple[Metric, ...], info: ValidationInfo) -> tuple[Metric, ...]:
        names = [metric_name(m) for m in also]
        names += [metric_name(info.data["metric"])] if "metric" in info.data else []
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} is measured already")
        return also

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All metrics to measure; the first decides."""
        return (self.metric, *self.also)


class ServeConfig(Section):
    """How the server answers."""

    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on (0: any free one).")] = 8000
    engine: Annotated[
        EngineName,
        Field(
            description="What computes the answers: peft is built in; vllm runs beside it, once `tunewright engine "
            "install vllm` has made its environment; llamacpp takes tunewright[llamacpp]."
        ),
    ] = "peft"
    metrics_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="A port of its own for Prometheus (0: any free one; null: none). Whoever reaches it reads the "
            "names of all tenants.",
        ),
    ] = None
    metrics_host: Annotated[str, Field(description="The address that Prometheus may ask on.")] = "127.0.0.1"
    gguf: Annotated[
        Literal["f16", "q8_0"],
        Field(
            description="How the engine llamacpp holds the base: f16 keeps 16-bit weights as they are; q8_0 takes half "
            "the memory, and is another model by a little (docs/engines.md has by how much)."
        ),
    ] = "f16"
    max_batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="Conversations generated at once, over all adapters (null: 16; with the engine vllm on a card "
            "128, and 256 from 70 GB of memory on).",
        ),
    ] = None
    spare_adapters: Annotated[
        int,
        Field(
            ge=0,
            description="With tenants and the engine vllm: room for so many adapters beyond those that are live when "
            "the server starts. A release in the making takes one until the adapter before it is let go.",
        ),
    ] = 4
    quantize: Annotated[
        Quantize | None, Field(description="How the base is held (null: as the adapters were trained on it).")
    ] = None
    state: Annotated[
        str | None,
        Field(
            description="Where tenants, keys, releases and usage are: postgresql://USER@HOST/DATABASE, which several "
            "servers share, or sqlite:///FILE (null: serving/state.sqlite in the project). A password belongs into "
            "PGPASSWORD or ~/.pgpass."
        ),
    ] = None


class Config(Section):
    """The whole configuration of a project."""

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="The project's name; its adapters carry it."),
    ] = "my-model"
    base: Annotated[
        str,
        Field(
            min_length=1,
            description="The open-weight base: a folder, a hub id such as meta-llama/Llama-3.1-8B-Instruct, or "
            "bundled:smollm2-135m-instruct. Llama and Mistral architectures.",
        ),
    ] = "bundled:smollm2-135m-instruct"
    revision: Annotated[
        str | None,
        Field(description="Hub bases: branch, tag or commit (null: main). It is pinned to its commit at first use."),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Decides every random choice: split, order, weights.")] = 0
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()
    advise: AdviseConfig = AdviseConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    general: GeneralConfig = GeneralConfig()
    judge: JudgeConfig = JudgeConfig()
    serve: ServeConfig = ServeConfig()
    gateway: GatewayConfig = GatewayConfig()
