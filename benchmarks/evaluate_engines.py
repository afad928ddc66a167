"""Answers per second of evaluation's two engines on the same prompts, and the share of equal answers.

    python benchmarks/evaluate_engines.py PROJECT [--items 200] [--dtype float32] [--rounds 2] [--threads N]

PROJECT has been trained (`tunewright train`), and `tunewright engine install vllm` has made vLLM's environment. Its
first rows (test, then dev, then training rows) are answered by the base and by the newest adapter, zero-shot and
greedily, as `evaluate` answers them: by peft and by vLLM, in alternating rounds. Every round is answered from
scratch. Loading the base and starting vLLM are timed separately, since an evaluation does them once.

Prints a table and writes benchmarks/results/evaluate_engines.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tunewright
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.chat.answers import answer_limit, stop_strings
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.choice import EMBEDDED, AnswerEngine
from tunewright.evaluation.generations import Generator, Prompt
from tunewright.generation.requests import Completion

RESULTS = Path(__file__).with_name("results") / "evaluate_engines.json"


def main() -> None:
    """Let both engines answer in alternating rounds, and report speed and equality."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # vLLM's process inherits it

    project = tunewright.open(options.project)
    adapter, rows = find_adapter(project.folder.adapters), project.data.version()
    members = [m for split in ("test", "dev", "train") for m in rows.domain_of(split)][: options.items]
    prompts = [project.chat.prompt(m.example.prompt) for m in members]
    config = project.folder.config
    limit = answer_limit(config, project.chat, rows.domain_of("train"))
    engines = EMBEDDED, AnswerEngine("vllm", "it is measured", environment.find(environment.VLLM))
    generators: dict[str, Generator] = {
        engine.name: Generator(
            project.base,
            project.chat,
            options.dtype,
            "none",
            config.evaluate.batch_size,
            project.folder.work,
            LogReporter(),
            stop=stop_strings(config, project.chat),
            engine=engine,
            rank=config.train.lora_r,
        )
        for engine in engines
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    answers: dict[str, dict[str, list[Completion]]] = {}
    starts: dict[str, float] = {}
    for name, generator in generators.items():
        began = time.perf_counter()
        answer(generator, prompts[:2], limit, adapter, "start")
        starts[name] = time.perf_counter() - began
    for number in range(options.rounds):
        for name, generator in generators.items():
            for arm, asked in (("base", None), ("adapter", adapter)):
                began = time.perf_counter()
                given = answer(generator, prompts, limit, asked, f"round {number}")
                seconds.setdefault(name, {}).setdefault(arm, []).append(time.perf_counter() - began)
                answers.setdefault(name, {})[arm] = given
    results = summary(options, generators, starts, seconds, answers, limit)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    Console(width=120).print(table(results))


def answer(
    generator: Generator, prompts: list[Prompt], limit: int, adapter: Adapter | None, company: str
) -> list[Completion]:
    """Answer without the journal and without the prefix cache of earlier rounds."""
    return generator.generate(generator.requests(prompts, limit, adapter), adapter=adapter, company=company)


def summary(
    options: argparse.Namespace,
    generators: dict[str, Generator],
    starts: dict[str, float],
    seconds: dict[str, dict[str, list[float]]],
    answers: dict[str, dict[str, list[Completion]]],
    limit: int,
) -> dict[str, Any]:
    """Return speeds by engine and arm, and equal answers by arm."""
    cores = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    count = len(answers["peft"]["base"])
    equal = {
        arm: sum(a.ids == b.ids for a, b in zip(answers["peft"][arm], answers["vllm"][arm], strict=True)) / count
        for arm in ("base", "adapter")
    }
    return {
        "machine": card or f"{cores[0].strip()}, {len(cores)} cores, Python {platform.python_version()}",
        "load": os.getloadavg(),
        "threads": options.threads,
        "items": count,
        "dtype": options.dtype,
        "max_new_tokens": limit,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "engines": {
            name: {
                "used": generator.used.model_dump(mode="json"),
                "start_s": starts[name],
                "seconds": seconds[name],
                "answers_s": {arm: count / min(each) for arm, each in seconds[name].items()},
            }
            for name, generator in generators.items()
        },
        "equal": equal,
    }


def table(results: dict[str, Any]) -> Table:
    """Return a row for each arm: both engines' speed, their ratio and the share of equal answers."""
    shown = Table(
        title=f"{results['items']} prompts, at most {results['max_new_tokens']} tokens, {results['dtype']}, "
        f"{results['threads']} threads; best of {len(results['engines']['peft']['seconds']['base'])} rounds"
    )
    for name in ("arm", "peft, answers/s", "vllm, answers/s", "vllm is", "equal answers"):
        shown.add_column(name, justify="left" if name == "arm" else "right")
    for arm, equal in results["equal"].items():
        ours, theirs = (results["engines"][name]["answers_s"][arm] for name in ("peft", "vllm"))
        shown.add_row(arm, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}x", f"{equal:.1%}")
    starts = ", ".join(f"{name} {each['start_s']:.0f} s" for name, each in results["engines"].items())
    shown.caption = f"Until the first answers: {starts}. {results['machine']}"
    return shown


if __name__ == "__main__":
    main()
