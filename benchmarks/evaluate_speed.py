"""Items per second of `evaluate`, before and after tuning, compared with common alternatives.

    python benchmarks/evaluate_speed.py PROJECT [--items 1000] [--round 250] [--sides …] [--threads N]

PROJECT has been trained (`tunewright train`). Its first rows (test, then dev, then training rows) are answered by the
base and by the newest adapter, zero-shot and greedily, to the same limit and end tokens:

    tunewright     as `evaluate` does, journal included
    loop           transformers' generate, one item after the other, as most scripts do
    batched        the same in batches of `evaluate.batch_size`, padded on the left, in the rows' order
    lm-eval        lm-evaluation-harness with a task of its own (`generate_until`), in the same batches; installed into
                   build/lm-eval, on top of this environment's torch and transformers

All use the project's precision; each side is a separate process that loads base and adapter before the clock starts.
The sides alternate round by round, so that other load on the machine affects all of them. A stopped run resumes; more
--items add to it if the rounds are of the same size. Prints a table and writes
benchmarks/results/evaluate_speed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "evaluate_speed.json"
BUILD = ROOT / "build" / "evaluate-speed"
LM_EVAL, LM_EVAL_VERSION = ROOT / "build" / "lm-eval", "0.4.13"
SIDES = {
    "tunewright": "tunewright evaluate",
    "loop": "transformers, one at a time",
    "batched": "transformers, batched",
    "lm-eval": f"lm-eval {LM_EVAL_VERSION}",
}
ARMS = {"base": "before", "adapter": "after"}
Answer = Callable[[str, int, int], list[str]]
"""Arm, first and one past the last item, to their answers."""


def main() -> None:
    """Let the sides answer in alternating rounds, and report the time of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", nargs="?", type=Path)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--round", type=int, default=250)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, json.loads(options.job.read_text()), options.threads)
        return
    job = make_job(options.project, options.items)
    folder = BUILD / job["digest"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    journal = folder / f"rounds-of-{options.round}-on-{options.threads}.jsonl"
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = {(row["side"], row["arm"], row["first"], row["last"]): row for row in known}
    with contextlib.ExitStack() as stack, journal.open("a") as file:
        workers: dict[str, subprocess.Popen[str]] = {}
        for first in range(0, len(job["prompts"]), options.round):
            last = min(first + options.round, len(job["prompts"]))
            for arm in ARMS:
                for side in options.sides:
                    if (side, arm, first, last) in done:
                        continue
                    if side not in workers:
                        workers[side] = stack.enter_context(worker(side, folder / "job.json", options.threads))
                    row = ask(workers[side], {"side": side, "arm": arm, "first": first, "last": last})
                    done[side, arm, first, last] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    figures = f"{side}, {ARMS[arm]}, items {first} to {last}: {row['wall_s']:.1f} s"
                    print(figures, file=sys.stderr, flush=True)
    rows = [row for row in done.values() if row["last"] <= len(job["prompts"])]
    results = summary(rows, job, options.threads)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    Console(width=120).print(table(results))


def make_job(project: Path, items: int) -> dict[str, Any]:
    """Return the prompts and the settings that all sides share."""
    import tunewright
    from tunewright.adapters.registry import find_adapter
    from tunewright.chat.answers import answer_limit
    from tunewright.core.io import digest

    opened = tunewright.open(project)
    adapter, version_ = find_adapter(opened.folder.adapters), opened.data.version()
    members = [m for split in ("test", "dev", "train") for m in version_.domain_of(split)][:items]
    prompts = [list(opened.chat.prompt(m.example.prompt)) for m in members]
    config = opened.folder.config
    decides = {
        "base": str(opened.base.folder),
        "adapter": str(adapter.folder.resolve()),
        "dtype": config.train.dtype,
        "batch_size": config.evaluate.batch_size,
        "max_new_tokens": answer_limit(config, opened.chat, version_.domain_of("train")),
        "stop_ids": sorted(opened.chat.stop_ids),
        "dataset": version_.digest,
    }
    return {
        **decides,
        "digest": digest(decides)[:12],
        "project": str(project.resolve()),
        "prompts": prompts,
        "texts": opened.chat.texts(prompts),
        "end": str(opened.chat.tokenizer.convert_ids_to_tokens(opened.chat.tokenizer.eos_token_id)),
    }


# The sides' processes


@contextlib.contextmanager
def worker(side: str, job: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process that has loaded the model and answers as this side does."""
    python = lm_eval_python() if side == "lm-eval" else sys.executable
    command = [python, __file__, "--worker", side, "--job", str(job), "--threads", str(threads)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", f"{side} did not start"
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[str], what: dict[str, Any]) -> dict[str, Any]:
    """Run one round of one side and arm; return the answers and their time."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()
    return {**what, **json.loads(process.stdout.readline())}


def work(side: str, job: dict[str, Any], threads: int) -> None:
    """Answer rounds until the input ends; output of libraries goes to stderr."""
    import torch

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    makers = {"tunewright": with_tunewright, "lm-eval": with_lm_eval}
    with tempfile.TemporaryDirectory() as folder:
        answer = (
            makers[side](job, Path(folder)) if side in makers else with_transformers(job, batched=side == "batched")
        )
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            wall, cpu = time.perf_counter(), time.process_time()
            answers = answer(asked["arm"], asked["first"], asked["last"])
            figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "answers": answers}
            print(json.dumps(figures), file=out, flush=True)


def with_tunewright(job: dict[str, Any], folder: Path) -> Answer:
    """Answer as `evaluate` does, with an empty journal."""
    import tunewright
    from tunewright.adapters.registry import find_adapter
    from tunewright.core.progress import LogReporter
    from tunewright.evaluation.generations import Generator

    opened = tunewright.open(Path(job["project"]))
    adapter = find_adapter(opened.folder.adapters)
    generator = Generator(opened.base, opened.chat, job["dtype"], "none", job["batch_size"], folder, LogReporter())
    generator.model_with(adapter)

    def answer(arm: str, first: int, last: int) -> list[str]:
        prompts = [tuple(ids) for ids in job["prompts"][first:last]]
        answers = generator.answer(arm, prompts, job["max_new_tokens"], adapter if arm == "adapter" else None)
        return [generation.text for generation in answers]

    return answer


def with_transformers(job: dict[str, Any], *, batched: bool) -> Answer:
    """Answer with transformers' generate; the adapter is switched off for the base's answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["base"], padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    model: Any = PeftModel.from_pretrained(loaded, job["adapter"]).eval()
    size = job["batch_size"] if batched else 1

    @torch.inference_mode()
    def answer(arm: str, first: int, last: int) -> list[str]:
        texts = []
        for start in range(first, last, size):
            batch = tokenizer.pad({"input_ids": job["prompts"][start : min(start + size, last)]}, return_tensors="pt")
            with model.disable_adapter() if arm == "base" else contextlib.nullcontext():
                whole = model.generate(
                    **batch,
                    max_new_tokens=job["max_new_tokens"],
                    do_sample=False,
                    eos_token_id=job["stop_ids"],
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts += tokenizer.batch_decode(whole[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    return answer


def with_lm_eval(job: dict[str, Any], folder: Path) -> Answer:
    """Answer with lm-eval: a task for each round, with its own loading of base and adapter."""
    import torch
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    shared: dict[str, Any] = {"pretrained": job["base"], "dtype": job["dtype"], "device": "cpu"}
    shared["batch_size"] = job["batch_size"]
    models = {"base": HFLM(**shared), "adapter": HFLM(**shared, peft=job["adapter"])}
    assert all(not lm.model.training for lm in models.values())
    assert [models["base"].tok_encode(text) for text in job["texts"]] == job["prompts"], "the prompts' tokens differ"

    def answer(arm: str, first: int, last: int) -> list[str]:
        task = task_of(job, folder, first, last)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        with torch.inference_mode():
            results: Any = evaluator.simple_evaluate(
                model=models[arm], tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True
            )
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        return [sample["resps"][0][0] for sample in samples]

    return answer


def task_of(job: dict[str, Any], folder: Path, first: int, last: int) -> str:
    """Write a task over these items, and return its name."""
    name = f"items_{first}_{last}"
    rows = ({"prompt": text, "reference": ""} for text in job["texts"][first:last])
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{reference}}",
        "generation_kwargs": {"until": [job["end"]], "max_gen_toks": job["max_new_tokens"], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return name


def lm_eval_python() -> str:
    """Return the Python of an environment with lm-eval, created at first use on top of this one's packages."""
    python = LM_EVAL / "bin" / "python"
    wanted = LM_EVAL / f"has-{LM_EVAL_VERSION}"
    if not wanted.exists():
        venv.create(LM_EVAL, with_pip=True, clear=True)
        (site,) = LM_EVAL.glob("lib/python*/site-packages")
        (site / "this.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", f"lm-eval=={LM_EVAL_VERSION}"], check=True, stdout=2)
        wanted.touch()
    return str(python)


# What came out


def summary(rows: list[dict[str, Any]], job: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return each side's speed over all arms, and how many of its answers equal the loop's."""
    sides: dict[str, Any] = {}
    answers = {(row["side"], row["arm"], row["first"]): row["answers"] for row in rows}
    for side in SIDES:
        own = [row for row in rows if row["side"] == side]
        if not own:
            continue
        count = sum(len(row["answers"]) for row in own)
        figures: dict[str, Any] = {"answers": count, "arms": {}}
        for name, given in {"both": own, **{arm: [r for r in own if r["arm"] == arm] for arm in ARMS}}.items():
            number = sum(len(row["answers"]) for row in given)
            wall, cpu = (sum(row[unit] for row in given) for unit in ("wall_s", "cpu_s"))
            figures["arms"][name] = {
                "wall_s": wall,
                "cpu_s": cpu,
                "items_s": number / wall,
                "items_cpu_s": number / cpu,
            }
        compared = [
            (mine.strip(), theirs.strip())
            for row in own
            for mine, theirs in zip(row["answers"], answers.get(("loop", row["arm"], row["first"]), ()), strict=False)
        ]
        figures["as_the_loop"] = sum(a == b for a, b in compared)
        figures["compared"] = len(compared)
        sides[side] = figures
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "machine": f"{names[0].strip()}, {len(names)} cores, Python {platform.python_version()}",
        "threads": threads,
        "load": os.getloadavg(),
        "items": max(row["last"] for row in rows),
        **{key: job[key] for key in ("dtype", "batch_size", "max_new_tokens")},
        "versions": {name: version(name) for name in ("tunewright", "torch", "transformers", "peft")},
        "sides": sides,
    }


def table(results: dict[str, Any]) -> Table:
    """Return the sides' speeds and tunewright's speedup over each."""
    shown = Table(
        title=f"{results['items']} items before and after tuning, at most {results['max_new_tokens']} tokens, "
        f"{results['dtype']}, {results['threads']} threads"
    )
    for name in ("side", "items/s", "before", "after", "tunewright is", "by CPU time", "answers as the loop's"):
        shown.add_column(name, justify="left" if name == "side" else "right")
    ours = results["sides"].get("tunewright", {}).get("arms")
    for side, figures in results["sides"].items():
        arms = figures["arms"]
        ratios = ["", ""]
        if ours and side != "tunewright":
            ratios = [f"{ours['both'][unit] / arms['both'][unit]:.2f}x" for unit in ("items_s", "items_cpu_s")]
        speeds = [f"{arms[arm]['items_s']:.2f}" for arm in ("both", *ARMS)]
        shown.add_row(SIDES[side], *speeds, *ratios, f"{figures['as_the_loop']} of {figures['compared']}")
    return shown


if __name__ == "__main__":
    main()
