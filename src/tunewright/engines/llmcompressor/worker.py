"""One run of llm-compressor in its own environment, which has nothing of tunewright: this module imports none of it.

Usage: python worker.py JOB, where JOB is a JSON file with

    source      folder of a 16-bit model
    target      folder for the compressed weights and their config.json
    scheme      "fp8": 8-bit floats, one scale per output; inputs are rounded too, one scale per token, while it runs
                "w4a16": 4-bit integers by GPTQ (Frantar et al. 2023), one scale per group of weights
    group_size  weights of a group (w4a16)
    rows        token ids of calibration rows (w4a16)

It ends with its standard input, so that it does not outlive the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

_IGNORED = ["lm_head"]
"""As in llm-compressor's examples: the output matrix decides between near ties."""


def main(job: dict[str, Any]) -> None:
    """Quantize one model."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["source"], dtype="auto", local_files_only=True, use_safetensors=True
    )
    oneshot(model=model, **_arguments(job))
    model.save_pretrained(job["target"], save_compressed=True)


def _arguments(job: dict[str, Any]) -> dict[str, Any]:
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if job["scheme"] == "fp8":
        return {"recipe": QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=_IGNORED)}
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    assert scheme.weights is not None
    scheme.weights.group_size = job["group_size"]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["rows"]]
    return {
        "recipe": GPTQModifier(config_groups={"group_0": scheme}, ignore=_IGNORED),
        "dataset": Dataset.from_list(rows),
        "num_calibration_samples": len(rows),
        "max_seq_length": max(len(ids) for ids in job["rows"]),  # otherwise longer rows would be cut
        "shuffle_calibration_samples": False,
    }


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
