"""The trainer on preference data: the answers of a pair in one pass, and the losses of DPO, ORPO and KTO.

The losses are computed as trl 1.16 computes them. The reference model's log-probabilities are
computed once for each answer before the first step, and kept.

Shapes: L trained tokens, A answers of a batch, P of its training rows (pairs, or with kto answers).
All log-probabilities are natural logarithms, of whole answers unless a name says mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.training import distributed
from tunewright.training.memory import RawRows
from tunewright.training.packing.fused_loss import RewardStatistics, batch_token_losses
from tunewright.training.preference_pairs import PreferenceRows
from tunewright.training.rows import IGNORED, as_columns
from tunewright.training.trainer import Trainer

Row = tuple[list[int], list[int]]
"""Token ids and labels of an answer with its prompt."""

_REFERENCE = "reference.json"


class PreferenceTrainer(Trainer):
    """Trains on chosen and rejected answers.

    A row of the training set is a pair, or with kto an answer; its column ``place`` is its index. Rows of the
    evaluation set are as in `Trainer`: the dev loss is the ideal outputs' loss, as in supervised training.
    """

    def __init__(self, model: Any, *, preferences: PreferenceRows, beta: float, limit: int, **kwargs: Any) -> None:
        self.method = preferences.method
        self._per_row = preferences.answers_per_row
        self.beta = beta
        self.weights = (preferences.desirable_weight, preferences.undesirable_weight)
        self.desirable = preferences.desirable
        columns = as_columns(preferences.rows)
        self.answers: list[Row] = list(zip(columns["input_ids"], columns["labels"], strict=True))
        self.mismatched = _mismatched(preferences, limit) if self.method == "kto" else []
        """With kto, inputs with other inputs' answers, to estimate the divergence from the reference."""
        self.reference: list[float] = []
        """Log-probabilities under the reference of ``answers``, then of ``mismatched``; empty until they are set."""
        self._step_tokens = 0
        """With orpo, the tokens of the chosen rows of the step in progress, all processes together."""
        super().__init__(model, **kwargs)
        self._breakdown = RewardStatistics(self.accelerator.device)

    # The reference model

    @property
    def needs_reference(self) -> bool:
        """True if the loss has a reference model: the adapter as it was before the first step."""
        return self.method != "orpo"

    def log_probabilities(self, advance: Callable[[int], None]) -> list[float]:
        """Return the log-probability of each answer, then of each mismatched one, under the current adapter.

        Answers to one input are neighbours in the order, so their prompt is computed once.
        """
        rows = [*self.answers, *self.mismatched]
        size = self.args.train_batch_size * self._per_row
        order = sorted(range(len(rows)), key=lambda place: rows[place][0])
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        own: list[tuple[int, float]] = []
        with self._frozen():
            for places in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
                own += zip(places, self._sums(self.model, [rows[place] for place in places]).tolist(), strict=True)
                advance(len(places))
        gathered: list[tuple[int, float]] = gather_object(own)
        return [value for _, value in sorted(gathered)]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Compute without gradients and dropout."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield
        finally:
            model.train(was_training)

    def _sums(self, model: Any, rows: Sequence[Row]) -> Tensor:
        """Return the log-probability of each row's trained tokens [A]."""
        labels = [given for _, given in rows]
        batch = self._prepare_input(self.lay_out([ids for ids, _ in rows], labels))
        return _added_up(-batch_token_losses(model, batch), self._prepare_input(_owners(labels)), len(rows))

    # Batches

    def _token_rows(self) -> Sequence[Sequence[int]]:
        ids = [tokens for tokens, _ in self.answers]
        if self.method == "kto":
            return ids
        return [[*chosen, *rejected] for chosen, rejected in zip(ids[::2], ids[1::2], strict=True)]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make one batch of the answers of some training rows: all chosen answers, then all rejected answers.

        transformers counts its labels: one for each training row. No rows make a batch of which nothing is trained.
        """
        if rows and "place" not in rows[0]:
            return super().collate(rows)  # rows of the evaluation set
        places = [int(row["place"]) for row in rows]
        indices = places
        if self.method != "kto":
            indices = [2 * place for place in places] + [2 * place + 1 for place in places]
        answers = [self.answers[index] for index in indices]
        labels = [given for _, given in answers]
        if self.method == "orpo":
            # trl's likelihood of a chosen answer covers its prompt, as the paper's own code does.
            labels[: len(places)] = [ids for ids, _ in answers[: len(places)]]
        if rows:
            laid_out = self.lay_out([ids for ids, _ in answers], labels)
        else:
            shortest = min((ids for ids, _ in self.answers), key=len)
            laid_out = replace(self.lay_out([shortest], [[IGNORED] * len(shortest)]), row_tokens=0)
        counted = torch.zeros(len(places), dtype=torch.long)
        batch = {
            "batch": laid_out,
            "rows": RawRows(tuple(rows)),
            "labels": counted,
            "shift_labels": counted,
            "owner": _owners(labels),
            "indices": torch.tensor(indices, dtype=torch.long),
        }
        if self.method == "orpo":
            batch["in_answer"] = _in_answer(answers, labels)
        if self.reference:
            batch["reference"] = torch.tensor([self.reference[index] for index in indices])
        if self.method == "kto":
            batch["desirable"] = torch.tensor([self.desirable[index] for index in indices], dtype=torch.bool)
        return batch

    def _unlabelled(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        return {name: batch[name] for name in batch if name not in ("labels", "shift_labels", "rows")}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the step's training rows, and the tokens of their chosen answers for ORPO's likelihood."""
        if self.method == "orpo":
            count = sum(_chosen_tokens(batch) for batch in batch_samples)
            if self.accelerator.num_processes > 1:
                count = int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "sum"))
            self._step_tokens = count
        return super()._get_num_items_in_batch(batch_samples, device)

    # Losses

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean loss of the step's training rows, or this micro-batch's part of it."""
        assert not return_outputs, "logits are never kept"
        rows = len(inputs["indices"]) // self._per_row
        divergence = self._divergence(model, inputs) if self.method == "kto" and rows else None
        losses = batch_token_losses(model, inputs["batch"])
        if not rows:
            nothing: Tensor = losses.sum()
            return nothing
        # DDP averages over processes: multiply by their number.
        items = rows if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        if self.method == "orpo":
            return self._orpo(losses, inputs, rows, items)
        sums = _added_up(-losses, inputs["owner"], len(inputs["indices"]))
        reference = inputs["reference"].to(sums)
        self._add_rewards(sums - reference, inputs, rows)
        if divergence is not None:
            each = kto_losses(sums, reference, divergence, inputs["desirable"], self.beta, self.weights)
        else:
            both = torch.stack([reference[:rows], reference[rows:]], dim=1)  # [P, 2]
            each = dpo_losses(sums[:rows], sums[rows:], both, self.beta)
        loss: Tensor = each.sum() / items
        return loss

    def _orpo(self, losses: Tensor, inputs: Mapping[str, Any], rows: int, items: Any) -> Tensor:
        """Return ORPO's loss: the likelihood of the chosen rows, and the odds ratio of the answers.

        ``losses`` are of all tokens of the chosen rows, and of the answers of the rejected ones [L].
        """
        owner, in_answer = inputs["owner"], inputs["in_answer"].to(losses)
        answers = len(inputs["indices"])
        counts = _added_up(in_answer, owner, answers)
        means = _added_up(-losses * in_answer, owner, answers) / counts
        self._add_rewards(means, inputs, rows)
        chosen = (owner < rows).to(losses)
        tokens = self._step_tokens or max(1, _chosen_tokens(inputs))
        likelihood = (losses * chosen).sum() * (self.accelerator.num_processes / tokens)
        loss: Tensor = likelihood + orpo_losses(means[:rows], means[rows:], self.beta).sum() / items
        return loss

    def _divergence(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return KTO's estimate of the divergence from the reference, from mismatched answers; at least 0.

        It is estimated from the rows of this pass, as trl does from a micro-batch. Each process has
        its own estimate: a pass must not wait for other processes, which may make fewer passes.
        """
        places = inputs["indices"].tolist()
        # Not through DDP, whose passes are collective.
        own: Any = self.accelerator.unwrap_model(model)
        with self._frozen():
            found = self._sums(own, [self.mismatched[place] for place in places])
        before = torch.tensor([self.reference[len(self.answers) + place] for place in places]).to(found)
        return (found - before).mean().clamp(min=0)

    def _add_rewards(self, log_ratios: Tensor, inputs: Mapping[str, Any], rows: int) -> None:
        assert isinstance(self._breakdown, RewardStatistics)
        rewards = self.beta * log_ratios.detach()
        if self.method == "kto":
            self._breakdown.add(rewards, inputs["desirable"])
        else:
            self._breakdown.add(rewards, torch.arange(len(rewards), device=rewards.device) < rows)
            self._breakdown.add_pairs(rewards[:rows] > rewards[rows:])


def _owners(labels: Sequence[Sequence[int]]) -> Tensor:
    """Return the row of each trained token, in the order of a packed batch [L]."""
    counts = [sum(label != IGNORED for label in given[1:]) for given in labels]
    return torch.arange(len(labels)).repeat_interleave(torch.tensor(counts, dtype=torch.long))


def _in_answer(answers: Sequence[Row], labels: Sequence[Sequence[int]]) -> Tensor:
    """Return True for trained tokens that belong to an answer, not to its prompt [L]."""
    flags = [
        own != IGNORED
        for (_, given), used in zip(answers, labels, strict=True)
        for own, label in zip(given[1:], used[1:], strict=True)
        if label != IGNORED
    ]
    return torch.tensor(flags, dtype=torch.bool)


def _chosen_tokens(batch: Mapping[str, Any]) -> int:
    """Return the trained tokens of a batch's chosen rows, prompts included."""
    return int((batch["owner"] < len(batch["indices"]) // 2).sum())


def _added_up(values: Tensor, owner: Tensor, rows: int) -> Tensor:
    """Return the sum of each row's tokens [A] from the tokens' values [L]."""
    return values.new_zeros(rows).index_add(0, owner, values)


def _mismatched(preferences: PreferenceRows, limit: int) -> list[Row]:
    """Return each answer's prompt with the answer of the row before it, as trl pairs them.

    An answer to the same input, or an answer that makes the row too long, is passed over.
    """
    rows, members = preferences.rows, preferences.answers.members
    starts = [row.loss_mask.index(True) for row in rows]
    found: list[Row] = []
    for place, row in enumerate(rows):
        prompt = list(row.ids[: starts[place]])
        for step in range(1, len(rows)):
            other = (place - step) % len(rows)
            answer = rows[other].ids[starts[other] :]
            if members[other].key != members[place].key and len(prompt) + len(answer) <= limit:
                mask = [False] * len(prompt) + list(rows[other].loss_mask[starts[other] :])
                ids = [*prompt, *answer]
                found.append((ids, [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]))
                break
        else:
            raise UserError(
                f"KTO needs another input's answer that fits after each prompt in {limit:,} tokens, and one has none",
                where="train.max_length",
                fix="Raise it, or use method: dpo.",
            )
    return found


def dpo_losses(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return DPO's loss of each pair [P]: trl's loss_type ``sigmoid`` (Rafailov et al. 2023, eq. 7).

    All are log-probabilities of answers: chosen and rejected [P], and under the reference model
    both [P, 2].
    """
    return -logsigmoid(beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1])))


def orpo_losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return the odds-ratio term of ORPO's loss for each pair [P] (Hong et al. 2024, eq. 7).

    ``chosen`` and ``rejected`` are mean log-probabilities of the answers' tokens [P].
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, by whichever form is accurate there (Mächler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    # Each branch sees only values for which it and its gradient are finite.
    near = x > -0.6931472
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def kto_losses(
    answers: Tensor, reference: Tensor, divergence: Tensor, desirable: Tensor, beta: float, weights: tuple[float, float]
) -> Tensor:
    """Return KTO's loss of each answer [A] (Ethayarajh et al. 2024, eq. 7).

    ``answers`` and ``reference`` are log-probabilities [A]; ``divergence`` estimates the KL
    divergence from the reference, a scalar of at least 0 without gradient; ``weights`` are the
    factors of good and of bad answers.
    """
    distance = (answers - reference) - divergence
    sign = torch.where(desirable, 1.0, -1.0)
    factor = torch.where(desirable, weights[0], weights[1])
    return factor * (1 - torch.sigmoid(beta * sign * distance))


def set_reference(trainer: PreferenceTrainer, work: Path, identity: str, reporter: Reporter) -> None:
    """Set the reference before the first step: from an earlier part of this run, or the trainer's adapter.

    The working folder keeps the numbers for a run that resumes. ``identity`` is the digest of the
    answers and of the reference model.
    """
    count = len(trainer.answers) + len(trainer.mismatched)
    kept = _kept(work / _REFERENCE, identity, count)
    if kept is None:
        with reporter.task("Reference log-probabilities", count, "answers") as task:
            kept = trainer.log_probabilities(task.advance)
        if distributed.is_main_process():
            write_json(work / _REFERENCE, {"identity": identity, "log_probabilities": kept})
    trainer.reference = kept


def _kept(file: Path, identity: str, count: int) -> list[float] | None:
    """Return the kept numbers; None if there are none for these answers."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("identity") != identity:
        return None
    numbers = found.get("log_probabilities")
    return numbers if isinstance(numbers, list) and len(numbers) == count else None
