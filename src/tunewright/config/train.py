"""The config's train section: how the adapter is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunewright.config.section import Quantize, Section

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

PRESETS: dict[str, dict[str, Any]] = {
    "classic": {"targets": ("q_proj", "v_proj"), "learning_rate": 2e-4, "epochs": 3},
    "all-linear": {
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "learning_rate": 2e-4,
        "epochs": 3,
    },
}


def _switch(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


class ReplayConfig(Section):
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


class TrainConfig(Section):
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
        Field(description="Learning rate after the warm-up (cosine: Stanford Alpaca's config)."),
    ] = "cosine"
    warmup: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the steps that warm up (0.1: BERT's fine-tuning code)."),
    ] = 0.1
    epochs: Annotated[
        int, Field(ge=1, le=100, description="Passes over the training split (3: Stanford Alpaca's config).")
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
            "estimated from its first steps, and never on a card, where the gain has not been measured."
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
    use_liger_kernel: Annotated[
        bool,
        Field(
            description="Liger's fused rotary embedding, RMSNorm and SwiGLU on a card (Hsu et al. 2024, arXiv "
            "2410.10989; false: transformers' default), which needs tunewright[liger]. The loss stays tunewright's."
        ),
    ] = False
    replay: Annotated[
        ReplayConfig | None,
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
        """Return the values that decide which adapter comes out; none: how often it is saved, who is told or serves."""
        return self.model_dump(mode="json", exclude={"checkpoint_every", "report_to", "servable"})

    @model_validator(mode="after")
    def _check_batches(self) -> TrainConfig:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        return self
