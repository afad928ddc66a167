"""Training speed beside trl's, on the same rows of a real task, with the bundled base in bfloat16.

    python benchmarks/train_speed.py [--steps 24] [--long-steps 6] [--only demo instruction long none] [--batch 16]
                                    [--dtype bfloat16]

Four data sets, made of the demo's rows (court names to citations): as they are ("demo"); with an instruction of usual
length ("instruction"); with one that is 300 tokens longer ("long"); and without the shared tokens ("none"). Each side
trains in a process of its own, so that peak memory is its own; rows, seed, LoRA, learning rate, batch and steps are
the same. trl draws an order of its own; "in our order" has it take ours, so that each step is made of the same rows
and the final losses can be compared. Speed is that of the steps after the second. The final loss is that of 64
held-out rows after the last step, each computed alone by transformers; in bfloat16 rounding alone moves it by a few
percent, so whether both sides train alike is for --dtype float32 to tell. Prints tables, and writes JSON to
benchmarks/results/train_speed.json, one data set at a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results") / "train_speed.json"
HELD_OUT = 64
INSTRUCTION = "Give the abbreviation by which legal citations name this court, only the abbreviation, and nothing else."
DATA = {
    "demo": "the demo's rows, 16 shared tokens",
    "instruction": "27 shared tokens",
    "long": "327 shared tokens",
    "none": "nothing shared",
}
SIDES = {
    "tunewright": "tunewright",
    "trl": "trl, its defaults",
    "trl-ordered": "trl, its defaults, in our order",
    "trl-plain": "trl, no checkpointing of activations",
    "trl-padding-free": "trl, padding-free, no checkpointing",
    "trl-packed": "trl, packed (bfd), no checkpointing",
}


def main() -> None:
    """Run every side on every data set."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--long-steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--only", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_side(**json.loads(options.job))))
        return
    results: dict[str, Any] = {"machine": machine(), "batch": options.batch, "data": {}}
    if RESULTS.exists():
        results["data"] = json.loads(RESULTS.read_text())["data"]
    for data in options.only:
        steps = options.long_steps if data == "long" else options.steps
        rows = {}
        for side in options.sides:
            told = {"side": side, "data": data, "steps": steps, "batch": options.batch, "dtype": options.dtype}
            job = json.dumps(told)
            command = [sys.executable, __file__, "--job", job]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[side] = json.loads(done.stdout.splitlines()[-1])
            print(f"{data} {side}: {rows[side]['examples_s']:.2f} examples/s", file=sys.stderr, flush=True)
        key = data if options.dtype == "bfloat16" else f"{data}, {options.dtype}"
        results["data"][key] = {"steps": steps, "sides": rows}
        Console(width=120).print(table(data, steps, rows, options.dtype))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def machine() -> str:
    """The processor, as the kernel names it."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores, Python {platform.python_version()}"


def table(data: str, steps: int, rows: dict[str, dict[str, float]], dtype: str) -> Table:
    """One data set's sides, and how many times as fast tunewright is as each."""
    shown = Table(title=f"{data}: {DATA[data]}, {steps} steps, {dtype}")
    for name in ("side", "examples/s", "tokens/s", "tunewright is", "peak GiB", "final loss"):
        shown.add_column(name, justify="left" if name == "side" else "right")
    ours = rows.get("tunewright")
    for side, row in rows.items():
        ratio = "" if ours is None or side == "tunewright" else f"{ours['examples_s'] / row['examples_s']:.2f}x"
        shown.add_row(
            SIDES[side],
            f"{row['examples_s']:.2f}",
            f"{row['tokens_s']:.0f}",
            ratio,
            f"{row['peak_gib']:.2f}",
            f"{row['final_loss']:.4f}",
        )
    return shown


def rows_of(data: str, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """The data set's first rows: ids and labels."""
    import tunewright
    from tunewright.demo import example_files
    from tunewright.project import RECIPE_FILE, create_project
    from tunewright.training.rows import IGNORED, as_columns, encode_members

    files = example_files("legal-citations")
    if data != "demo":
        files[RECIPE_FILE] = files[RECIPE_FILE].replace("Give the citation abbreviation of this court.", INSTRUCTION)
    with tempfile.TemporaryDirectory() as folder:
        project = create_project(Path(folder) / "project", files)
        road = tunewright.open(project.root)
        road.data.add([project.root / "pairs.jsonl"])
        columns = as_columns(encode_members(road.chat, road.data.version().examples("train"), 2048).rows)
        extra = road.chat.tokenizer("Courts are cited by the abbreviations of the Bluebook. " * 40)["input_ids"][:300]
    ids, labels = columns["input_ids"][:count], columns["labels"][:count]
    if data == "long":
        ids = [[*row[:5], *extra, *row[5:]] for row in ids]
        labels = [[IGNORED] * 300 + row for row in labels]
    shared = sum(len(set(column)) == 1 for column in zip(*ids, strict=False))
    if data == "none":
        ids, labels = [row[shared:] for row in ids], [row[shared:] for row in labels]
    return ids, labels


def run_side(side: str, data: str, steps: int, batch: int, dtype: str) -> dict[str, float]:
    """Train one side in this process."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from tunewright.models.bases import resolve_base
    from tunewright.models.loading import load_model, load_tokenizer
    from tunewright.models.quiet import quiet_transformers
    from tunewright.progress import LogReporter

    ids, labels = rows_of(data, steps * batch + HELD_OUT)
    train, held_out = ({"input_ids": ids[a:b], "labels": labels[a:b]} for a, b in ((HELD_OUT, None), (0, HELD_OUT)))
    base = resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter())
    model = load_model(base, dtype, "none")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets)
    set_seed(0)
    times: list[float] = []
    with quiet_transformers(), tempfile.TemporaryDirectory() as out:
        trainer = build(side, model, load_tokenizer(base), Dataset.from_dict(train), lora, out, batch, dtype)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(step_clock(times))
        trainer.train()
        lengths = [len(row) for row in train["input_ids"]]
        seconds = (times[-1] - times[1]) / (len(times) - 2)
        # Packing makes its own batches: what a step holds is the same on average.
        rows_a_step = len(lengths) / len(times)
        return {
            "examples_s": rows_a_step / seconds,
            "tokens_s": rows_a_step / seconds * sum(lengths) / len(lengths),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "final_loss": held_out_loss(trainer.model, held_out, torch),
        }


def build(side: str, model: Any, tokenizer: Any, rows: Any, lora: Any, out: str, batch: int, dtype: str) -> Any:
    """The side's trainer; what is not named here is trl's default."""
    from trl import SFTConfig, SFTTrainer

    from tunewright.training.order import LikeLengths
    from tunewright.training.trainer import Trainer

    settings: dict[str, Any] = {
        "output_dir": out,
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "seed": 0,
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": None,
        "disable_tqdm": True,
    }
    if side not in ("trl", "trl-ordered"):
        settings["gradient_checkpointing"] = False
    if side == "trl-padding-free":
        settings["padding_free"] = True
    if side == "trl-ordered":
        settings["train_sampling_strategy"] = "sequential"
        rows = rows.select(list(LikeLengths(rows["input_ids"], batch, 0)))
    if side == "trl-packed":
        longest = batch * sum(map(len, rows["input_ids"])) // len(rows)
        settings |= {"packing": True, "max_length": longest, "per_device_train_batch_size": 1}
    arguments: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora}
    if side == "tunewright":
        from tunewright.training.lora import use_fused_lora

        use_fused_lora(lora)
        return Trainer(model, share=True, args=SFTConfig(**settings, remove_unused_columns=False), **arguments)
    return SFTTrainer(model, args=SFTConfig(**settings), **arguments)


def step_clock(times: list[float]) -> Any:
    """Notes when each step ends."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            times.append(time.perf_counter())

    return Clock()


def held_out_loss(model: Any, rows: dict[str, list[list[int]]], torch: Any) -> float:
    """Mean loss of the trained tokens of the held-out rows, one row at a time."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            wanted = torch.tensor(labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            count += int((wanted != -100).sum())
    return total / count


if __name__ == "__main__":
    main()
