"""One training run in its working folder: trl's trainer, from the last complete checkpoint to the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import HISTORY, Adapter
from tunewright.chat import Tokens
from tunewright.config import BETA, Config, TrainConfig, metric_name
from tunewright.config.train import EXPERTS
from tunewright.core.errors import UserError
from tunewright.core.interrupts import finishing
from tunewright.core.io import digest
from tunewright.core.progress import Reporter, Task
from tunewright.models.bases import Base
from tunewright.models.families import outside_text, read_shape
from tunewright.training import distributed
from tunewright.training.checkpoints import (
    CheckpointCallback,
    add_evaluation,
    evaluation_missing,
    restore_random,
    resumable_checkpoint,
    step_of,
    stop_on_signal,
)
from tunewright.training.history import evaluations, history_rows, patience_exceeded
from tunewright.training.liger import choose_liger, liger_kernels
from tunewright.training.memory import MicroBatch
from tunewright.training.monitoring import DevTask, EvaluationCallback, MetricsCallback
from tunewright.training.packing.order import Sharing, resolve_sharing
from tunewright.training.packing.padding import Padding, measure_padding
from tunewright.training.rows import as_columns, render_digest, total_steps

if TYPE_CHECKING:
    # Imported where they are used: a run without them needs no part of the dataset's code.
    from tunewright.training.preference_pairs import PreferenceRows


def evaluation_interval(settings: TrainConfig, steps: int) -> int:
    """Return the steps between evaluations on dev, for a run of ``steps`` steps."""
    return settings.eval_steps or steps // settings.epochs


class Run:
    """One training run in its working folder.

    It starts from ``parent``, or from a new adapter. ``preferences`` are the answers that a preference method trains
    on, instead of the training rows. No row has more tokens than ``limit`` (0: the config's number).
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        work: Path,
        reporter: Reporter,
        *,
        parent: Adapter | None = None,
        preferences: PreferenceRows | None = None,
        limit: int = 0,
    ) -> None:
        self.config = config
        self.parent = parent
        self.preferences = preferences
        self.limit = limit or config.train.max_length
        self.base = base
        self.shape = read_shape(base.folder / "config.json")
        self.work = work
        self.name = f"{config.name}-{work.name}"
        self.reporter = reporter
        self.micro_batch = MicroBatch(micro_batch(config.train), work, reporter)
        self.sharing: Sharing | None = None
        """None on the plain path, and until the rows are known."""
        self.padding: Padding | None = None
        """The cost of the plain path; None if rows are packed."""
        self.held: list[int] | None = None
        """Bytes of the model's weights in each process, if the model is sharded."""

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        train: Sequence[Tokens],
        dev: Sequence[Tokens],
        dev_task: DevTask | None,
        until: int | None = None,
        replay: Sequence[Tokens] = (),
    ) -> tuple[list[dict[str, Any]], float]:
        """Train to the end; return the history of losses and evaluations, and the seconds of this process.

        With ``until``, train only up to that step, and save its checkpoint. Dev is then evaluated for the history, not
        for the checkpoint, so the run that resumes from it is unaffected. ``replay`` are rows that the base wrote,
        trained on as the config's train.replay says. Preferences replace ``train``.
        """
        from transformers import set_seed

        settings = self.config.train
        if self.preferences is None:
            rows = as_columns(train, replay)
        else:
            # The first answer of each row stands for it; the trainer finds the row's answers by its place.
            first = self.preferences.rows[:: self.preferences.answers_per_row]
            rows = {**as_columns(first), "place": list(range(len(first)))}
        steps = total_steps(settings, len(rows["input_ids"]))
        # Before the adapter is made: its A matrices are drawn at random.
        set_seed(self.config.seed)
        checkpoint = distributed.broadcast_from_main(lambda: resumable_checkpoint(self.work, self.base, self.reporter))
        if checkpoint is not None:
            _require_same_sharding(checkpoint)
        began_with = self.micro_batch.liger
        self.micro_batch.liger = distributed.broadcast_from_main(
            lambda: choose_liger(settings.use_liger_kernel, self.base.architecture, began_with, self.reporter)
        )
        with (
            liger_kernels(model) if self.micro_batch.liger else nullcontext(),
            stop_on_signal(until) as stop,
            self.reporter.task(f"Training {self.config.name}", steps, "steps") as task,
        ):
            keeping = CheckpointCallback(self.work, self.base, stop)
            trainer = self._trainer(model, tokenizer, rows, as_columns(dev), dev_task, keeping, task)
            if checkpoint is not None:
                done = step_of(checkpoint)
                self.reporter.say(f"Resuming from step {done} of {steps}")
                task.advance(done, kept=True)
                if evaluation_missing(checkpoint, evaluation_interval(settings, steps)):
                    self._make_missing_evaluation(trainer, checkpoint)
            began = time.monotonic()
            finished = (
                None if checkpoint is None else _finished_state(checkpoint, settings.early_stopping_patience, until)
            )
            if finished is not None:
                trainer.state = finished
            else:
                _train(trainer, keeping, checkpoint)
                self.held = trainer.bytes_held()
            seconds = time.monotonic() - began
            if until is not None and not stop.agreed():
                _evaluate_at_pause(trainer, checkpoint if finished else None)
        if stop.agreed() and trainer.state.global_step:
            self.reporter.say(f"Stopped at step {trainer.state.global_step} of {steps}. This step is saved.")
        if stop.asked:
            raise KeyboardInterrupt
        return history_rows(trainer.state.log_history), seconds

    def _make_missing_evaluation(self, trainer: Any, checkpoint: Path) -> None:
        """Make the evaluation that a stop cut off after a checkpoint's step."""
        from transformers import TrainerState

        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        load_adapter(trainer.model, checkpoint)
        if not trainer.evaluate():
            raise KeyboardInterrupt
        add_evaluation(checkpoint, trainer.state, self.base)

    def details(self) -> dict[str, Any]:
        """Return details of the rows' batching and packing, for the lineage."""
        return {
            "micro_batch_size": self.micro_batch.rows,
            "liger_kernels": self.micro_batch.liger,
            "recomputed_layers": None if self.micro_batch.layers is None else self.micro_batch.layers.count,
            "bytes_held": self.held,
            **({} if self.sharing is None else {"prefix_sharing": asdict(self.sharing)}),
            **({} if self.padding is None else {"padding": asdict(self.padding)}),
        }

    def _trainer(
        self,
        model: Any,
        tokenizer: Any,
        train: dict[str, list[Any]],
        dev: dict[str, list[Any]],
        dev_task: DevTask | None,
        keeping: CheckpointCallback,
        task: Task,
    ) -> Any:
        from datasets import Dataset
        from transformers import PrinterCallback

        from tunewright.training.lora import lora_config
        from tunewright.training.recomputation import RecomputedLayers

        settings, preferences = self.config.train, self.preferences
        layers = RecomputedLayers(settings, self.shape)
        self.micro_batch.set_layers(layers)
        self._measure_batches(train["input_ids"])
        trainer = self._trainer_type()(
            model,
            share=self.sharing is not None and self.sharing.share,
            plain=not self.base.packed,
            kl=settings.replay.kl_coef if settings.replay else None,
            args=self._arguments(total_steps(settings, len(train["input_ids"])), layers.auto or layers.count > 0),
            train_dataset=Dataset.from_dict(train),
            eval_dataset=Dataset.from_dict(dev),
            processing_class=tokenizer,
            peft_config=lora_config(settings, outside=outside_text(self.shape)),
            callbacks=[
                MetricsCallback(
                    task,
                    self.work / HISTORY,
                    metric_name(self.config.evaluate.metric),
                    model.config.get_text_config().vocab_size,
                    lambda step: trainer.rows_of_step(step),
                ),
                keeping,
                EvaluationCallback(self.config, self.reporter),
            ],
            stop=keeping.stop,
            dev_task=dev_task,
            micro_batch=self.micro_batch,
        )
        trainer.remove_callback(PrinterCallback)
        if self.parent is not None:
            load_adapter(trainer.model, self.parent.folder)
        if preferences is not None and trainer.needs_reference:
            from tunewright.training.preference_trainer import set_reference

            start = [self.base.digest, None if self.parent is None else self.parent.digest]
            identity = digest([*start, render_digest(preferences.rows)])
            set_reference(trainer, self.work, identity, self.reporter)
        return trainer

    def _measure_batches(self, rows: Sequence[Sequence[int]]) -> None:
        """Decide on sharing prompts, or measure the padding of the plain path; report either."""
        settings, preferences = self.config.train, self.preferences
        paired = preferences is not None and preferences.answers_per_row == 2
        measured: dict[str, Any] = {
            "partners": [row.ids for row in preferences.rows[1::2]] if preferences is not None and paired else None,
            "micro_batch": micro_batch(settings),
            "batch_size": settings.batch_size,
            "seed": self.config.seed,
        }
        if not self.base.packed:
            self.padding = measure_padding(rows, **measured)
            self.reporter.say(f"Rows are padded, because this base cannot be trained on packed rows: {self.padding}.")
            return
        self.sharing = resolve_sharing(rows, setting=settings.prefix_sharing, dropout=settings.lora_dropout, **measured)
        self.reporter.say(self.sharing.reason)

    def _trainer_type(self) -> Any:
        """Return the class of the trainer, with the arguments of a preference method."""
        if self.preferences is None:
            from tunewright.training.trainer import Trainer

            return Trainer
        from tunewright.training.preference_trainer import PreferenceTrainer

        beta = self.config.train.beta or BETA
        return partial(PreferenceTrainer, preferences=self.preferences, beta=beta, limit=self.limit)

    def _arguments(self, steps: int, recompute: bool) -> Any:
        import torch
        from trl import SFTConfig

        settings = self.config.train
        micro = micro_batch(settings)
        arguments = SFTConfig(
            output_dir=str(self.work),
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=settings.batch_size // distributed.world_size() // micro,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler_type
            if settings.lr_scheduler_type != "constant"
            else "constant_with_warmup",
            warmup_steps=math.ceil(settings.warmup_ratio * steps),
            weight_decay=0.0,
            seed=self.config.seed,
            bf16=settings.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=recompute,
            # Rows are encoded already and none exceeds the config's limit: trl has nothing to truncate.
            max_length=None,
            remove_unused_columns=False,
            # Experts' routers are frozen, and the loss covers only the answers.
            router_aux_loss_coef=0.0,
            # Every LoRA weight is used in every pass.
            ddp_find_unused_parameters=False,
            eval_strategy="steps",
            eval_steps=evaluation_interval(settings, steps),
            save_strategy="steps",
            save_steps=settings.save_steps,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=list(settings.report_to) or "none",
            run_name=self.name,
            project=self.config.name,
            disable_tqdm=True,
        )
        if arguments.n_gpu > 1:
            # One process trains on the first GPU: DataParallel, transformers' default, cannot split packed rows.
            arguments._n_gpu = 1
        return arguments


def micro_batch(settings: TrainConfig, processes: int | None = None) -> int:
    """Return the rows of one forward pass in one of this many processes (None: this run's)."""
    count = processes or distributed.world_size()
    share = settings.batch_size // count
    if settings.batch_size % count:
        raise UserError(
            f"{settings.batch_size} rows cannot be shared equally by {count} processes",
            where="train.batch_size",
            fix=f"Use a multiple of {count}, or another number of processes.",
        )
    micro = min(settings.micro_batch_size or share, share)
    if share % micro:
        raise UserError(
            f"Each of {count} processes has {share} rows of a batch, which is not a multiple of {micro}",
            where="train.micro_batch_size",
            fix=f"Set it to a divisor of {share}.",
        )
    return micro


def require_fsdp_supported(settings: TrainConfig, *, packed: bool = True) -> None:
    """Check that this config can be trained on a base that FSDP shards; ``packed`` is the base's.

    Replay and preference methods need passes of a single process; weights to start from are not sharded.
    """
    if not packed:
        raise UserError(
            "FSDP is not supported for this base, because it trains on padded rows",
            where="base_model",
            fix="Start without FSDP (`accelerate launch --multi_gpu`).",
        )
    if settings.from_ is not None or settings.prefers:
        key = "train.method" if settings.prefers else "train.from"
        raise UserError(
            f"{key} is not supported with FSDP",
            where=key,
            fix="Start without FSDP (`accelerate launch --multi_gpu`).",
        )
    if EXPERTS in settings.target_modules:
        raise UserError(
            "LoRA on experts is not supported with FSDP",
            where="train.target_modules",
            fix=f"Remove {EXPERTS}, or start without FSDP (`accelerate launch --multi_gpu`).",
        )
    if settings.replay is not None:
        raise UserError(
            "Replay is not supported with FSDP: each process makes passes of the base alone",
            where="train.replay",
            fix="Remove train.replay, or start without FSDP (`accelerate launch --multi_gpu`).",
        )


def _require_same_sharding(checkpoint: Path) -> None:
    """Check that a run resumes as it started: with the base sharded, or complete in every process."""
    from accelerate.utils.constants import FSDP_MODEL_NAME

    was = (checkpoint / f"{FSDP_MODEL_NAME}.bin").exists()
    if was != distributed.is_sharded():
        began, asked = ("with FSDP", "without it") if was else ("without FSDP", "with it")
        raise UserError(
            f"This run started {began} and cannot resume {asked}",
            where=str(checkpoint),
            fix=f"Start it {began} again, or remove {checkpoint.parent} to train from the beginning.",
        )


def _finished_state(checkpoint: Path, patience: int | None, until: int | None) -> Any:
    """Return the trainer's state in a checkpoint with nothing left to train; None if the run continues.

    That is a checkpoint at which the run stopped early, or the checkpoint at ``until``.
    """
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    evaluated = evaluations(state.log_history)
    at_end = bool(evaluated) and evaluated[-1].step == state.global_step
    early = at_end and patience_exceeded(evaluated, patience)
    return state if early or state.global_step == until else None


def _train(trainer: Any, keeping: CheckpointCallback, checkpoint: Path | None) -> None:
    """Train to the end or to a stop, in which case the last complete step is saved."""
    try:
        with finishing("the step in progress or the one before is saved"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        stop = keeping.stop
        if not stop.asked or distributed.world_size() > 1 or not trainer.state.global_step:
            raise
        if stop.phase == "step":
            restore_random(keeping.random)
        stop.phase = "closed"
        with finishing("the last complete step is saved"):
            trainer.save_step_before()


def load_adapter(model: Any, folder: Path) -> None:
    """Load an adapter's weights into a peft model whose own adapter has the same LoRA settings."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def _evaluate_at_pause(trainer: Any, checkpoint: Path | None) -> None:
    """Evaluate on dev when a run pauses, unless this step was already evaluated.

    ``checkpoint`` gives the weights, if set.
    """
    evaluated = evaluations(trainer.state.log_history)
    if evaluated and evaluated[-1].step == trainer.state.global_step:
        return
    if checkpoint is not None:
        load_adapter(trainer.model, checkpoint)
    trainer.remove_callback(EvaluationCallback)  # the callback counts only the run's own evaluations
    trainer.evaluate()
