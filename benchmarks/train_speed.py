"""Time to the quality that trl ends with: whole training runs of both, on the same rows of a real task.

    python benchmarks/train_speed.py [--only demo long instruction none] [--sides tunewright trl …] [--seeds 3]
                                     [--epochs 2] [--rows N] [--dtype bfloat16] [--out FILE]

Each side trains the bundled base with LoRA on all linear layers: the same rows, seed, learning rate, schedule, batch
and number of steps. Each process trains one side with one seed. The clock stops while dev is measured, at equal
distances over the run: the mean loss of its trained tokens, each row computed alone by transformers, and the share of
answers, decoded greedily, that match exactly.

A side has reached trl's quality at its first measurement whose dev loss is at most 1% above the one that trl ends with
and whose dev score is at most a point below (all of them means over the seeds). The first column is trl's whole time
divided by the time to there. The data sets are the demo's rows (court names to citations): unchanged ("demo"), with
an instruction of usual length ("instruction"), with one that is 300 tokens longer ("long"), and without the shared
tokens ("none"). Every finished run is written to the results file at once, and a second call runs what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results") / "train_speed.json"
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
    "trl-plain": "trl, no checkpointing of activations",
    "trl-padding-free": "trl, padding-free, no checkpointing",
    "trl-packed": "trl, packed (bfd), no checkpointing",
}
BATCH = 16
LEARNING_RATE = 1e-3
NEAR_LOSS = 1.01
NEAR_SCORE = 0.01
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Rows = dict[str, list[list[int]]]
Run = dict[str, Any]


def main() -> None:
    """Train every side with every seed on every data set, and print a table for each data set."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=["demo", "long"], choices=list(DATA))
    parser.add_argument("--sides", nargs="*", default=["tunewright", "trl"], choices=list(SIDES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, help="training rows (default: all)")
    parser.add_argument("--dev-rows", type=int, help="dev rows (default: all)")
    parser.add_argument("--measurements", type=int, default=8, help="of dev in each run, the one at its end included")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(train_one(**json.loads(options.job))))
        return
    names = ("epochs", "rows", "dev_rows", "measurements", "dtype")
    settings = {name: getattr(options, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for data in options.only:
            file = Path(folder) / f"{data}.json"
            write_rows(file, data, options.rows, options.dev_rows)
            for seed in range(options.seeds):
                # The sides of a seed follow each other, so that a change of the machine's speed meets both.
                for side in options.sides:
                    job = {"side": side, "rows_file": str(file), "seed": seed, "measurements": options.measurements}
                    job |= {"epochs": options.epochs, "dtype": options.dtype}
                    finish(options.out, data, settings, job)
            shown = [run for run in runs_of(options.out, data, settings) if run["side"] in options.sides]
            Console(width=150).print(table(data, settings, shown))


def finish(out: Path, data: str, settings: dict[str, Any], job: dict[str, Any]) -> None:
    """Run in a separate process and store the result, unless it exists."""
    if any((run["side"], run["seed"]) == (job["side"], job["seed"]) for run in runs_of(out, data, settings)):
        return
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    run: Run = {**json.loads(done.stdout.splitlines()[-1]), "data": data, "settings": settings, "machine": machine()}
    last = run["measured"][-1]
    summary = f"{run['seconds']:.0f} s, dev loss {last['loss']:.4f}, score {last['score']:.1%}"
    print(f"{data} {run['side']} seed {run['seed']}: {summary}", file=sys.stderr, flush=True)
    runs = json.loads(out.read_text())["runs"] if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n")


def runs_of(out: Path, data: str, settings: dict[str, Any]) -> list[Run]:
    """Return the finished runs of a data set with these settings on this machine."""
    runs = json.loads(out.read_text())["runs"] if out.exists() else []
    wanted = (data, settings, machine())
    return [run for run in runs if (run["data"], run["settings"], run["machine"]) == wanted]


def machine() -> str:
    """Return the processor as the kernel names it."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores, Python {platform.python_version()}"


def table(data: str, settings: dict[str, Any], runs: Sequence[Run]) -> Table:
    """Return one data set's sides, each a mean over its seeds."""
    by_side = {side: [run for run in runs if run["side"] == side] for side in SIDES}
    by_side = {side: own for side, own in by_side.items() if own}
    seeds, steps = len(by_side["trl"]), by_side["trl"][0]["steps"]
    shown = Table(title=f"{data}: {DATA[data]}, {steps} steps, {settings['dtype']}, {seeds} seeds; {machine()}")
    for name in ("side", "to trl's quality", "examples/s", "ratio", "dev loss", "of trl's", "dev score, %", "peak GiB"):
        shown.add_column(name, justify="left" if name == "side" else "right")
    goal_loss, goal_score = (mean(run["measured"][-1][key] for run in by_side["trl"]) for key in ("loss", "score"))
    trl_s = mean(run["seconds"] for run in by_side["trl"])
    trl_speed = mean(run["examples_s"] for run in by_side["trl"])
    for side, own in by_side.items():
        reached = time_to(own, goal_loss * NEAR_LOSS, goal_score - NEAR_SCORE)
        final = [run["measured"][-1] for run in own]
        losses = [each["loss"] for each in final]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        speed = mean(run["examples_s"] for run in own)
        shown.add_row(
            SIDES[side],
            "not reached" if reached is None else f"{trl_s / reached:.2f}x ({reached:.0f} s)",
            f"{speed:.2f}",
            f"{speed / trl_speed:.2f}x",
            f"{mean(losses):.4f}{spread}",
            f"{mean(losses) / goal_loss:.3f}",
            f"{100 * mean(each['score'] for each in final):.1f}",
            f"{max(run['peak_gib'] for run in own):.2f}",
        )
    return shown


def time_to(runs: Sequence[Run], loss: float, score: float) -> float | None:
    """Return the mean seconds of training to the first measurement that reaches both; None where none does."""
    for at_step in zip(*(run["measured"] for run in runs), strict=True):
        if mean(each["loss"] for each in at_step) <= loss and mean(each["score"] for each in at_step) >= score:
            return float(mean(each["seconds"] for each in at_step))
    return None


def write_rows(file: Path, data: str, train_rows: int | None, dev_rows: int | None) -> None:
    """Write the data set's train and dev rows, as ids and labels, and the tokens that end an answer."""
    import tunewright
    from tunewright import examples
    from tunewright.config.project import CONFIG_FILE, create_project
    from tunewright.training.rows import IGNORED, as_columns, encode_members

    files = examples.project_files()
    if data != "demo":
        files[CONFIG_FILE] = files[CONFIG_FILE].replace("Give the citation abbreviation of this court.", INSTRUCTION)
    written: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        project = create_project(Path(folder) / "project", files)
        opened = tunewright.open(project.root)
        opened.data.add([project.root / "pairs.jsonl"])
        extra = opened.chat.tokenizer("Courts are cited by the abbreviations of the Bluebook. " * 40)["input_ids"][:300]
        written["stop_ids"] = sorted(opened.chat.stop_ids)
        version = opened.data.version()
        for split, members, count in (
            ("train", version.examples("train"), train_rows),
            ("dev", version.examples("dev"), dev_rows),
        ):
            columns = as_columns(encode_members(opened.chat, members, 2048).rows)
            written[split] = {name: columns[name][:count] for name in ("input_ids", "labels")}
    shared = sum(len(set(column)) == 1 for column in zip(*written["train"]["input_ids"], strict=False))
    for split in ("train", "dev"):
        ids, labels = written[split]["input_ids"], written[split]["labels"]
        if data == "long":
            ids = [[*row[:5], *extra, *row[5:]] for row in ids]
            labels = [[IGNORED] * 300 + row for row in labels]
        if data == "none":
            ids, labels = [row[shared:] for row in ids], [row[shared:] for row in labels]
        written[split] = {"input_ids": ids, "labels": labels}
    file.write_text(json.dumps(written))


def train_one(side: str, rows_file: str, seed: int, epochs: int, measurements: int, dtype: str) -> Run:
    """Train one side with one seed in this process."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from tunewright.core.progress import LogReporter
    from tunewright.models import quiet_transformers
    from tunewright.models.bases import resolve_base
    from tunewright.models.loading import load_model, load_tokenizer

    rows = json.loads(Path(rows_file).read_text())
    base = resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter())
    model = load_model(base, dtype, "none")
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=TARGETS)
    set_seed(seed)
    with quiet_transformers(), tempfile.TemporaryDirectory() as out:
        steps = epochs * math.ceil(len(rows["train"]["input_ids"]) / BATCH)
        arguments = settings(side, out, seed, epochs, steps, dtype)
        trainer = build(side, model, load_tokenizer(base), Dataset.from_dict(rows["train"]), lora, arguments)
        trainer.remove_callback(PrinterCallback)
        stop_ids = rows["stop_ids"]
        clock = Clock(lambda: measure(trainer.model, rows["dev"], stop_ids), measurements)
        trainer.add_callback(clock.callback())
        trainer.train()
    return {
        "side": side,
        "seed": seed,
        "steps": len(clock.step_s),
        "seconds": sum(clock.step_s),
        # Of the steps after the second, which are those of a warm machine. Packing makes its own batches.
        "examples_s": epochs * len(rows["train"]["input_ids"]) / len(clock.step_s) / mean(clock.step_s[2:]),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "measured": clock.measured,
    }


def settings(side: str, out: str, seed: int, epochs: int, steps: int, dtype: str) -> dict[str, Any]:
    """Return the arguments of trl's SFTConfig; others keep trl's defaults."""
    chosen: dict[str, Any] = {
        "output_dir": out,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": epochs,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(0.1 * steps),
        "weight_decay": 0.0,
        "seed": seed,
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": None,
        "disable_tqdm": True,
    }
    if side != "trl":
        chosen["gradient_checkpointing"] = False
    if side == "trl-padding-free":
        chosen["padding_free"] = True
    return chosen


def build(side: str, model: Any, tokenizer: Any, rows: Any, lora: Any, arguments: dict[str, Any]) -> Any:
    """Return the side's trainer."""
    from trl import SFTConfig, SFTTrainer

    if side == "tunewright":
        from tunewright.training.lora import use_fused_lora
        from tunewright.training.trainer import Trainer

        use_fused_lora(lora)
        own = SFTConfig(**arguments, remove_unused_columns=False)
        return Trainer(model, share=True, args=own, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    if side == "trl-packed":
        longest = BATCH * sum(map(len, rows["input_ids"])) // len(rows)
        arguments = {**arguments, "packing": True, "max_length": longest, "per_device_train_batch_size": 1}
    config = SFTConfig(**arguments)
    return SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


class Clock:
    """Timer of each step that measures dev between steps while the clock stands still.

    Args:
        measure: measures the current model.
        measurements: number of measurements in the run.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], measurements: int) -> None:
        self.measure = measure
        self.measurements = measurements
        self.step_s: list[float] = []
        self.measured: list[dict[str, float]] = []

    def callback(self) -> Any:
        """Return the callback for transformers' trainer."""
        from transformers import TrainerCallback

        clock = self

        class Timing(TrainerCallback):
            began = 0.0

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
                self.began = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
                clock.step_s.append(time.perf_counter() - self.began)
                done, steps = state.global_step, state.max_steps
                if done * clock.measurements // steps > (done - 1) * clock.measurements // steps:
                    clock.measured.append({"step": done, "seconds": sum(clock.step_s), **clock.measure()})
                self.began = time.perf_counter()

        return Timing()


def measure(model: Any, rows: Rows, stop_ids: Sequence[int]) -> dict[str, float]:
    """Return the mean loss of the rows' trained tokens, and the share of greedy answers that match exactly."""
    import torch

    from tunewright.generation.generate import generate
    from tunewright.generation.requests import Request

    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    requests, wanted = [], []
    with torch.inference_mode():
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            targets = torch.tensor(labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != -100).sum())
            first = next(place for place, label in enumerate(labels) if label != -100)
            answer = [label for label in labels[first:] if label not in (-100, *stop_ids)]
            requests.append(Request(tuple(ids[:first]), "default", len(answer) + 1))
            wanted.append(tuple(answer))
    answers = generate(model, requests, stop_ids=stop_ids, pad_id=stop_ids[0], batch_size=32)
    model.train(was_training)
    right = sum(a.ids == w and a.finish == "stop" for a, w in zip(answers, wanted, strict=True))
    return {"loss": total / count, "score": right / len(wanted)}


if __name__ == "__main__":
    main()
