"""Training and dev answers where memory runs out: both halve their rows, and end with every result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gpu_cases.bases import build, shape_of, tokenizer
from gpu_cases.reporting import Report, Skipped
from gpu_cases.training import LOADS, RANK, TARGETS, TOY_LOADS, same_length_rows, train_ours
from tunewright.core.progress import LogReporter
from tunewright.generation.generate import BatchSize, generate_halving
from tunewright.generation.requests import Request
from tunewright.models.memory_estimate import TrainingSetup, estimate

LAYERS = 4
ROWS, PROMPT, ANSWER = 64, 900, 16


@dataclass
class Warned(LogReporter):
    """Keeps the warnings that a user reads about the halving."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message)


def run(report: Report, toy: bool, *, what: str) -> None:
    """Limit this process to a share of the card that all rows at once do not fit into."""
    if not torch.cuda.is_available():
        raise Skipped("memory can be limited on a CUDA card only")
    (_training if what == "training" else _dev_answers)(report, toy)


def _training(report: Report, toy: bool) -> None:
    load = (TOY_LOADS if toy else LOADS)["shared"]
    size = shape_of("8b", toy, layers=LAYERS)
    rows = same_length_rows(size, load) * 8
    free = train_ours(size, rows, len(rows), 4, nf4=False)
    needed = torch.cuda.max_memory_allocated()
    weights = estimate(size, TrainingSetup(TARGETS, RANK, card=True), load).weights
    limited = weights + (needed - weights) // 2
    _limit(limited)
    halved = train_ours(size, rows, len(rows), 4, nf4=False)
    apart = max(abs(a - b) / b for a, b in zip(halved.losses, free.losses, strict=True))
    report(
        "rows halved",
        halved.micro_batch < free.micro_batch and apart < 0.01,
        bytes_needed=needed,
        bytes_allowed=limited,
        rows=free.micro_batch,
        rows_halved=halved.micro_batch,
        largest_relative_difference=apart,
    )


def _dev_answers(report: Report, toy: bool) -> None:
    from peft import LoraConfig, get_peft_model

    size = shape_of("8b", toy, layers=LAYERS)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
    model = get_peft_model(build(size, nf4=False), lora).eval()
    pad = tokenizer().pad_token_id
    prompts = torch.randint(5, size.vocabulary, (ROWS, PROMPT)).tolist()
    requests = [Request(tuple(prompt), "default", ANSWER) for prompt in prompts]

    def answers(rows: int) -> tuple[list[tuple[int, ...]], int, list[str]]:
        torch.cuda.reset_peak_memory_stats()
        batch, reporter = BatchSize(rows), Warned()
        completions = generate_halving(model, requests, batch, reporter, stop_ids=(), pad_id=pad)
        return [each.ids for each in completions], batch.rows, reporter.warnings

    free, _, _ = answers(ROWS)
    needed, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    _limit(held + (needed - held) // 3)
    halved, rows, warnings = answers(ROWS)
    equal = sum(a == b for a, b in zip(free, halved, strict=True))
    # Batches of other sizes round differently, so a few answers of random weights may differ.
    report(
        "every row answered",
        rows < ROWS and len(halved) == ROWS and bool(warnings),
        bytes_needed=needed,
        rows=ROWS,
        rows_halved=rows,
        equal_answers=equal,
        warning=warnings[0] if warnings else None,
    )


def _limit(count: int) -> None:
    """Limit this process to ``count`` bytes of the card."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(count / torch.cuda.get_device_properties(0).total_memory)
