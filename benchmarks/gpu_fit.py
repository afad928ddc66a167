"""Llama-sized bases with random weights, trained for 20 steps: memory beside the prediction, speed, MFU, and trl.

    python benchmarks/gpu_fit.py [--only 7b-lora 8b-lora ...]

Each case is a process of its own: 7B and 8B in bfloat16 and in NF4, 70B in NF4. NF4 weights are made layer by layer, so
that the 16-bit ones are never in memory together. Rows of 512 tokens, of which 384 are shared and 32 trained. trl gets
the same rows, padding-free, with the same checkpointing of activations. Prints a table, and writes JSON to
benchmarks/results/gpu_fit-CARD.json. Without a CUDA card everything runs at toy size, says so, and proves nothing but
that it runs; its JSON is not kept.

MFU counts 4 operations for each parameter of the linear layers and each token that goes through the model (2 forward, 2
for the gradient of what goes in: the weights are frozen, and computing again is no use), of the card's dense bfloat16
peak as NVIDIA's data sheets have it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tunewright.models.families import MLP
from tunewright.models.fit.memory import Load, Way, need
from tunewright.models.fit.shape import Shape
from tunewright.recipe import PRESETS

TARGETS: tuple[str, ...] = PRESETS["all-linear"]["targets"]
RANK = 16
STEPS = 20
LOAD = Load(rows=8, shared=384, own=128, trained=32)
SHAPES = {
    "7b": Shape(32, 4096, 11008, 32, 32, 128, 32000, tied=False, attention_bias=False, mlp_bias=False),
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False, attention_bias=False, mlp_bias=False),
    "70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False, attention_bias=False, mlp_bias=False),
}
TOY = Shape(2, 128, 256, 4, 2, 32, 1024, tied=False, attention_bias=False, mlp_bias=False)
CASES = {
    "7b-lora": ("7b", False),
    "8b-lora": ("8b", False),
    "7b-qlora": ("7b", True),
    "8b-qlora": ("8b", True),
    "70b-qlora": ("70b", True),
}
SIDES = ("tunewright", "trl")
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def main() -> None:
    """Run every case, each side in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run(*options.job)))
        return
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if card is None:
        print("No CUDA card: toy sizes on the processor. These numbers say nothing but that it runs.")
    results: dict[str, Any] = {"card": card, "steps": STEPS, "cases": {}}
    print(f"{'case':10} {'side':11} {'predicted':>10} {'peak':>10} {'tokens/s':>9} {'MFU':>6}  loss")
    for case in options.only:
        sides: dict[str, Any] = {}
        for side in SIDES:
            command = [sys.executable, __file__, "--job", case, side]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                # trl may run out of memory where we do not: that is a result too.
                sides[side] = {"failed": done.stderr.strip().splitlines()[-1:]}
                print(f"{case:10} {side:11} failed: {sides[side]['failed']}", flush=True)
                continue
            told = sides[side] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{case:10} {side:11} {_gb(told['predicted']):>10} {_gb(told['peak']):>10} "
                f"{told['row_tokens_s']:9,.0f} {_percent(told['mfu']):>6}  {told['loss']:.3f}",
                flush=True,
            )
        if card is not None and all("row_tokens_s" in told for told in sides.values()):
            ratio = sides["tunewright"]["row_tokens_s"] / sides["trl"]["row_tokens_s"]
            sides["times_as_fast"] = ratio
            print(f"{case:10} {ratio:.2f} times as fast as trl", flush=True)
        results["cases"][case] = sides
    print(json.dumps(results))
    if card is not None:
        folder = Path(__file__).with_name("results")
        folder.mkdir(exist_ok=True)
        out = folder / f"gpu_fit-{card.replace(' ', '-')}.json"
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _gb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"


def run(case: str, side: str) -> dict[str, Any]:
    """One case and side, in this process."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed

    from tunewright.models.bases import resolve_base
    from tunewright.models.loading import load_tokenizer
    from tunewright.models.quiet import quiet_transformers
    from tunewright.progress import LogReporter
    from tunewright.recipe import TrainRecipe
    from tunewright.training.adapter import keep_float32, lora_config
    from tunewright.training.trainer import Trainer

    name, nf4 = CASES[case]
    on_card = torch.cuda.is_available()
    shape = SHAPES[name] if on_card else TOY
    set_seed(0)
    settings = TrainRecipe(preset="all-linear", rank=RANK, quantize="nf4" if nf4 else "none")
    lora = lora_config(settings)
    times: list[float] = []
    arguments, kind, extra = _arguments(on_card), _sft_trainer(), {}
    if side == "tunewright":
        kind, extra = Trainer, {"share": True}
    else:
        arguments["padding_free"] = True
        lora._custom_modules = None  # peft's own layers
    with quiet_transformers(), tempfile.TemporaryDirectory() as out:
        from trl import SFTConfig

        model = build(shape, nf4=nf4)
        tokenizer = load_tokenizer(resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter()))
        trainer = kind(
            model=model,
            args=SFTConfig(output_dir=out, **arguments),
            train_dataset=Dataset.from_dict(_rows(torch, shape.vocabulary)),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[_clock(times)],
            **extra,
        )
        keep_float32(trainer.model)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = (times[-1] - times[1]) / (len(times) - 2)
    shared = side == "tunewright"
    tokens = LOAD.tokens if shared else LOAD.attended
    peak_flops = _peak_flops(torch.cuda.get_device_name()) if on_card else None
    useful = 4 * shape.linear_parameters * tokens / seconds
    way = Way(TARGETS, RANK, nf4=nf4, checkpointing=on_card, card=on_card)
    told = need(shape, way, LOAD)
    return {
        "row_tokens_s": LOAD.attended / seconds,
        "seconds_a_step": seconds,
        "peak": torch.cuda.max_memory_allocated() if on_card else None,
        "reserved": torch.cuda.max_memory_reserved() if on_card else None,
        "predicted": told.total - told.runtime if shared else None,
        "mfu": useful / peak_flops if peak_flops else None,
        "loss": trainer.state.log_history[-2]["loss"],
    }


def _arguments(on_card: bool) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": LOAD.rows,
        "max_steps": STEPS,
        "learning_rate": 2e-4,
        "bf16": True,
        "use_cpu": not on_card,
        "gradient_checkpointing": on_card,
        "max_length": None,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def _sft_trainer() -> Any:
    from trl import SFTTrainer

    return SFTTrainer


def _rows(torch: Any, vocabulary: int) -> dict[str, list[list[int]]]:
    """Random ids; the first of each row are the same."""
    drawn = torch.randint(5, vocabulary, (STEPS * LOAD.rows, LOAD.shared + LOAD.own)).tolist()
    ids = [drawn[0][: LOAD.shared] + row[LOAD.shared :] for row in drawn]
    return {"input_ids": ids, "labels": [[-100] * (len(row) - LOAD.trained) + row[-LOAD.trained :] for row in ids]}


def _clock(times: list[float]) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    return Clock()


def _peak_flops(card: str) -> float | None:
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def build(shape: Shape, *, nf4: bool) -> Any:
    """A Llama of random weights where training runs, its linear layers in 4 bits if asked for, one at a time."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunewright.models.loading import device

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        whole: Any = LlamaForCausalLM(config)
        model = whole.to(torch.bfloat16)
    place = device()

    def drawn(weight: torch.Tensor) -> torch.Tensor:
        return torch.empty(weight.shape, dtype=torch.bfloat16, device=place).normal_(std=0.02)

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj") if part is layer.self_attn else MLP:
                linear = getattr(part, name)
                if nf4:
                    setattr(part, name, _in_nf4(linear, drawn(linear.weight), place))
                else:
                    linear.weight = nn.Parameter(drawn(linear.weight), requires_grad=False)
    for part in (model.model.embed_tokens, model.lm_head):
        part.weight = nn.Parameter(drawn(part.weight), requires_grad=False)
    for name, part in model.named_modules():
        if name.endswith("norm"):
            part.weight = nn.Parameter(
                torch.ones(shape.hidden, dtype=torch.bfloat16, device=place), requires_grad=False
            )
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(place)
    if nf4:
        from tunewright.models.quantized import held_in_nf4

        # What transformers marks a base with that it has quantized itself.
        model.is_loaded_in_4bit = True
        held_in_nf4(model)
    assert not any(weight.is_meta for weight in model.parameters())
    return model


def _in_nf4(linear: Any, weight: Any, place: str) -> Any:
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    packed: Any = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.weight = packed.to(place)
    return layer


if __name__ == "__main__":
    main()
