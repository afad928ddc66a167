"""Decoded tokens per second by the loop that evaluation uses, at several batch sizes, greedy and sampled."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from gpu_cases.bases import build, shape_of
from gpu_cases.reporting import Report, host_syncs, synchronize
from gpu_cases.training import RANK, TARGETS
from tunewright.generation.decoding import Batch
from tunewright.generation.requests import Request

PROMPT, ANSWER = 256, 32
TOY_PROMPT, TOY_ANSWER = 12, 4
ADAPTERS = 4


def run(report: Report, toy: bool) -> None:
    """Measure 8B shape in bfloat16: 1, 16 and 64 rows with one adapter, then rows of several adapters."""
    shape = shape_of("8b", toy)
    model = _with_adapters(build(shape, nf4=False))
    torch.manual_seed(0)
    for rows in (1, 2, 4) if toy else (1, 16, 64):
        for top_p in (None, 0.9):
            measure(report, model, shape.vocabulary, rows, ["adapter-0"], top_p, toy=toy)
    names = [f"adapter-{number}" for number in range(ADAPTERS)]
    measure(report, model, shape.vocabulary, 4 if toy else 16, names, None, toy=toy)


def _with_adapters(base: Any) -> Any:
    """Put several adapters with random weights on the base."""
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))

    model: Any = get_peft_model(base, config(), adapter_name="adapter-0")
    for number in range(1, ADAPTERS):
        model.add_adapter(f"adapter-{number}", config())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model.eval()


def measure(
    report: Report, model: Any, vocabulary: int, rows: int, adapters: list[str], top_p: float | None, *, toy: bool
) -> None:
    """Report the tokens per second of ``rows`` rows that take the adapters in turn."""
    length, answer = (TOY_PROMPT, TOY_ANSWER) if toy else (PROMPT, ANSWER)
    prompts = torch.randint(5, vocabulary, (rows, length)).tolist()
    requests = [
        Request(
            tuple(prompt),
            adapters[row % len(adapters)],
            # The first two tokens, the timed ones, and one more so that no row leaves while its batch is measured.
            answer + 4,
            temperature=0.0 if top_p is None else 0.8,
            top_p=top_p or 1.0,
            seed=None if top_p is None else row,
        )
        for row, prompt in enumerate(prompts)
    ]
    batch = Batch(model, stop_ids=(), pad_id=0, mixed=len(adapters) > 1)

    def seconds_of(work: Callable[[], object]) -> float:
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - began

    reading = seconds_of(lambda: batch.admit(requests))
    batch.step()
    step = median(seconds_of(batch.step) for _ in range(answer))
    with host_syncs() as waits:
        batch.step()
    assert len(batch.rows) == rows, "every row decodes to the end"
    how = "greedy" if top_p is None else f"top_p {top_p}"
    report(
        f"{rows} rows, {len(adapters)} adapter{'s' * (len(adapters) > 1)}, {how}",
        rows=rows,
        adapters=len(adapters),
        top_p=top_p,
        prompt_s=reading,
        step_s=step,
        tokens_s=rows / step,
        host_syncs=len(waits) if torch.cuda.is_available() else None,
    )
