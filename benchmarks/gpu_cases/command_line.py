"""`tunewright train`, killed and resumed, `evaluate` and `serve`, through the command line on a base on disk."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from gpu_cases.bases import shape_of, write_folder
from gpu_cases.reporting import Report

COLOURS = ("red", "green", "blue", "amber", "violet", "ochre", "teal", "navy", "olive", "coral")
PAIRS = 72
CONFIG = """
name: gpu-proof
base_model: {base}
data:
  sources: [pairs.jsonl]
train:
  preset: all-linear
  batch_size: 4
  epochs: 1
  save_steps: 2
  eval_max_samples: 0
evaluate:
  num_fewshot: [2]
  max_new_tokens: 8
regressions:
  samples: 0
"""


def run(report: Report, toy: bool) -> None:
    """Run the commands on a folder of 2B shape, with a time for each."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        base = write_folder(shape_of("2b", toy), Path(folder) / "base")
        size = sum(file.stat().st_size for file in base.iterdir())
        report("base written", bytes=size, seconds=time.monotonic() - began)
        project = make_project(Path(folder) / "project", base)
        step, seconds = _killed(project)
        report("train, killed", step > 0, checkpoint=step, seconds=seconds)
        began = time.monotonic()
        ended = run_command(project, "train", "--json")
        trained = json.loads(ended.stdout)
        resumed = any(f"step {step}" in line for line in ended.stderr.splitlines())
        report("train, resumed", trained["trained"] and resumed, from_step=step, seconds=time.monotonic() - began)
        began = time.monotonic()
        # A measured "no" and "can't tell" are results too: what random weights are worth is not the question.
        evidence = json.loads(run_command(project, "evaluate", "--json").stdout)["evidence"]
        arms = sorted(arm["name"] for arm in evidence["arms"])
        report("evaluate", "tuned" in arms, arms=arms, seconds=time.monotonic() - began)
        began = time.monotonic()
        with _server(project) as address:
            ready = time.monotonic() - began
            models = [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]]
            tokens = [_answer_tokens(address, model) for model in models]
        report("serve", len(models) == 2 and all(tokens), answered=len(models), ready_s=ready, tokens=tokens)


def make_project(folder: Path, base: Path) -> Path:
    """Make a project whose rows are ready for training."""
    folder.mkdir()
    (folder / "tunewright.yaml").write_text(CONFIG.format(base=base), encoding="utf-8")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in _pairs()), encoding="utf-8")
    run_command(folder, "data", "add", str(folder / "pairs.jsonl"))
    return folder


def _pairs() -> list[dict[str, str]]:
    generator = random.Random(0)
    texts = [" ".join(generator.sample(COLOURS, 3)) + f" {number * 7919 % 10007}" for number in range(PAIRS)]
    return [{"prompt": text, "completion": text.split()[0]} for text in texts]


def run_command(
    project: Path, *arguments: str, program: Sequence[str] = ("-m", "tunewright"), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``program`` is what Python starts, and ``environment`` more variables.

    Raises:
        RuntimeError: it failed; the last lines of its output are in the error.
    """
    ended = subprocess.run(
        [sys.executable, *program, *arguments, "-p", str(project)],
        capture_output=True,
        text=True,
        check=False,
        env=_offline() | environment,
    )
    if ended.returncode:
        said = "\n".join(ended.stderr.splitlines()[-30:])
        raise RuntimeError(f"tunewright {' '.join(arguments)} ended with {ended.returncode}:\n{said}")
    return ended


@contextmanager
def _server(project: Path) -> Iterator[str]:
    """Serve the base and the adapter; the block has the address once the server is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tunewright", "serve", "--engine", "peft", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "-p", str(project)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_offline()
    )
    try:
        address = f"http://127.0.0.1:{port}"
        while not _ready(address):
            if process.poll() is not None:
                _, said = process.communicate()
                raise RuntimeError(f"tunewright serve ended with {process.returncode}:\n{said}")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate()


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def _answer_tokens(address: str, model: str) -> int:
    """Return the tokens of one answer of this model."""
    asked = {"model": model, "messages": [{"role": "user", "content": "red green blue 1"}], "max_tokens": 8}
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=120)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def _killed(project: Path) -> tuple[int, float]:
    """Train until there is a whole checkpoint, kill the process, and return the checkpoint's step and the seconds."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tunewright", "train", "-p", str(project)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=_offline(),
    )
    while process.poll() is None and not _whole(project):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"tunewright train was to be killed, and ended by itself with {process.returncode}:\n{said}")
    return max(_whole(project)), time.monotonic() - began


def _whole(project: Path) -> list[int]:
    """Return the steps of complete checkpoints: those with a manifest, which is written last."""
    from tunewright.core.io import MANIFEST

    found = project.glob(f".tunewright/training/*/checkpoint-*/{MANIFEST}")
    return [int(file.parent.name.removeprefix("checkpoint-")) for file in found]


def _offline() -> dict[str, Any]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
