"""Training at real size: tunewright's own run next to trl and unsloth, on the same rows.

tunewright trains through `tunewright.training.run.Run`, as `tunewright train` does: micro-batches, the first
pass over the longest batch, checkpoints and the dev evaluation are all in it.

MFU counts 4 operations for each parameter of the linear layers and each token that goes through the model: 2 forward
and 2 for the gradient of the input. The weights are frozen, and recomputing activations is not useful work.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback, set_seed

from gpu_cases.bases import base_in_memory, build, shape_of, tokenizer, write_folder
from gpu_cases.plan import MODELS, OURS
from gpu_cases.reporting import Report, Skipped, host_syncs, peak_flops, synchronize
from tunewright.chat.rendering import Tokens
from tunewright.config import PRESETS, Config
from tunewright.core.progress import LogReporter
from tunewright.models import quiet_transformers
from tunewright.models.families import Shape
from tunewright.models.memory_estimate import BatchShape, TrainingSetup, estimate
from tunewright.training.run import Run

TARGETS: tuple[str, ...] = PRESETS["all-linear"]["target_modules"]
RANK = 16
STEPS, STEPS_70B = 10, 6
LOADS = {
    "shared": BatchShape(rows=8, shared=384, own=128, trained=32),
    # The setting of torchtune's published speeds: two whole texts of 2,048 tokens.
    "unshared": BatchShape(rows=2, shared=0, own=2048, trained=2047),
}
WARM_STEPS = 2
"""Steps before the clock starts: kernels are chosen, memory is taken."""
KERNELS = 40
"""The kernels that are kept of a profiled step, those with the most time."""
MEMORY_BAR = 0.1
"""The estimate may be this share off what was allocated, and what is reserved this share above it."""
TOY_STEPS = 6
TOY_LOADS = {
    "shared": BatchShape(rows=4, shared=24, own=8, trained=4),
    "unshared": BatchShape(rows=2, shared=0, own=32, trained=31),
}


@dataclass
class Clock(TrainerCallback):
    """The seconds of a step by the wall, then one profiled step, and last one whose waits for the card are counted.

    The card is waited for only before the first timed step and after the last, so that packing, copies and logging
    overlap with its work as they do in training.
    """

    steps: int
    began: float = 0.0
    step_s: float = 0.0
    kernels: list[dict[str, Any]] = field(default_factory=list)
    _open: ExitStack = field(default_factory=ExitStack)
    _waits: list[str] = field(default_factory=list)
    _profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start or end what is measured from this step on."""
        if state.global_step == WARM_STEPS:
            synchronize()
            self.began = time.perf_counter()
        elif state.global_step == self.steps - 2:
            synchronize()
            self.step_s = (time.perf_counter() - self.began) / (self.steps - 2 - WARM_STEPS)
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._profile = self._open.enter_context(profile(activities=activities))
        elif state.global_step == self.steps - 1:
            self._waits = self._open.enter_context(host_syncs())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """End what was measured in this step only."""
        if self._profile is not None:
            synchronize()
        self._open.close()
        if self._profile is not None:
            self.kernels, self._profile = _longest(self._profile), None

    @property
    def host_syncs(self) -> int | None:
        """Host waits in the last step; None without a card."""
        return len(self._waits) if torch.cuda.is_available() else None


def _longest(profiled: Any) -> list[dict[str, Any]]:
    """Return the kernels of a profiled step (without a card: the operations) with the most time."""
    time_of = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    listed = sorted(profiled.key_averages(), key=lambda each: float(getattr(each, time_of)), reverse=True)
    return [
        {"name": each.key[:120], "calls": each.count, "ms": getattr(each, time_of) / 1e3} for each in listed[:KERNELS]
    ]


class TimedRun(Run):
    """`Run` with a clock on its trainer."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = clock

    def _trainer(self, *args: Any, **kwargs: Any) -> Any:
        trainer = super()._trainer(*args, **kwargs)
        trainer.add_callback(self.clock)
        return trainer


@dataclass(frozen=True)
class Trained:
    """The measurements of one side's training."""

    losses: list[float]
    clock: Clock
    micro_batch: int
    """Rows that went through the model at once."""
    recomputed_layers: int
    """Layers that each backward pass computed again."""


def run(report: Report, toy: bool, *, side: str, model: str, varied: bool = False) -> None:
    """Train one side on one base and report its speed, memory and losses."""
    shape, nf4, rows_of = MODELS[model]
    if side == "tunewright-liger":
        from tunewright.training.liger import missing_for_liger

        if (missing := missing_for_liger("LlamaForCausalLM")) is not None:
            raise Skipped(missing)
    if side == "unsloth" and (find_spec("unsloth") is None or not torch.cuda.is_available()):
        raise Skipped("unsloth is not installed" if find_spec("unsloth") is None else "unsloth needs a CUDA card")
    load = (TOY_LOADS if toy else LOADS)[rows_of]
    steps = TOY_STEPS if toy else STEPS_70B if shape == "70b" else STEPS
    size = shape_of(shape, toy)
    _require_memory(size, load, nf4=nf4)
    rows = varied_rows(size, load, steps) if varied else same_length_rows(size, load)
    # The same rows in each step, so that losses can be compared; of varied lengths, other rows in each.
    epochs = 1 if varied else steps
    try:
        if side in OURS:
            trained = train_ours(size, rows, load.rows, epochs, nf4=nf4, **OURS[side])
        elif side == "unsloth":
            trained = _train_unsloth(size, rows, load.rows, epochs, nf4=nf4)
        else:
            trained = _train_trl(size, rows, load.rows, epochs, nf4=nf4, padding_free=side == "trl-padding-free")
    except torch.OutOfMemoryError as error:
        if side in OURS:
            raise
        # Where tunewright fits, that is a result and not a failure of this script.
        raise Skipped(f"{side} ran out of memory") from error
    row_tokens = sum(len(row.ids) for row in rows) * epochs / steps
    computed = (load.tokens if side in OURS else load.attended) if not varied else None
    report(
        "training",
        all(map(_finite, trained.losses)) and (varied or trained.losses[-1] < trained.losses[0]),
        **account(size, trained, row_tokens, computed, nf4=nf4),
    )
    if not varied:
        report("kernels", listed=trained.clock.kernels)
    if side == "tunewright" and not varied:
        report("memory", **_memory(size, load, trained.recomputed_layers, nf4=nf4))


def _memory(size: Shape, load: BatchShape, recomputed: int, *, nf4: bool) -> dict[str, Any]:
    """Return the estimate next to the card's peaks: without the allocator's slack, and with it."""
    on_card = torch.cuda.is_available()
    needed = estimate(size, TrainingSetup(TARGETS, RANK, nf4=nf4, recomputed=recomputed, card=on_card), load)
    predicted = needed.total - needed.runtime - needed.allocator
    found: dict[str, Any] = {"predicted_bytes": predicted, "predicted_reserved_bytes": predicted + needed.allocator}
    if not on_card:
        return {"passed": None, **found, "allocated_bytes": None, "reserved_bytes": None}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    holds = abs(predicted / allocated - 1) <= MEMORY_BAR and reserved <= (1 + MEMORY_BAR) * (
        predicted + needed.allocator
    )
    return {"passed": holds, **found, "allocated_bytes": allocated, "reserved_bytes": reserved}


def account(size: Shape, trained: Trained, row_tokens: float, computed: int | None, *, nf4: bool) -> dict[str, Any]:
    """Return the numbers of a finished training.

    Args:
        size: the base's shape.
        trained: the run.
        row_tokens: tokens of a step's rows, shared ones counted once per row.
        computed: tokens of a step that go through the model; None where steps differ.
        nf4: the base was quantized.
    """
    seconds, peak = trained.clock.step_s, peak_flops()
    useful = None if computed is None else 4 * size.linear_parameters * computed / seconds
    on_card = torch.cuda.is_available()
    return {
        "quantization": "nf4" if nf4 else "none",
        "step_s": seconds,
        "row_tokens_s": row_tokens / seconds,
        "computed_tokens_s": None if computed is None else computed / seconds,
        "mfu": useful / peak if useful and peak else None,
        "allocated_bytes": torch.cuda.max_memory_allocated() if on_card else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_card else None,
        "first_loss": trained.losses[0],
        "last_loss": trained.losses[-1],
        "host_syncs": trained.clock.host_syncs,
        "micro_batch": trained.micro_batch,
        "recomputed_layers": trained.recomputed_layers,
    }


def _require_memory(size: Shape, load: BatchShape, *, nf4: bool) -> None:
    """Check that the card is large enough by the estimate.

    Raises:
        Skipped: it is not.
    """
    if torch.cuda.is_available():
        needed = estimate(size, TrainingSetup(TARGETS, RANK, nf4=nf4, recomputed="all", card=True), load).total
        there = torch.cuda.get_device_properties(0).total_memory
        if needed > there:
            raise Skipped(f"needs {needed / 1e9:.0f} GB, and the card has {there / 1e9:.0f} GB")


def _finite(loss: float) -> bool:
    return loss == loss and abs(loss) != float("inf")


def same_length_rows(size: Shape, load: BatchShape) -> list[Tokens]:
    """Return the rows of one step: random ids with the same first tokens."""
    drawn = torch.randint(5, size.vocabulary, (load.rows, load.shared + load.own), generator=_seeded()).tolist()
    return [_row(drawn[0][: load.shared] + row[load.shared :], load.trained) for row in drawn]


def varied_rows(size: Shape, load: BatchShape, steps: int) -> list[Tokens]:
    """Return rows for ``steps`` steps, of lengths from a quarter of the load's to four times that."""
    generator = _seeded()
    length = load.shared + load.own
    lengths = torch.randint(length // 4, 4 * length, (steps * load.rows,), generator=generator).tolist()
    return [
        _row(torch.randint(5, size.vocabulary, (each,), generator=generator).tolist(), load.trained) for each in lengths
    ]


def _row(ids: list[int], trained: int) -> Tokens:
    return Tokens(tuple(ids), (False,) * (len(ids) - trained) + (True,) * trained)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def config_of(rows: int, epochs: int, *, nf4: bool, **settings: Any) -> Config:
    """Return the config of a tunewright run with ``rows`` rows in each step; ``settings`` are others of ``train``."""
    train = {
        "preset": "all-linear",
        "lora_r": RANK,
        "epochs": epochs,
        "batch_size": rows,
        "quantization": "nf4" if nf4 else "none",
        "eval_max_samples": 0,
        "eval_steps": 10**6,
        "save_steps": 10**6,
        # The side tunewright-liger is compared with the models' own code.
        "use_liger_kernel": False,
        **settings,
    }
    return Config.model_validate({"name": "gpu-proof", "train": train})


def train_ours(size: Shape, rows: Sequence[Tokens], batch: int, epochs: int, *, nf4: bool, **settings: Any) -> Trained:
    """Train as `tunewright train` does, on a base built here; ``settings`` are others of the config's ``train``."""
    set_seed(0)
    clock = Clock(len(rows) * epochs // batch)
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        config = config_of(batch, epochs, nf4=nf4, **settings)
        run = TimedRun(config, base_in_memory(size, Path(folder)), Path(folder), LogReporter(), clock=clock)
        model = build(size, nf4=nf4)
        if config.train.dtype == "float32":
            model = model.float()
        reset_peak()
        history, _ = run.fit(model, tokenizer(), rows, rows[:1], None)
        losses = [row["loss"] for row in history if "loss" in row]
        recomputed = 0 if run.micro_batch.layers is None else run.micro_batch.layers.count
        return Trained(losses, clock, run.micro_batch.rows or batch, recomputed)


def reset_peak() -> None:
    """Reset the peak after building, which holds a 16-bit matrix and its 4-bit copy."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _train_trl(
    size: Shape, rows: Sequence[Tokens], batch: int, epochs: int, *, nf4: bool, padding_free: bool
) -> Trained:
    """Train with trl's SFTTrainer and peft's own layers, over FlashAttention where flash-attn is installed."""
    from peft import LoraConfig

    set_seed(0)
    model = build(size, nf4=nf4)
    if padding_free and find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
    reset_peak()
    return _sft(model, rows, batch, epochs, peft_config=lora, padding_free=padding_free)


def _train_unsloth(size: Shape, rows: Sequence[Tokens], batch: int, epochs: int, *, nf4: bool) -> Trained:
    """Train with unsloth's kernels and its own gradient checkpointing; it loads its base from a folder."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        if (free := shutil.disk_usage(folder).free) < 2 * size.parameters:
            raise Skipped(
                f"its base takes {2 * size.parameters / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB are free"
            )
        base = write_folder(size, Path(folder) / "base")
        model, _ = FastLanguageModel.from_pretrained(
            str(base), max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=nf4, local_files_only=True
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=list(TARGETS),
            use_gradient_checkpointing="unsloth",
            random_state=0,
        )
        reset_peak()
        return _sft(model, rows, batch, epochs)


def _sft(
    model: Any, rows: Sequence[Tokens], batch: int, epochs: int, *, padding_free: bool = False, **extra: Any
) -> Trained:
    """Train with trl's SFTTrainer, with the schedule, precision and checkpointing that tunewright uses."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    columns = {
        "input_ids": [list(row.ids) for row in rows],
        "labels": [[token if on else -100 for token, on in zip(row.ids, row.loss_mask, strict=True)] for row in rows],
    }
    steps = len(rows) * epochs // batch
    on_card = torch.cuda.is_available()
    clock = Clock(steps)
    with quiet_transformers(), tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=batch,
            num_train_epochs=epochs,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=-(-steps // 10),
            weight_decay=0.0,
            bf16=True,
            use_cpu=not on_card,
            gradient_checkpointing=on_card,
            max_length=None,
            padding_free=padding_free,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer(),
            callbacks=[clock],
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(losses, clock, batch, model.config.num_hidden_layers if on_card else 0)
