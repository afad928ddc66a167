"""The recipe: everything that decides a result, as frozen, validated types.

Each field's description names the source of its default; the commented file that ``tunewright init`` writes and
the JSON Schema that ``tunewright recipe schema`` prints are both made from these descriptions.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Metric = Literal["exact_match", "bleu"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

Quantize = Literal["none", "nf4"]
"""How a base is held in memory."""

# As data.secrets names what it finds: the first 21 are secrets, the next 5 personal data, the last 3 need --presidio.
Findable = Literal[
    "private_key",
    "github_token",
    "gitlab_token",
    "npm_token",
    "pypi_token",
    "aws_key_id",
    "aws_secret",
    "google_key",
    "azure_key",
    "slack_token",
    "stripe_key",
    "anthropic_key",
    "openai_key",
    "huggingface_token",
    "sendgrid_key",
    "twilio_key",
    "databricks_token",
    "digitalocean_token",
    "jwt",
    "url_credentials",
    "card",
    "iban",
    "email",
    "phone",
    "us_ssn",
    "ip_address",
    "person",
    "location",
    "nrp",
]

PRESETS: dict[str, dict[str, Any]] = {
    "classic": {"targets": ("q_proj", "v_proj"), "learning_rate": 2e-4, "epochs": 3},
    "all-linear": {
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "learning_rate": 2e-4,
        "epochs": 3,
    },
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MixRecipe(_Section):
    """Generic instruction data among the training rows, against forgetting what the base could do."""

    source: Annotated[
        str, Field(min_length=1, description="A file of pairs that are not of the domain, relative to this file.")
    ]
    fraction: Annotated[
        float,
        Field(
            gt=0,
            le=0.5,
            description="Share of all training rows that is drawn from it, by the seed (0.05: Scialom et al. 2022, "
            "arXiv 2205.12393, find 1% enough for whole tasks).",
        ),
    ] = 0.05
    rows: Annotated[str | None, Field(description="As data.rows, for this file.")] = None
    input: Annotated[str | None, Field(description="As data.input, for this file.")] = None
    output: Annotated[str | None, Field(description="As data.output, for this file.")] = None
    ignore: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], Field(description="As data.ignore, for this file.")
    ] = ()


class DataRecipe(_Section):
    """Where the pairs come from and how they are divided."""

    sources: Annotated[
        tuple[str, ...],
        Field(
            description="Files of pairs (JSON, CSV, Parquet or a saved `datasets` folder, relative to this file) that "
            "`tunewright run` adds."
        ),
    ] = ()
    rows: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Where the rows are in a JSON document that is no array of rows: a JMESPath expression, such "
            "as values(@) for {id: row, ...} or *[] for {name: [row, ...], ...}.",
        ),
    ] = None
    input: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The column or key that holds the input, or a Jinja template over the row's keys, such as "
            '{{ context ~ " " ~ question }}.',
        ),
    ] = None
    output: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The column or key that holds the ideal output, or a Jinja template, such as "
            "{{ answers[0] }} or {{ slots | tojson }}.",
        ),
    ] = None
    groups: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="Columns or keys, such as customer or document: rows that share a value of one are not "
            "independent, and stay on one side of the split."
        ),
    ] = ()
    ignore: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(description="Columns or keys that are left out, such as id or source; any other is a fault."),
    ] = ()
    system: Annotated[
        str | None,
        Field(description="An instruction put, when pairs are added, before each that has no system turn of its own."),
    ] = None
    allow: Annotated[
        tuple[Findable, ...],
        Field(
            description="Kinds of secrets and personal data that are meant to be in the pairs, such as the firm's own "
            "phone number or test keys: counted and told, but let through."
        ),
    ] = ()
    max_characters: Annotated[
        int,
        Field(
            gt=0,
            description="A longer conversation is refused as faulty: it is nearly always a file pasted into a cell.",
        ),
    ] = 32_000
    similarity: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Inputs at or above this Jaccard similarity of character 4-grams share a cluster, which "
            "never straddles the split (0.8: Lee et al. 2021, arXiv 2107.06499).",
        ),
    ] = 0.8
    dev: Annotated[float, Field(gt=0, lt=0.5, description="Share of examples for choosing (prompts, checkpoints).")] = (
        0.1
    )
    test: Annotated[
        float, Field(gt=0, lt=0.5, description="Share of examples held out and never trained or chosen on.")
    ] = 0.1

    conflicts: Annotated[
        Literal["error", "accept"],
        Field(description="New rows with the input of another and a different output are refused, or kept; shown."),
    ] = "error"
    benchmarks: Annotated[
        tuple[str, ...],
        Field(
            description="Files (JSONL) of items that measure general capability, relative to this file: training rows "
            "are searched for them, as for the test rows."
        ),
    ] = ()
    contaminated: Annotated[
        Literal["warn", "drop"],
        Field(description="A training row that holds a test or benchmark item is kept, or left out; named, always."),
    ] = "warn"
    mix: Annotated[
        MixRecipe | None,
        Field(
            description="Generic instruction data to train on besides, against forgetting: "
            "{source: FILE, fraction: 0.05}."
        ),
    ] = None

    @model_validator(mode="after")
    def _check_names(self) -> DataRecipe:
        used = {*self.groups, self.input, self.output}
        both = [name for name in self.ignore if name in used]
        if both:
            raise ValueError(f"ignore names {both[0]}, which input, output or groups use")
        return self


def _plain_date(value: Any) -> Any:
    """YAML reads 2024-07-26 as a date; seconds since 1970, which pydantic would take for one too, are a mistake."""
    if isinstance(value, str) or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)):
        return value
    raise ValueError("a date is written like 2024-07-26")


def _switch(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


class ChatRecipe(_Section):
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


class ReplayRecipe(_Section):
    """Conversations that the base writes itself, trained on besides the pairs, against forgetting what it could do."""

    samples: Annotated[
        int,
        Field(
            ge=1,
            description="Conversations that the base writes, as Magpie has it (Xu et al. 2024, arXiv 2406.08464), by "
            "the seed (100: Capacity-Gated Forgetting in LoRA Fine-Tuning, openreview AmQVxvyRJC).",
        ),
    ] = 100
    kl: Annotated[
        float | None,
        Field(
            gt=0,
            description="On their answers the loss is the Kullback-Leibler divergence from the base to the adapter, so "
            "weighted (1: as Learning without Forgetting, Li and Hoiem 2016, arXiv 1606.09282); null: their own tokens "
            "are learnt, as a pair's are.",
        ),
    ] = 1.0


def _self_replay(value: Any) -> Any:
    return {} if value == "self" else value


class TrainRecipe(_Section):
    """How the adapter is trained."""

    preset: Annotated[
        Literal["classic", "all-linear"],
        Field(
            description="Sets targets, learning_rate and epochs where you don't: `classic` adapts q_proj and v_proj "
            "(Hu et al. 2021, arXiv 2106.09685); `all-linear` adapts every linear layer (Dettmers et al. 2023, "
            "arXiv 2305.14314)."
        ),
    ] = "classic"
    targets: Annotated[
        tuple[Target, ...],
        Field(min_length=1, description="The linear layers that get LoRA weights (Hu et al. 2021, section 7.1)."),
    ] = ("q_proj", "v_proj")
    rank: Annotated[int, Field(ge=1, description="LoRA rank (16: Alpaca-LoRA's published adapters).")] = 16
    alpha: Annotated[
        int,
        Field(ge=1, description="LoRA scale is alpha / rank (32: Schulman et al. 2025, LoRA Without Regret)."),
    ] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout before the LoRA weights (0: peft's default).")] = (
        0.0
    )
    rslora: Annotated[
        bool,
        Field(
            description="LoRA scale is alpha / sqrt(rank), so that a high rank learns no slower (Kalajdzievski 2023, "
            "arXiv 2312.03732; false: peft's default)."
        ),
    ] = False
    dora: Annotated[
        bool,
        Field(
            description="Magnitudes are trained apart from directions: DoRA (Liu et al. 2024, arXiv 2402.09353; false: "
            "peft's default). vLLM does not load it."
        ),
    ] = False
    servable: Annotated[
        bool,
        Field(
            description="What vLLM would not load (DoRA, a rank over 512) is refused before anything else is done; "
            "false lets it through, to be evaluated here and loaded with peft."
        ),
    ] = True
    learning_rate: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Peak learning rate (2e-4: QLoRA, Dettmers et al. 2023, table 9, for 7B-13B).",
        ),
    ] = 2e-4
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        Field(description="Learning rate after the warm-up (cosine: Stanford Alpaca's recipe)."),
    ] = "cosine"
    warmup: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the steps that warm up (0.1: BERT's fine-tuning code)."),
    ] = 0.1
    epochs: Annotated[
        int, Field(ge=1, le=100, description="Passes over the training split (3: Stanford Alpaca's recipe).")
    ] = 3
    batch_size: Annotated[
        int,
        Field(ge=1, description="Examples per optimizer step (16: QLoRA, Dettmers et al. 2023, table 9)."),
    ] = 16
    micro_batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="Examples per forward pass; gradients accumulate to batch_size (null: the same).",
        ),
    ] = None
    prefix_sharing: Annotated[
        Switch,
        Field(
            description="Compute the prompt that rows of a batch share once (docs/shared-prefix.md): `auto` where it "
            "saves 5% of the tokens and there is no dropout."
        ),
    ] = "auto"
    compile: Annotated[
        Switch,
        Field(
            description="torch.compile the feed-forward blocks: `auto` where the run is long enough to pay for it, "
            "estimated from its first steps."
        ),
    ] = "auto"
    max_length: Annotated[
        int,
        Field(
            ge=16,
            description="Longest conversation in tokens; a longer one is never cut (2048: the context that Llama "
            "was first trained with).",
        ),
    ] = 2048
    too_long: Annotated[
        Literal["error", "drop"],
        Field(description="A conversation longer than max_length stops the training, or is left out; named, always."),
    ] = "error"
    dtype: Annotated[
        Literal["bfloat16", "float32"],
        Field(
            description="Precision of the base's weights and of the forward pass; LoRA weights stay float32 "
            "(bfloat16: the type that Llama and Mistral are published in)."
        ),
    ] = "bfloat16"
    quantize: Annotated[
        Quantize,
        Field(
            description="How the base is held: `none` in dtype; `nf4` with its linear layers in 4 bits, doubly "
            "quantized: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), which needs tunewright[4bit]."
        ),
    ] = "none"
    replay: Annotated[
        ReplayRecipe | None,
        BeforeValidator(_self_replay),
        Field(
            description="Against forgetting, without data: `self`, or {samples: 100, kl: 1.0}, trains besides on what "
            "the base itself writes, and holds the adapter to the base's own predictions there."
        ),
    ] = None
    checkpoint_every: Annotated[
        int, Field(ge=1, description="Steps between the checkpoints that a stopped run goes on from.")
    ] = 50
    evaluate_every: Annotated[
        int | None,
        Field(
            ge=1,
            description="Steps between evaluations on dev, each of which keeps its adapter (null: at each epoch's end; "
            "the last step is always evaluated).",
        ),
    ] = None
    evaluate_rows: Annotated[
        int | None,
        Field(
            ge=0,
            description="Dev rows that each evaluation answers for evaluate.metric, which chooses the adapter; of more "
            "a sample by the seed (256: a share's standard error is then at most 3.1 points; null: all; 0: none, the "
            "dev loss alone chooses).",
        ),
    ] = 256
    patience: Annotated[
        int | None,
        Field(
            ge=1,
            description="Evaluations without a better one after which training stops (null: it goes to its end; the "
            "best adapter is kept all the same).",
        ),
    ] = None
    report_to: Annotated[
        tuple[Tracker, ...],
        Field(
            description="Trackers that get every number too, through transformers' integrations; local ones write to "
            ".tunewright/trackers."
        ),
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "classic")
        return {**PRESETS[preset], **values} if preset in PRESETS else values

    def deciding(self) -> dict[str, Any]:
        """The values that decide which adapter comes out; none: how often it is saved, who is told or serves."""
        return self.model_dump(mode="json", exclude={"checkpoint_every", "report_to", "servable"})

    @model_validator(mode="after")
    def _check_batches(self) -> TrainRecipe:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        return self


class EvaluateRecipe(_Section):
    """How the arms are measured and what counts as better."""

    metric: Annotated[
        Metric,
        Field(description="What decides: exact_match (outer white space apart) or corpus BLEU (sacrebleu)."),
    ] = "exact_match"
    shots: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...],
        Field(
            min_length=1,
            description="Numbers of retrieved demonstrations to try; the best on dev goes to the test.",
        ),
    ] = (1, 2, 4, 8)
    max_new_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="Longest answer in tokens (null: a quarter more than the longest training answer).",
        ),
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="Conversations generated at once.")] = 32
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


class ServeRecipe(_Section):
    """How the server answers."""

    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on (0: any free one).")] = 8000
    max_batch: Annotated[int, Field(ge=1, description="Conversations generated at once, over all adapters.")] = 16
    quantize: Annotated[
        Quantize | None, Field(description="How the base is held (null: as the adapters were trained on it).")
    ] = None


class Recipe(_Section):
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
    data: DataRecipe = DataRecipe()
    chat: ChatRecipe = ChatRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    serve: ServeRecipe = ServeRecipe()
