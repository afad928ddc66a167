"""``fit`` through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tiny_project, tunewright

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return folder


def test_estimate_memory_json_has_bytes_by_part_and_what_fits(base: Path, tmp_path: Path) -> None:
    ran = tunewright(
        "estimate-memory", "--base", base, "--gpu", "24GB", "--rows", "4", "--length", "512", "--shared", "300",
        "--json", "--project", tmp_path,
    )  # fmt: skip
    message = ran.document
    assert message["parameters"] == 6_738_415_616
    assert message["memory"] == {"bytes": 24_000_000_000, "card": True, "source": "a GPU with 24GB"}
    assert message["batch"] == {"rows": 4, "shared": 300, "own": 212, "trained": 212, "length": 512, "tokens": 1148}
    assert [(w["name"], w["gradient_checkpointing"]) for w in message["ways"]] == [
        ("LoRA bfloat16", False),
        ("LoRA bfloat16", True),
        ("QLoRA bfloat16", False),
        ("QLoRA bfloat16", True),
    ]
    for way in message["ways"]:
        assert way["total"] == sum(way["bytes"].values())
        assert way["fits"] == (way["total"] <= 24_000_000_000)
        assert {"length", "micro_batch_size"} == set(way["largest"][0])


def test_estimate_memory_exits_with_3_and_names_what_fits_when_nothing_does(base: Path, tmp_path: Path) -> None:
    ran = tunewright("estimate-memory", "--base", base, "--card", "RTX 4080", "--length", "8192", "--project", tmp_path)
    assert ran.code == 3
    answer = ran.stdout.splitlines()[0]
    assert answer.startswith("Does not fit: micro-batch 1 × 8,192 (LoRA bfloat16) needs ")
    assert "The longest single row that fits has " in answer
    assert "With train.quantization: nf4 it fits." in answer
    document = tunewright(
        "estimate-memory", "--base", base, "--card", "RTX 4080", "--length", "8192", "--json", "--project", tmp_path
    ).document
    assert (document["answer"]["fits"], document["answer"]["micro_batch_size"]) == (False, 0)
    way = next(w for w in document["ways"] if w["name"] == "LoRA bfloat16" and w["gradient_checkpointing"])
    assert 0 < way["longest_row"] < 8192


def test_estimate_memory_counts_the_layers_that_training_recomputes(base: Path, tmp_path: Path) -> None:
    def estimate(*settings: str) -> Any:
        config = tmp_path / "tunewright.yaml"
        config.write_text("\n".join(["base_model: " + str(base), "train:", *(f"  {each}" for each in settings)]))
        return tunewright(
            "estimate-memory", "--gpu", "24GB", "--rows", "2", "--length", "2048", "--json", "--project", tmp_path
        )

    auto = estimate("preset: classic").document
    assert (auto["answer"]["micro_batch_size"], auto["answer"]["recomputed_layers"]) == (2, 20)
    assert "(LoRA bfloat16, 20 of 32 layers recomputed, " in auto["answer"]["text"]
    few = estimate("gradient_checkpointing: 8").document
    assert (few["answer"]["fits"], few["answer"]["recomputed_layers"]) == (False, 8)
    assert [way["recomputed_layers"] for way in few["ways"]] == [0, 32, 8] * 2
    too_many = estimate("gradient_checkpointing: 200")
    assert too_many.code == 2
    error = too_many.document["error"]
    assert error["where"] == "train.gradient_checkpointing"
    assert error["what"] == "200 layers cannot be recomputed: the base has 32"


def test_estimate_memory_measures_longest_row_of_the_dataset(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    assert (
        tunewright("estimate-memory", "--gpu", "1GB", "--json", "-p", folder).document["answer"]["longest_row"] is None
    )
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    lengths = tunewright("data", "check", "--json", "-p", folder).document["splits"]
    longest = max(split["percentiles"]["100"] for split in lengths if split["split"] != "test")
    ran = tunewright("estimate-memory", "--gpu", "4GB", "-p", folder)
    assert ran.code == 0
    assert f"; your longest row has {longest} tokens." in ran.stdout.splitlines()[0]
