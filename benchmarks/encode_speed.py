"""Rows per second from conversations to tokens and labels: tunewright and trl's tokenisation of the same rows.

    python benchmarks/encode_speed.py [BASE] [banking77/train.csv ...]

BASE is a base as a config names it (the bundled one by default). Without files the rows are the example project's
pairs. All are numbered, so that they are distinct. Then one call of ``tunewright.chat.encode`` with a tokenizer whose
format is kept from the call before, and the same with the format made for each call. Prints a table and one JSON line;
the best of three runs counts.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from tunewright.chat import ChatFormat, chat_format, encode, open_chat
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.examples import PAIRS_FILE, project_files
from tunewright.models import quiet_transformers
from tunewright.models.bases import resolve_base
from tunewright.training.rows import as_columns, encode_members

ROWS = 10_000
RUNS = 3


def main(base_spec: str, files: Sequence[str]) -> None:
    """Measure all sides in one run."""
    disable_caching()
    disable_progress_bars()
    chat = open_chat(resolve_base(base_spec, None, Path(), LogReporter()))
    pairs = list(islice(cycle(_pairs(files)), ROWS))
    system = "Give the citation abbreviation of this court."
    examples = [
        Example((Message("system", system), Message("user", f"{prompt} ({n})"), Message("assistant", completion)))
        for n, (prompt, completion) in enumerate(pairs)
    ]
    members = [Member(example, str(n), "train", str(n)) for n, example in enumerate(examples)]
    ways: dict[str, Callable[[], float]] = {
        "trl, SFTTrainer's own": lambda: _trl(chat, examples),
        "ours, checked, as a Dataset": lambda: _timed(
            lambda: Dataset.from_dict(as_columns(encode_members(chat, members, 2**20).rows))
        ),
        "ours, encode() row by row": lambda: _timed(lambda: [chat.encode(e.messages) for e in examples]),
    }
    rates = {name: ROWS / min(run() for _ in range(RUNS)) for name, run in ways.items()}
    trl = rates["trl, SFTTrainer's own"]
    tokens = sum(len(chat.encode(example.messages).ids) for example in examples)
    print(f"{ROWS:,} rows of {tokens / ROWS:.0f} tokens on average, {base_spec}")
    print(f"{'':<30} {'rows/s':>8} {'ratio':>6}")
    for name, rate in rates.items():
        print(f"{name:<30} {rate:>8,.0f} {rate / trl:>6.2f}")
    calls = _one_call(chat, examples[0])
    print(f"one call of encode(): format kept {calls['kept_ms']:.2f} ms, format made {calls['made_ms']:,.0f} ms")
    print(json.dumps({"rows": ROWS, "tokens": tokens, "base": base_spec, "rows_per_second": rates, "one_call": calls}))


def _one_call(chat: ChatFormat, example: Example) -> dict[str, float]:
    """Return the milliseconds of encoding one conversation with a tokenizer."""

    def made() -> None:
        fresh = chat_format(chat.tokenizer, stop_ids=chat.stop_ids, kind="own", today=chat.template.today)
        fresh.encode(example.messages)

    def kept() -> None:
        for _ in range(100):
            encode(chat.tokenizer, example.messages)

    kept()
    return {
        "kept_ms": 10 * min(_timed(kept) for _ in range(RUNS)),
        "made_ms": 1000 * min(_timed(made) for _ in range(RUNS)),
    }


def _pairs(files: Sequence[str]) -> list[tuple[str, str]]:
    if not files:
        rows = [json.loads(line) for line in project_files()[PAIRS_FILE].splitlines()]
        return [(row["prompt"], row["completion"]) for row in rows]
    return [
        (row["text"], row["category"])
        for file in files
        for row in csv.DictReader(Path(file).read_text(encoding="utf-8").splitlines(keepends=True))
    ]


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class _TimedTrainer(SFTTrainer):
    """A trainer that measures only the preparation of the dataset."""

    seconds = 0.0

    def _prepare_dataset(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **options)
        self.seconds += time.perf_counter() - began
        return prepared


def _trl(chat: ChatFormat, examples: Sequence[Example]) -> float:
    turns = [[{"role": m.role, "content": m.content} for m in e.messages] for e in examples]
    dataset = Dataset.from_dict({"prompt": [t[:-1] for t in turns], "completion": [t[-1:] for t in turns]})
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(chat.tokenizer), hidden_size=64, intermediate_size=8, num_hidden_layers=1)
    )
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        trainer = _TimedTrainer(
            model=model,
            args=SFTConfig(output_dir=folder, max_length=None, report_to="none", use_cpu=True, bf16=False),
            train_dataset=dataset,
            processing_class=chat.tokenizer,
        )
    return trainer.seconds


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bundled:smollm2-135m-instruct", sys.argv[2:])
