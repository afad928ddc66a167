"""vLLM with more adapters than slots on the card (`serve.gpu_adapters`): the isolation test.

Without a card the engine peft takes vLLM's place, so that base, adapters and test are tried.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from gpu_cases.bases import write_folder
from gpu_cases.reporting import Report, Skipped
from tunewright.adapters.registry import adapter_digest
from tunewright.chat import open_chat
from tunewright.config import PRESETS, Config, EngineName
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.engines import environment
from tunewright.engines.protocol import Engine
from tunewright.gate.answers import Digest, PeftReference
from tunewright.gate.isolation import LONG, SHORT, TOLERANCE, check_isolation
from tunewright.gate.prompts import GENERAL
from tunewright.models.bases import resolve_base
from tunewright.models.families import ATTENTION, Shape
from tunewright.models.loading import context_length
from tunewright.serving.engine_start import EngineSpec, start_engine

ADAPTERS, SLOTS = 6, 2
RANK = 8
# The test is about the engine's bookkeeping, not about size.
SIZE = Shape(2, 256, 512, 4, 2, 64, 512, tied=False, attention_bias=False, mlp_bias=False)
BASE_STD, LORA_STD = 0.2, 0.15
"""Of the weights: large enough that a model's greedy tokens are clear, and that no two models share them."""


def run(report: Report, toy: bool) -> None:  # noqa: ARG001  (it is small anyway)
    """Write a base and adapters, and test the engine with them."""
    kind: EngineName = "vllm" if torch.cuda.is_available() else "peft"
    if kind == "vllm":
        try:
            environment.find(environment.VLLM, "cuda")
        except UserError as error:
            raise Skipped(f"{error.what}. {error.fix}") from error
    torch.manual_seed(0)
    serve = {"engine": kind, **({"gpu_adapters": SLOTS} if kind == "vllm" else {})}
    config = Config.model_validate({"name": "gpu-proof", "serve": serve})
    reporter = LogReporter()
    with tempfile.TemporaryDirectory() as folder:
        place = write_folder(SIZE, Path(folder) / "base", std=BASE_STD)
        base = resolve_base(str(place), None, Path(folder), reporter)
        chat = open_chat(base)
        written = [_write_adapter(Path(folder) / f"adapter-{number}") for number in range(1, ADAPTERS + 1)]
        folders = {adapter_digest(each): each for each in written}
        began = time.monotonic()

        @contextmanager
        def started() -> Iterator[Engine]:
            engine = start_engine(kind, config, EngineSpec(base, chat, "none", folders), reporter)
            try:
                yield engine
            finally:
                engine.stop()

        names: Mapping[Digest, str] = {None: "base", **{digest: each.name for digest, each in folders.items()}}
        result = check_isolation(
            started,
            PeftReference(base, config.train.dtype, "none", folders, stop_ids=chat.stop_ids),
            folders,
            [chat.prompt((Message("user", text),)) for text in GENERAL],
            context=context_length(base),
            tolerance=TOLERANCE[config.train.dtype],
            names=names,
            reporter=reporter,
            long=LONG if kind == "vllm" else SHORT,
        )
    report(
        "isolation",
        result.verdict == "isolated",
        engine=result.engine,
        adapters=len(folders),
        slots=SLOTS if kind == "vllm" else None,
        requests=sum(check.asked for check in result.checks),
        wrong=len(result.failures),
        verdict=result.verdict,
        reasons=list(result.reasons),
        seconds=time.monotonic() - began,
    )


def _write_adapter(folder: Path) -> Path:
    """Write an adapter with random weights."""
    targets = PRESETS["all-linear"]["target_modules"]
    weights = {}
    for layer in range(SIZE.layers):
        for name in targets:
            part = "self_attn" if name in ATTENTION else "mlp"
            inputs, outputs = SIZE.linear(name)
            for matrix, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                place = f"base_model.model.model.layers.{layer}.{part}.{name}.{matrix}.weight"
                weights[place] = torch.empty(shape).normal_(std=LORA_STD)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(targets))
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
