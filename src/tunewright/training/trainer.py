"""trl's trainer on packed batches: shared prompts once, no padding, the head on trained tokens, its own row order.

Bases that packed batches cannot train have a plain path: `tunewright.training.packing.padding`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers.trainer_pt_utils import nested_gather
from trl import SFTTrainer

from tunewright.core.progress import slow
from tunewright.generation.generate import in_memory
from tunewright.training import distributed, fsdp, step_numbers
from tunewright.training.checkpoints import StopRequest, is_complete
from tunewright.training.history import DEV_METRIC, append_dev_answers
from tunewright.training.lora import keep_float32
from tunewright.training.memory import MicroBatch, RawRows, too_little_memory
from tunewright.training.monitoring import DevTask
from tunewright.training.packing import PackedBatch, attention, pack
from tunewright.training.packing.fused_loss import (
    LossBreakdown,
    Reference,
    RewardStatistics,
    add_token_losses,
    batch_token_losses,
)
from tunewright.training.packing.order import StepBatches, longest_batch, random_order
from tunewright.training.packing.pack import TensorBatch
from tunewright.training.packing.padding import PaddedBatch, pad, token_logits
from tunewright.training.rows import IGNORED
from tunewright.training.step_numbers import StepNumbers


class Trainer(SFTTrainer):
    """Trains on rows of ``input_ids`` and ``labels``; its other arguments are SFTTrainer's.

    With ``share`` prompts that rows of a batch share are computed once. With ``plain`` rows are padded, and go through
    the model's own forward and attention. ``micro_batch`` None: every micro-batch in full. ``kl`` is the weight of the
    KL divergence from the base, which is the loss on rows whose column ``replayed`` is true; None means that these rows
    are trained like the others. ``stop`` cuts evaluations off.
    """

    def __init__(
        self,
        model: Any,
        *,
        share: bool,
        plain: bool = False,
        dev_task: DevTask | None = None,
        micro_batch: MicroBatch | None = None,
        kl: float | None = None,
        stop: StopRequest | None = None,
        **kwargs: Any,
    ) -> None:
        self.stop = stop or StopRequest()
        self.micro_batch = micro_batch
        self._step = -1
        self._accumulated: list[RawRows] = []
        """Micro-batches of the step in progress whose gradients are accumulated."""
        assert not (share and plain), "padded rows share nothing"
        self.share, self.plain = share, plain
        self.dev_task = dev_task
        self.kl = kl
        self._tokens = 0
        """Tokens of rows trained on in this process since the last log."""
        self._last_log: tuple[float, int] | None = None
        self._unread: list[StepNumbers] = []
        """Steps whose numbers have not been logged, oldest first."""
        self._breakdown: LossBreakdown | RewardStatistics | None = None
        if not plain:
            attention.register()
            # Use the packed layout in training, and SDPA without a layout, when answers are generated.
            model.set_attn_implementation(attention.NAME)
            add_token_losses(model)
        super().__init__(model=model, data_collator=self.collate, **kwargs)
        keep_float32(self.model)
        rows: Any = self.train_dataset
        if "replayed" in rows.column_names:
            self._breakdown = LossBreakdown(kl, self.accelerator.device)
        # The loss is a sum over tokens, divided by the tokens of the whole step.
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as transformers does, and configure FSDP if the launcher asked for it."""
        super().create_accelerator_and_postprocess()
        if distributed.is_sharded():
            fsdp.shard(self.accelerator, self.model)
            self.is_fsdp_enabled = True

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card: trl would render a README.md next to each checkpoint, and lineage describes the adapter."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, also of a sharded model; transformers would also gather the frozen base."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=fsdp.adapter_weights(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make one batch of rows of the dataset; transformers counts its labels.

        No rows make a batch of which nothing is trained, so that this process makes its pass with the others.
        """
        if not rows:
            all_rows: Any = self.train_dataset
            shortest = min(all_rows, key=lambda row: len(row["input_ids"]))
            filler = self.collate([{**shortest, "labels": [IGNORED] * len(shortest["labels"])}])
            return {**filler, "batch": replace(filler["batch"], row_tokens=0), "rows": RawRows(())}
        replayed = [bool(row.get("replayed")) for row in rows]
        batch = self.lay_out([row["input_ids"] for row in rows], [row["labels"] for row in rows], replayed)
        return {
            "batch": batch,
            "rows": RawRows(tuple(rows)),
            "labels": batch.targets,
            "shift_labels": batch.targets,
        }

    def lay_out(
        self, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], replayed: Sequence[bool] | None = None
    ) -> PackedBatch | PaddedBatch:
        """Return rows of token ids as one batch, packed or padded."""
        if self.plain:
            return pad(rows, labels, replayed=replayed)
        return pack(rows, labels, share=self.share, replayed=replayed)

    def _unlabelled(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return rows as one batch, without the labels, which only transformers counts."""
        return {"batch": self.collate(rows)["batch"]}

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Any:
        """Run forward and backward of one micro-batch, in chunks that fit into memory; return its part of the loss."""
        if self.micro_batch is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            first = self.micro_batch.rows is None
            rows = self.micro_batch.rows or self._probe_longest_batch(model, self.micro_batch)
            if self.state.global_step != self._step:
                self._step, self._accumulated = self.state.global_step, []
            compute = partial(self._accumulate, model, inputs["rows"], rows, num_items_in_batch, inputs)
            with slow(self.micro_batch.reporter, "Computing the first step") if first else nullcontext():
                enough, loss = in_memory(compute)
            if not enough:
                loss = self._retry(model, inputs["rows"], rows, num_items_in_batch, self.micro_batch)
            self._accumulated.append(inputs["rows"])
        # Counted on the host; `_step_numbers` adds the other processes' counts once a step.
        self._tokens += inputs["batch"].row_tokens
        return loss

    def _prepare_input(self, data: Any) -> Any:
        """Move our own batches, which transformers does not; chunks of a micro-batch are on the CPU."""
        if not isinstance(data, TensorBatch):
            return super()._prepare_input(data)
        device = self.accelerator.device
        if device.type == "cuda" and not data.input_ids.is_cuda:
            data = data.pin_memory()
        return data.to(device, non_blocking=True)

    def _accumulate(
        self, model: Any, rows: RawRows, size: int, items: Tensor | int | None, whole: dict[str, Any] | None = None
    ) -> Tensor:
        """Accumulate the gradients of rows, ``size`` at once; return their part of the loss.

        ``whole`` is the batch of all rows, if it exists already.
        """
        if self.micro_batch is not None and self.micro_batch.layers is not None:
            self.micro_batch.layers.apply(self.model)
        # With FSDP every process makes equally many passes, even if it has fewer rows.
        *others, last = rows.pieces(size, self.args.train_batch_size if self.is_fsdp_enabled else 0)
        total = torch.zeros((), device=self.accelerator.device)
        for piece in others:
            # Processes synchronize gradients only with the last chunk.
            with self.accelerator.no_sync(model):
                total += super().training_step(model, self._unlabelled(piece), items)
        batch = self._unlabelled(last) if others or whole is None else whole
        total += super().training_step(model, batch, items)
        return total

    def _retry(self, model: Any, rows: RawRows, size: int, items: Tensor | int | None, micro: MicroBatch) -> Tensor:
        """Repeat the step with more layers recomputed, or half the rows at once, until it fits.

        It starts from zero gradients, because the failed backward pass left partial gradients.
        """
        if self.accelerator.num_processes > 1:
            # The other processes wait for this one's gradients and cannot be notified.
            raise too_little_memory("with several devices, a step cannot be repeated")

        def whole_step() -> Tensor:
            """Accumulate the gradients of the step's micro-batches; return the last one's part of the loss."""
            return [self._accumulate(model, part, size, items) for part in (*self._accumulated, rows)][-1]

        while True:
            size = micro.shrink(size, self.state.global_step + 1)
            model.zero_grad(set_to_none=True)
            self._clear_breakdown()
            enough, loss = in_memory(whole_step)
            if enough:
                again: Tensor = loss
                return again

    def _probe_longest_batch(self, model: Any, micro: MicroBatch) -> int:
        """Choose rows and recomputed layers by a real pass of the longest batch, whose gradients are dropped."""
        rows: Any = self.train_dataset
        batches: list[list[int]] = []
        # Batches of every process: all processes must probe the same one.
        for own in map(self._step_batches, range(self.args.world_size)):
            for epoch in range(math.ceil(self.args.num_train_epochs)):
                own.set_epoch(epoch)
                batches += own
        tokens = self._token_rows()
        places = longest_batch(tokens, batches, padded=self.plain)
        longest = RawRows(tuple(rows[place] for place in places))
        size, planned = len(places), 0
        devices = [torch.cuda.current_device()] if self.accelerator.device.type == "cuda" else []
        no_exchange = (
            fsdp.syncing_gradients(model, self.accelerator.sync_gradients)
            if self.is_fsdp_enabled
            else self.accelerator.no_sync(model)
        )
        trying = slow(micro.reporter, f"Computing the longest batch, of {size} rows, to choose the micro-batch")
        with torch.random.fork_rng(devices), no_exchange, trying:
            while True:
                piece = RawRows(longest.pieces(size)[-1])
                if size != planned and micro.layers is not None:
                    micro.layers.plan(self._unlabelled(piece.rows)["batch"])
                    planned = size
                enough, _ = in_memory(partial(self._pass_with_optimizer_state, model, piece, size))
                if not enough and self.is_fsdp_enabled:
                    raise too_little_memory("with FSDP, a pass cannot be repeated")
                model.zero_grad(set_to_none=True)
                self._clear_breakdown()
                if enough:
                    break
                size = micro.shrink(size, 0)
        fits: int = min(gather_object([micro.asked if size == len(places) else size]))
        if micro.layers is not None:
            micro.layers.count = max(gather_object([micro.layers.count]))
        micro.choose(fits, sum(len(tokens[place]) for place in places))
        return fits

    def _token_rows(self) -> Sequence[Sequence[int]]:
        """Return the token ids that each training row puts into a pass."""
        rows: Any = self.train_dataset
        ids: Sequence[Sequence[int]] = rows["input_ids"][:]
        return ids

    def _clear_breakdown(self) -> None:
        if self._breakdown is not None:
            self._breakdown.clear()

    def _pass_with_optimizer_state(self, model: Any, rows: RawRows, size: int) -> None:
        """Run a forward and backward pass with as much memory allocated as the optimizer uses after its first step."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        moments = [torch.empty_like(weight, dtype=torch.float32) for weight in weights for _ in range(2)]
        self._accumulate(model, rows, size, 1)
        del moments

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean loss of the step's trained tokens, or this micro-batch's part of it."""
        assert not return_outputs, "logits are never kept"
        batch: PackedBatch | PaddedBatch = inputs["batch"]
        losses = batch_token_losses(model, batch, self._reference(model, batch))
        if isinstance(self._breakdown, LossBreakdown):
            self._breakdown.add(losses, batch.replayed)
        loss: Tensor = losses.sum()
        if num_items_in_batch is None:
            return loss / len(batch.targets)
        # The loss is a sum over the step's tokens / num_items. DDP averages over processes: multiply by their number.
        scaled: Tensor = loss * (self.accelerator.num_processes / num_items_in_batch)
        return scaled

    def _reference(self, model: Any, batch: PackedBatch | PaddedBatch) -> Reference | None:
        """Return the base's predictions for replayed rows: the same pass with the adapter off.

        It runs before the trained pass, because PEFT's adapter switch also switches the weights' gradients.
        """
        if batch.replayed is None or batch.learnt is None or self.kl is None:
            return None
        # Not through DDP, whose passes are collective: other processes may have no replayed row.
        own: Any = self.accelerator.unwrap_model(model)
        with torch.no_grad(), own.disable_adapter():
            if isinstance(batch, PaddedBatch):
                states = token_logits(own, batch).index_select(0, batch.replayed).log_softmax(-1)
            else:
                states = own(**batch.model_inputs(), predict_from=batch.predict_from.index_select(0, batch.replayed))
        return Reference(batch.replayed, batch.learnt, states, self.kl)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Log a finished step, or the step before it (`READ_LATE`); then evaluate and save as transformers does."""
        control, step = self.control, self.state.global_step
        if control.should_log and step > self._globalstep_last_logged:
            control.should_log, self._globalstep_last_logged = False, step
            self._unread.append(self._step_numbers(tr_loss, grad_norm, kwargs["learning_rate"]))
        late = self.accelerator.device.type in step_numbers.READ_LATE
        due = control.should_evaluate or control.should_save or control.should_training_stop
        self._log_steps(leave=1 if late and not due else 0)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _step_numbers(self, loss: Tensor, norm: Tensor, learning_rate: float) -> StepNumbers:
        """Add up a step's numbers over all processes, reset them, and start their only copy to the host."""
        sums = loss.new_full((1,), self._tokens, dtype=torch.float64)
        self._tokens = 0
        if self._breakdown is not None:
            sums = torch.cat([sums, self._breakdown.sums()])
            self._breakdown.clear()
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        mean = nested_gather(loss, self.args.parallel_mode).mean()
        parts = [mean.double().view(1), norm.double().view(1), self.accelerator.reduce(sums, "sum")]
        loss.zero_()
        return StepNumbers.copy(self.state.global_step, self.state.epoch, learning_rate, parts)

    def _log_steps(self, leave: int = 0) -> None:
        """Log the steps whose numbers have not been read, but not the latest ``leave``."""
        state: Any = self.state
        now = state.global_step, state.epoch
        while len(self._unread) > leave:
            unread = self._unread.pop(0)
            loss, norm, tokens, *sums = unread.read()
            self._total_loss_scalar += loss
            self._total_train_tokens += int(tokens)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            logs = {"loss": loss, "grad_norm": norm, "learning_rate": unread.learning_rate}
            if self._breakdown is not None:
                logs |= self._breakdown.means(sums)
            state.global_step, state.epoch = unread.step, unread.epoch
            try:
                self.log(logs)
            finally:
                # An interrupt here saves the latest step, under its own number.
                state.global_step, state.epoch = now

    def rows_of_step(self, step: int) -> list[int]:
        """Return the indices in the training set of the rows of optimizer step ``step``, counted from 1."""
        order = self._get_train_sampler()
        size = self._step_rows
        epoch, batch = divmod(step - 1, math.ceil(len(order) / size))
        order.set_epoch(epoch)
        return list(order)[batch * size : (batch + 1) * size]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a step's numbers the tokens per second since the previous step, and the memory in use."""
        if "loss" in logs:
            now = time.monotonic()
            if self._last_log is not None:
                before, tokens = self._last_log
                logs["tokens_per_s"] = (self._total_train_tokens - tokens) / (now - before)
            self._last_log = now, self._total_train_tokens
            logs["memory_bytes"] = memory_in_use(self.accelerator.device)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,  # noqa: ARG002  (transformers passes it)
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the mean loss of all trained tokens of the evaluation rows, on any number of devices.

        If dev rows are answered, also score the answers. Each row counts once, and no random number is
        drawn. Return nothing if a stop cuts it off; the run then ends with this step's checkpoint.
        """
        model: Any = self.model  # not wrapped by DDP: processes may have different numbers of batches here
        was_training = model.training
        model.eval()
        try:
            with self.stop.free("this step is saved, and its evaluation is made when the run resumes"):
                metrics = self._evaluation_metrics(model, eval_dataset, metric_key_prefix)
        except KeyboardInterrupt:
            if not self.stop.asked or distributed.world_size() > 1:
                raise
            self.control.should_training_stop = self.control.should_save = True
            return {}
        finally:
            model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._last_log is not None:
            self._last_log = time.monotonic(), self._total_train_tokens  # leave evaluation out of the training speed
        return metrics

    def _evaluation_metrics(self, model: Any, eval_dataset: Any, prefix: str) -> dict[str, float]:
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["input_ids"]))
        size = self.args.per_device_eval_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        counted = 0
        with torch.no_grad(), self.compute_loss_context_manager(), fsdp.match_forward_passes(model, self._idle_pass):
            for places in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
                batch = self._prepare_input(self.collate([rows[place] for place in places])["batch"])
                losses = batch_token_losses(model, batch)
                total += losses.double().sum()
                counted += len(losses)
        both = torch.stack([total, total.new_full((), counted)])
        loss, tokens = self.accelerator.reduce(both, "sum").tolist()
        metrics = {f"{prefix}_loss": loss / tokens}
        if self.dev_task is not None:
            metrics[DEV_METRIC] = self._score_answers(self.dev_task)
        return metrics

    def save_step_before(self) -> None:
        """Save the last complete step after a stop has cut off the next one, unless it has a checkpoint already."""
        self._log_steps()
        if not is_complete(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _score_answers(self, task: DevTask) -> float:
        """Answer the dev rows, distributed over the processes, and score all answers together."""
        mine = range(self.accelerator.process_index, len(task.requests), self.accelerator.num_processes)
        with fsdp.match_forward_passes(self.model, self._idle_pass):
            own = list(zip(mine, task.answers(self.model, mine), strict=True))
        answers: list[tuple[int, str]] = gather_object(own)
        texts = [text for _, text in sorted(answers)]
        if self.accelerator.is_main_process:
            append_dev_answers(Path(str(self.args.output_dir)), self.state.global_step, task.shown(texts))
        return task.score(texts)

    @torch.no_grad()
    def _idle_pass(self) -> None:
        """Make a pass whose result is dropped."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.accelerator.device)
        model: Any = self.model
        model(input_ids=token, use_cache=False)

    def bytes_held(self) -> list[int] | None:
        """Return the bytes of weights, base and adapter, that each process holds between passes; None without FSDP."""
        return gather_object([fsdp.bytes_held(self.model)]) if self.is_fsdp_enabled else None

    def get_train_dataloader(self) -> Any:
        """Return the data loader of this process's share of every step."""
        batches = self._step_batches(self.args.process_index)
        rows: Any = self.train_dataset
        loader: Any = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # As accelerate prepares loaders, but without distributing batches, which StepBatches has done.
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> DistributedSampler[int]:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return random_order(len(rows), self.args.seed)

    @property
    def _step_rows(self) -> int:
        rows: int = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return rows

    def _step_batches(self, process: int) -> StepBatches:
        rows: Any = self.train_dataset
        return StepBatches(
            rows["input_ids"][:],
            self.args.seed,
            step_rows=self._step_rows,
            micro_batch=self.args.train_batch_size,
            process=process,
            processes=self.args.world_size,
            by_length=self.plain,
        )


def memory_in_use(device: torch.device) -> int:
    """Return the bytes of memory of this process: on a GPU the peak of its tensors, else the resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
