"""Memory that really runs out: a limit on the address space of a training process."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tunewright
from tunewright.core.progress import LogReporter

BATCH = 8


class _Limiting(LogReporter):
    """Prints all messages; once the micro-batch is chosen, leaves seven tenths of the memory of that pass."""

    def say(self, message: str) -> None:
        print(message, flush=True)  # noqa: T201
        if message.startswith("Micro-batch:"):
            self.limit()

    def warn(self, message: str) -> None:
        print(message, flush=True)  # noqa: T201

    def limit(self) -> None:
        import resource

        status = Path("/proc/self/status").read_text()
        held, peak = (1024 * int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) for name in ("VmSize", "VmPeak"))
        print(f"took {peak - held}", flush=True)  # noqa: T201
        resource.setrlimit(resource.RLIMIT_AS, (held + (peak - held) * 7 // 10, resource.RLIM_INFINITY))


def _wide_base(folder: Path) -> Path:
    """A base whose activations are large and whose weights are small: a batch takes half a gigabyte, a second long."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from making.tiny_bases import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _project(folder: Path, base: Path, micro_batch: int) -> Path:
    folder.mkdir()
    words = random.Random(3)
    rows = [
        {"prompt": "".join(words.choices("abcdefghij klmnop", k=250)), "completion": f"answer {n}"} for n in range(22)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tunewright.yaml").write_text(
        f"name: wide\nbase_model: {base}\ndata:\n  sources: [pairs.jsonl]\n"
        f"train:\n  batch_size: {BATCH}\n  micro_batch_size: {micro_batch}\n  epochs: 1\n  dtype: float32\n"
        "  learning_rate: 0.003\n  prefix_sharing: 'off'\n  eval_max_samples: 0\n"
    )
    return folder


def _weights(project: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (adapter,) = (project / "adapters").iterdir()
    return dict(load_file(adapter / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit and /proc are Linux's")
def test_step_is_repeated_in_halves_when_memory_runs_out(tmp_path: Path) -> None:
    """Torch's own allocator fails during the pass; the adapter equals that of a run that used the halves from the
    start.
    """
    import torch

    base = _wide_base(tmp_path / "base")
    limited = _project(tmp_path / "limited", base, BATCH)
    ran = subprocess.run(
        [sys.executable, __file__, limited],
        capture_output=True,
        encoding="utf-8",
        check=False,
        # Large blocks go back to the system as soon as they are free: what is held is what is used.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.findall(r"took (\d+)", ran.stdout)[0]) > 200 << 20, "enough to tell 8 rows from 4"
    assert "Micro-batch: 8 rows; the longest batch" in ran.stdout
    reported = "Memory ran out in step 1 with 8 rows at once. This step is repeated with 4 rows"
    assert ran.stdout.count("Memory ran out") == 1, ran.stdout
    assert reported in ran.stdout
    halves = _project(tmp_path / "halves", base, BATCH // 2)
    opened = tunewright.open(halves)
    opened.data.add([halves / "pairs.jsonl"])
    adapter = opened.train(force=True).adapter
    assert adapter.lineage["training"]["micro_batch_size"] == BATCH // 2
    expected, got = _weights(halves), _weights(limited)
    assert any(weight.abs().max() > 0 for name, weight in expected.items() if "lora_B" in name)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-7, msg=name)


def _train_limited(folder: Path) -> None:
    opened = tunewright.open(folder, _Limiting())
    opened.data.add([folder / "pairs.jsonl"])
    opened.train(force=True)


if __name__ == "__main__":
    _train_limited(Path(sys.argv[1]))
