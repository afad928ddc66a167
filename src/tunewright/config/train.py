"""The config's train section: how the adapter is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from tunewright.config.section import ConfigSection, Quantization

Target = Annotated[str, Field(pattern=r"^\w+$")]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Method = Literal["sft", "dpo", "orpo", "kto"]

PRESETS: dict[str, dict[str, Any]] = {
    "classic": {"target_modules": ("q_proj", "v_proj"), "learning_rate": 2e-4, "epochs": 3},
    "all-linear": {
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "learning_rate": 2e-4,
        "epochs": 3,
    },
}

BUNDLED_TRAINING: dict[str, Any] = {"preset": "all-linear", "learning_rate": 1e-3}
"""Settings for packaged bases: models this small learn at a higher rate than the 7B models that 2e-4 is for."""
EXPERTS = "experts"
"""The name in `target_modules` of the experts' stacked weights, which are no linear layers."""
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rate": 5e-6, "epochs": 1},
    "kto": {"learning_rate": 5e-6, "epochs": 1},
}
"""Defaults that differ from the preset's: trl's settings in scripts/dpo.py with LoRA, cited by scripts/kto.py."""
BETA = 0.1
"""trl's default of DPOConfig, ORPOConfig and KTOConfig."""


def _switch(value: Any) -> Any:
    """Return on or off for the booleans that YAML reads them as."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


def _layers(value: Any) -> Any:
    if value in ("auto", "all", "none") or (type(value) is int and value >= 0):
        return value
    raise ValueError("must be auto, all, none or a number of layers")


def _auto_or_boolean(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("must be auto, true or false")


class ReplayConfig(ConfigSection):
    """Conversations that the base writes and training replays, to reduce forgetting."""

    samples: Annotated[int, Field(ge=1)] = 100
    """Conversations that the base writes, by the seed, as in Magpie (Xu et al. 2024, arXiv
    2406.08464; 100: Capacity-Gated Forgetting in LoRA Fine-Tuning, openreview AmQVxvyRJC).
    """
    kl_coef: Annotated[float | None, Field(gt=0)] = 1.0
    """Weight of the loss on their answers, the Kullback-Leibler divergence from the base to the
    adapter (1: Learning without Forgetting, Li and Hoiem 2016, arXiv 1606.09282; null: train on
    their tokens as on a pair's).
    """


class TrainConfig(ConfigSection):
    """Training of the adapter."""

    model_config = ConfigDict(serialize_by_alias=True)

    preset: Literal["classic", "all-linear"] = "classic"
    """Defaults of target_modules, learning_rate and epochs: `classic` adapts q_proj and v_proj (Hu
    et al. 2021, arXiv 2106.09685); `all-linear` adapts every linear layer (Dettmers et al. 2023,
    arXiv 2305.14314).
    """
    from_: Annotated[str | None, Field(alias="from", min_length=1)] = None
    """Adapter to start from, by name or digest (null: a new adapter). Its LoRA settings must be
    those of this section.
    """
    method: Method = "sft"
    """`sft` trains on the ideal outputs. Experimental: `dpo` (Rafailov et al. 2023, arXiv 2305.18290) and `orpo`
    (Hong et al. 2024, arXiv 2403.07691) train on pairs of a chosen and a rejected answer, `kto`
    (Ethayarajh et al. 2024, arXiv 2402.01306) on single good and bad answers. With `dpo` and `kto`,
    the defaults are learning_rate 5e-6 and 1 epoch.
    """
    beta: Annotated[float | None, Field(gt=0)] = None
    """Experimental: with dpo and kto, the weight of staying close to the adapter in `from`, or to the base. With
    orpo, the weight of the odds ratio (null: 0.1, trl's default for all three).
    """
    target_modules: Annotated[tuple[Target, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Linear layers that get LoRA weights, by the last part of their names (Hu et al. 2021, section 7.1).
    `experts` adapts each expert of a mixture of experts with a LoRA of its own (peft's
    target_parameters).
    """
    lora_r: Annotated[int, Field(ge=1)] = 16
    """LoRA rank (16: Alpaca-LoRA's published adapters)."""
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    """LoRA scale is lora_alpha / lora_r (32: Schulman et al. 2025, LoRA Without Regret)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the LoRA weights (0: peft's default)."""
    use_rslora: bool = False
    """Scale LoRA by lora_alpha / sqrt(lora_r), so that a high rank learns as fast (Kalajdzievski
    2023, arXiv 2312.03732; false: peft's default).
    """
    use_dora: bool = False
    """Train magnitudes apart from directions: DoRA (Liu et al. 2024, arXiv 2402.09353; false:
    peft's default). vLLM does not load it.
    """
    require_vllm_compatible: bool = True
    """Reject settings that vLLM would not load (DoRA, experts, a rank over 512) before training starts.
    With false such an adapter is trained, evaluated here and loaded with peft.
    """
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate (2e-4: QLoRA, Dettmers et al. 2023, table 9, for 7B-13B)."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule of the learning rate after warm-up (cosine: Stanford Alpaca's config)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps that warm up (0.1: BERT's fine-tuning code)."""
    epochs: Annotated[int, Field(ge=1, le=100)] = 3
    """Passes over the training split (3: Stanford Alpaca's config)."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples per optimizer step (16: QLoRA, Dettmers et al. 2023, table 9)."""
    micro_batch_size: Annotated[int | None, Field(ge=1)] = None
    """Examples per forward pass; gradients accumulate to batch_size (null: batch_size)."""
    prefix_sharing: Switch = "auto"
    """Compute the prompt that rows of a batch share only once (docs/concepts/shared-prefix.md).
    `auto` does so where it saves 5% of the tokens and lora_dropout is 0.
    """
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Longest conversation in tokens. A longer one is never cut: see on_overlength (2048: the
    context that Llama was first trained with).
    """
    on_overlength: Literal["error", "drop"] = "error"
    """`error` stops where a conversation is longer than max_length; `drop` leaves it out. Both name
    it.
    """
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the base's weights and of the forward pass. LoRA weights stay float32 (bfloat16:
    the type that Llama and Mistral are published in).
    """
    quantization: Quantization = "none"
    """Quantization of the base: `none` keeps dtype. `nf4` is QLoRA, with linear layers in 4 bits
    and double quantization (Dettmers et al. 2023, arXiv 2305.14314); it needs tunewright[4bit].
    """
    gradient_checkpointing: Annotated[Literal["auto", "all", "none"] | int, BeforeValidator(_layers)] = "auto"
    """Layers whose activations the backward pass computes again, to save memory: `all`, `none` or a number (Chen et al.
    2016, arXiv 1604.06174). `auto` recomputes as few as fit into the GPU's memory, and none on the CPU. The trained
    weights are the same.
    """
    use_liger_kernel: Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_boolean)] = "auto"
    """Use Liger's fused rotary embedding, RMSNorm and SwiGLU on a GPU (Hsu et al. 2024, arXiv 2410.10989). `auto` does
    so where tunewright[liger] is installed and the base is a Llama or a Mistral; `true` requires it. The loss stays
    tunewright's.
    """
    replay: Annotated[ReplayConfig | None, BeforeValidator(lambda value: {} if value == "self" else value)] = None
    """Reduce forgetting without extra data: `self`, or {samples: 100, kl_coef: 1.0}, also trains on
    conversations that the base writes and keeps the adapter close to the base's predictions there.
    """
    save_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between the checkpoints that a stopped run resumes from."""
    eval_steps: Annotated[int | None, Field(ge=1)] = None
    """Steps between evaluations on dev (null: at the end of each epoch). Each keeps its adapter.
    The last step is always evaluated.
    """
    eval_max_samples: Annotated[int | None, Field(ge=0)] = 256
    """Maximum number of dev rows that each evaluation answers for evaluate.metric, which chooses
    the adapter; drawn by the seed (256: a share's standard error is at most 3.1 points; null: all;
    0: the dev loss alone chooses).
    """
    early_stopping_patience: Annotated[int | None, Field(ge=1)] = None
    """Evaluations without improvement after which training stops (null: never early). The best
    adapter is kept either way.
    """
    generated: bool = True
    """Train on generated rows. false leaves them out, to measure their effect with `tunewright data
    generated-effect`.
    """
    report_to: tuple[Tracker, ...] = ()
    """Trackers that also get every metric, through transformers' integrations. Local ones write to
    .tunewright/trackers.
    """

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset, method = values.get("preset", "classic"), values.get("method", "sft")
        own = METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}
        return {**PRESETS[preset], **own, **values} if preset in PRESETS else values

    def deciding(self) -> dict[str, Any]:
        """Return the values that decide the trained weights: not checkpoints, trackers or the check for vLLM.

        ``gradient_checkpointing`` is left out, because a recomputed layer gives the same numbers. ``use_liger_kernel:
        auto`` depends on the machine, as an adapter's identity must not: it counts as false, its default before.
        The adapter in ``from`` is left out too, since its digest decides and not its name, and so are ``method`` and
        ``beta`` for ``sft`` and ``generated: true``: adapters trained before these keys existed keep their identity.
        """
        unused = {"save_steps", "report_to", "require_vllm_compatible", "from_", "gradient_checkpointing"}
        unused |= set() if self.prefers else {"method", "beta"}
        unused |= {"generated"} if self.generated else set()
        return self.model_dump(mode="json", exclude=unused) | {"use_liger_kernel": self.use_liger_kernel is True}

    @property
    def prefers(self) -> bool:
        """True if it trains on preferred and rejected answers."""
        return self.method != "sft"

    @model_validator(mode="after")
    def _check_method(self) -> TrainConfig:
        if self.prefers and self.replay is not None:
            raise ValueError(f"replay requires method: sft (got {self.method})")
        if not self.prefers and self.beta is not None:
            raise ValueError("beta requires method: dpo, orpo or kto (got sft)")
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> TrainConfig:
        if EXPERTS in self.target_modules and (self.use_dora or self.lora_dropout):
            raise ValueError("target_modules: experts requires lora_dropout: 0 and use_dora: false")
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> TrainConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self
