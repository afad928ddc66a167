"""Prediction of `tunewright estimate-memory` against the measured memory of a training step, on the CPU.

    python benchmarks/fit_memory.py [OUT.json]

Each case is a separate process: the bundled base with an adapter on all linear layers, two steps forward, backward
and AdamW on random tokens. Measured is the most resident memory (VmHWM) over what the process held before the base was
loaded, when a tiny model had taken the same steps: the libraries' code and kernels are the runtime's. Predicted is the
sum of all parts but the runtime's. Prints a table and the largest deviation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunewright.config import PRESETS
from tunewright.models.families import read_shape
from tunewright.models.memory_estimate import BatchShape, estimate
from tunewright.models.memory_plan import training_setup

TARGETS: tuple[str, ...] = PRESETS["all-linear"]["target_modules"]
RANK = 16
# Rows, shared tokens, own tokens, trained tokens of each row.
CASES: list[tuple[str, str, bool, tuple[int, int, int, int]]] = [
    ("bfloat16", "none", False, (4, 0, 128, 16)),
    ("bfloat16", "none", False, (8, 0, 128, 128)),
    ("bfloat16", "none", False, (2, 0, 512, 64)),
    ("bfloat16", "none", False, (16, 200, 40, 16)),
    ("bfloat16", "none", True, (8, 0, 128, 16)),
    ("float32", "none", False, (4, 0, 128, 16)),
    ("float32", "none", False, (8, 0, 128, 128)),
    ("bfloat16", "nf4", False, (8, 0, 128, 16)),
    ("bfloat16", "nf4", False, (2, 0, 512, 64)),
    ("bfloat16", "nf4", False, (16, 200, 40, 16)),
    ("bfloat16", "nf4", True, (8, 0, 128, 16)),
]


def main(out: str | None) -> None:
    """Measure all cases, and print the largest deviation."""
    results = []
    print(f"{'dtype':9} {'weights':8} {'checkpointed':12} {'rows x tokens':22} {'predicted':>10} {'measured':>10}")
    for case in CASES:
        ran = subprocess.run(
            [sys.executable, __file__, "--case", json.dumps(case)], check=True, capture_output=True, text=True
        )
        result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        results.append(result)
        off = result["predicted"] / result["measured"] - 1
        dtype, quantization, checkpointing, (rows, shared, own, _) = case
        shown = f"{rows} x {shared + own}" + (f" ({shared} shared)" if shared else "")
        print(
            f"{dtype:9} {quantization:8} {'yes' if checkpointing else 'no':12} {shown:22} "
            f"{result['predicted'] / 1e6:7,.0f} MB {result['measured'] / 1e6:7,.0f} MB {off:+.1%}",
            flush=True,
        )
    worst = max(abs(r["predicted"] / r["measured"] - 1) for r in results)
    document = {"cases": results, "largest_deviation": worst}
    print(f"Largest deviation: {worst:.1%} (the bar is 15%)")
    print(json.dumps(document))
    if out:
        Path(out).parent.mkdir(exist_ok=True)
        Path(out).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def measure(case: tuple[str, str, bool, tuple[int, int, int, int]]) -> dict[str, Any]:
    """Measure one case in this process."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunewright.config import TrainConfig
    from tunewright.core.progress import LogReporter
    from tunewright.models import quiet_transformers
    from tunewright.models.bases import resolve_base
    from tunewright.models.loading import load_model
    from tunewright.training import trainer  # noqa: F401  (what it imports is the runtime's)
    from tunewright.training.lora import keep_float32, lora_config
    from tunewright.training.packing import Group, attention, pack
    from tunewright.training.packing.fused_loss import add_token_losses, batch_token_losses

    dtype, quantization, checkpointing, numbers = case
    load = BatchShape(*numbers)
    settings = TrainConfig.model_validate(
        {"preset": "all-linear", "dtype": dtype, "quantization": quantization, "lora_r": RANK}
    )
    base = resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter())
    shape = read_shape(base.folder / "config.json")
    torch.manual_seed(0)
    drawn: list[list[int]] = torch.randint(0, shape.vocabulary, (load.rows, load.shared + load.own)).tolist()
    rows = [drawn[0][: load.shared] + row[load.shared :] for row in drawn]
    labels = [[-100] * (len(row) - load.trained) + row[-load.trained :] for row in rows]
    batch = pack(rows, labels, share=True, groups=[Group(load.shared, tuple(range(load.rows)))])
    attention.register()

    def train(model: Any, batch: Any) -> None:
        model.set_attn_implementation(attention.NAME)
        add_token_losses(model)
        model = get_peft_model(model, lora_config(settings))
        keep_float32(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model.train()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # loading itself may have taken more
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], fused=True)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = batch_token_losses(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with quiet_transformers():
        tiny = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        tiny_batch = pack([[1, 2, 3]], [[-100, 2, 3]], share=True)
        train(LlamaForCausalLM(tiny).to(getattr(torch, dtype)), tiny_batch)
        before = _status("VmRSS")
        train(load_model(base, dtype, settings.quantization), batch)
    setup = replace(training_setup(settings, card=False), recomputed="all" if checkpointing else 0)
    summary = estimate(shape, setup, load)
    return {
        "dtype": dtype,
        "quantization": quantization,
        "gradient_checkpointing": checkpointing,
        "rows": load.rows,
        "shared": load.shared,
        "own": load.own,
        "trained": load.trained,
        "predicted": summary.total - summary.runtime,
        "measured": _status("VmHWM") - before,
        "libraries": before,
    }


def _status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
