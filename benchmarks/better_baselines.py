"""Generated rows, a hosted model, an optimized prompt and preference tuning on one real task, by the command line.

    python benchmarks/better_baselines.py [--work build/better_baselines]

The legal citations of courts-db in three parts: 1,000 rows train an adapter that plays the hosted model and the
teacher, 480 rows are those of people, and 479 inputs get their answers from the teacher. A script plays the reviewer,
who knows the citations, and another one the reflection model. Runs the commands of
docs/benchmarks/better-baselines.md, stores their output in WORK/printed, and skips those that have been run. Writes
benchmarks/results/better_baselines.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import tunewright
from tunewright import examples
from tunewright.adapters.registry import list_adapters
from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE
from tunewright.core.io import text_lines, write_json, write_text
from tunewright.evidence.files import load_evidence
from tunewright.evidence.verdict import verdict
from tunewright.serving.gateway.server import serving

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "better_baselines.json"
HOSTED, HUMAN, INPUTS = 1000, 480, 479  # rows of each part
PORT = 8123  # of the hosted model
TRAIN: dict[str, Any] = {"preset": "all-linear", "learning_rate": 1e-3, "epochs": 2}
DATA = {"system_prompt": "Give the citation abbreviation of this court."}
ADVICE = [
    "Write only the abbreviation.",
    "Write no sentence and no explanation.",
    "Shorten each word to its first letters and a period.",
    "Put the state first.",
    "Leave out the words of and the.",
    "Write Ct. for court and Cir. for circuit.",
]
"""Of the script that plays the reflection model."""
ANSWERED_NO = {0, 3, 4}
"""Exit codes of a measured no and of can't tell: the walk continues."""

Row = dict[str, str]


class Walk:
    """Commands that are run once each, with their output and their seconds."""

    def __init__(self, folder: Path, printed: Path) -> None:
        self.folder = folder
        self._printed = printed
        printed.mkdir(parents=True, exist_ok=True)
        self._seconds = printed / "seconds.json"

    def done(self, name: str) -> bool:
        """Return True if the step has been run."""
        return name in self._times()

    def run(self, name: str, *words: str) -> None:
        """Run a command unless its step has been run, and keep what it prints."""
        if self.done(name):
            return
        print(f"$ tunewright {' '.join(words)}", flush=True)
        began = time.monotonic()
        program = str(Path(sys.executable).with_name("tunewright"))
        ended = subprocess.run([program, *words], cwd=self.folder, capture_output=True, text=True, check=False)
        text = ended.stderr + ended.stdout
        print(text, flush=True)
        if ended.returncode not in ANSWERED_NO:
            sys.exit(f"tunewright {words[0]} ended with {ended.returncode}")
        write_text(self._printed / f"{name}.txt", f"$ tunewright {' '.join(words)}\n{text}")
        self.note(name, time.monotonic() - began)

    def note(self, name: str, seconds: float) -> None:
        """Record that a step has been run."""
        times = {"machine": platform.platform(), **self._times(), name: round(seconds, 1)}
        write_text(self._seconds, json.dumps(times, indent=2) + "\n")

    def _times(self) -> dict[str, Any]:
        return json.loads(self._seconds.read_text()) if self._seconds.exists() else {}


def main() -> None:
    """Prepare the parts, and run every command that has not been run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "better_baselines")
    work = parser.parse_args().work.resolve()
    parts = parts_of_rows()
    hosted = Walk(work / "hosted", work / "printed" / "hosted")
    written(hosted.folder, "rows.jsonl", parts["hosted"])
    configured(hosted.folder, {"name": "hosted", "data": DATA, "train": TRAIN, "regressions": {"samples": 0}})
    hosted.run("add", "data", "add", "rows.jsonl")
    hosted.run("train", "train")
    (model,) = list_adapters(hosted.folder / "adapters")

    walk = Walk(work / "courts", work / "printed")
    written(walk.folder, "human.jsonl", parts["human"])
    written(walk.folder, "inputs.jsonl", [{"prompt": row["prompt"], "completion": ""} for row in parts["inputs"]])
    with serving(reflection()) as reflecting, served(hosted.folder):
        settings = config(model.name, f"{reflecting}/v1")
        configured(walk.folder, settings)
        rows_of_a_teacher(walk, {row["prompt"]: row["completion"] for row in parts["inputs"]})
        walk.run("optimize", "optimize-prompt")
        with_rows = trained_and_evaluated(walk, "with", settings, TRAIN)
        without = trained_and_evaluated(walk, "without", settings, {**TRAIN, "generated": False})
        walk.run("effect", "data", "generated-effect", with_rows["evaluation"], without["evaluation"])
        sample_wrong_answers(walk, with_rows["adapter"])
        walk.run("add-pairs", "data", "add", "pairs.jsonl")
        start = {"preset": "all-linear", "from": with_rows["adapter"]}
        trained_and_evaluated(walk, "dpo", settings, {**start, "method": "dpo", "learning_rate": 5e-5})
    walk.run("verdict", "verdict")
    walk.run("report", "report")
    write_json(RESULTS, {"machine": platform.platform(), **summary(walk.folder)})
    print(RESULTS.relative_to(ROOT))


def summary(folder: Path) -> dict[str, Any]:
    """Return the measurements of the three evaluations, from their evidence."""
    found: dict[str, Any] = {}
    for name in ("with", "without", "dpo"):
        evidence = load_evidence(
            folder / "evaluations" / json.loads((folder / f"{name}.json").read_text())["evaluation"]
        )
        decision = verdict(evidence)
        found[name] = {
            "verdict": decision.decision,
            "arms": {
                arm.name: {metric: arm.score(metric).value for metric in evidence.metrics} for arm in evidence.arms
            },
            "contrasts": [each.model_dump(mode="json") for each in evidence.contrasts],
            "incumbents": {each.incumbent.name: each.outcome for each in decision.replacements},
        }
        if evidence.generated_effect is not None:
            found["generated_effect"] = evidence.generated_effect.model_dump(mode="json")
        if evidence.prompt_optimization is not None:
            prompt = evidence.prompt_optimization
            found["instruction"] = {
                "dev": prompt.best.dev,
                "own_dev": prompt.candidates[0].dev,
                "text": prompt.instruction,
            }
    return found


def parts_of_rows() -> dict[str, list[Row]]:
    """Draw the three parts by a seed."""
    lines = text_lines(examples.project_files()[examples.PAIRS_FILE])
    rows = [json.loads(line) for line in random.Random(0).sample(lines, HOSTED + HUMAN + INPUTS)]
    return {"hosted": rows[:HOSTED], "human": rows[HOSTED : HOSTED + HUMAN], "inputs": rows[HOSTED + HUMAN :]}


def config(model: str, reflecting: str) -> dict[str, Any]:
    """Return the project's settings. Prices are made up: a small hosted model, and a small machine."""
    endpoint = {"base_url": f"http://127.0.0.1:{PORT}/v1", "model": model}
    prices = {"price_input": 0.15, "price_output": 0.6}
    return {
        "name": "courts",
        "data": {**DATA, "val_size": 0.16, "test_size": 0.3},
        "generate": {**endpoint, "license": "Our own model; Apache-2.0 base", "agreement": 0.6, "concurrency": 16},
        "train": TRAIN,
        "advise": {"prices": {"hour": 0.2}},
        "evaluate": {
            # Graded: the base answers no citation exactly without examples, and GEPA needs a difference to see.
            "metric": "chrf",
            "extra_metrics": ["exact_match"],
            "num_fewshot": [4],
            "static_seeds": 1,
            "screening_items": 48,
            "finalists": 1,
            "tuned_retrieved": False,
            "batch_size": 64,
            "incumbents": [{"name": "hosted", **endpoint, **prices}],
            "prompt_optimization": {
                "reflection_model": {"base_url": reflecting, "model": "scripted", **prices},
                "max_metric_calls": 400,
                "val_items": 30,
            },
        },
        "regressions": {"samples": 0},
    }


def configured(folder: Path, settings: dict[str, Any]) -> None:
    """Write the project's config."""
    write_text(folder / CONFIG_FILE, write_config({"base_model": "bundled:smollm2-135m-instruct", **settings}))


def written(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rows_of_a_teacher(walk: Walk, citations: dict[str, str]) -> None:
    """Generate, add and review rows. The reviewer knows the citations: a wrong answer is corrected."""
    walk.run("add", "data", "add", "human.jsonl")
    walk.run("generate", "data", "generate", "inputs.jsonl")
    walk.run("add-generated", "data", "add", "generated/inputs.jsonl")
    walk.run("export", "data", "review", "--reviewer", "ann", "--export", "review.csv")
    sheet = walk.folder / "review.csv"
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        citation = citations.get(line["input"].rpartition("user: ")[2].strip())
        line["verdict"] = "right" if citation in (None, line["answer"].strip()) else "edit"
        line["new_output"] = "" if line["verdict"] == "right" else str(citation)
    with (walk.folder / "reviewed.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    walk.run("import", "data", "review", "--reviewer", "ann", "--import", "reviewed.csv")
    walk.run("apply", "data", "review", "--apply", "-m", "generated rows read")


def trained_and_evaluated(walk: Walk, name: str, settings: dict[str, Any], train: dict[str, Any]) -> dict[str, str]:
    """Train and evaluate with these settings; return the adapter's name and the evaluation's ID."""
    configured(walk.folder, {**settings, "train": train})
    kept = walk.folder / f"{name}.json"
    if not kept.exists():
        walk.run(f"train-{name}", "train")
        adapter = tunewright.open(walk.folder).train().adapter.name
        walk.run(f"evaluate-{name}", "evaluate", adapter)
        evaluation = tunewright.open(walk.folder).evaluate(adapter).folder.name
        write_text(kept, json.dumps({"adapter": adapter, "evaluation": evaluation}))
    found: dict[str, str] = json.loads(kept.read_text())
    return found


def sample_wrong_answers(walk: Walk, adapter: str) -> None:
    """Ask the served adapter for the training rows, and write its wrong answers as rejected ones."""
    file = walk.folder / "pairs.jsonl"
    if file.exists():
        return
    train = [m.example for m in tunewright.open(walk.folder).data.version().members if m.split == "train"]

    def answered(seed: int) -> str:
        body = {"model": adapter, "messages": prompts[seed], "temperature": 1.0, "seed": seed, "max_tokens": 40}
        answer = client.post("/chat/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"]).strip()

    prompts = [[turn.as_dict() for turn in example.prompt] for example in train]
    with (
        served(walk.folder, PORT + 1, adapter) as url,
        httpx.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(16) as threads,
    ):
        answers = list(threads.map(answered, range(len(train))))
    pairs = []
    for prompt, example, text in zip(prompts, train, answers, strict=True):
        if text and text != example.output:
            turns = [[{"role": "assistant", "content": each}] for each in (example.output, text)]
            pairs.append({"prompt": prompt, "chosen": turns[0], "rejected": turns[1]})
    print(f"{len(pairs):,} of {len(train):,} sampled answers are wrong", flush=True)
    written(walk.folder, file.name, pairs)


@contextmanager
def served(folder: Path, port: int = PORT, *adapters: str) -> Iterator[str]:
    """Serve a project's adapters while the block runs; yield the API's address."""
    program = str(Path(sys.executable).with_name("tunewright"))
    words = [program, "serve", *adapters, "--port", str(port)]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(words, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}/v1"
            until = time.monotonic() + 600
            while server.poll() is None and time.monotonic() < until:
                try:
                    if httpx.get(f"{url}/models", timeout=5).is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            else:
                sys.exit(f"tunewright serve did not start: see {folder / 'serve.log'}")
            yield url
        finally:
            server.terminate()
            server.wait()


def reflection() -> Starlette:
    """Return an API that plays the reflection model: each call adds one of `ADVICE` to the instruction, in turn."""
    calls = count()

    async def chat(request: Request) -> Response:
        asked = (await request.json())["messages"][-1]["content"]
        current = asked.split("```")[1].strip()
        number = next(calls)
        new = [each for each in ADVICE[number % len(ADVICE) :] + ADVICE if each not in current]
        text = f"```\n{current} {new[0] if new else ''}\n```"
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": len(asked) // 4, "completion_tokens": len(text) // 4}
        return JSONResponse(
            {
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": usage,
                "model": "scripted",
            }
        )

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


if __name__ == "__main__":
    main()
