"""``fit`` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import tiny_project, tunewright

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


def test_estimate_memory_needs_only_the_config_of_a_base(base: Path, tmp_path: Path) -> None:
    ran = tunewright("estimate-memory", "--base", base, "--gpu", "24GB", "--project", tmp_path)
    assert ran.code == 0
    assert "6,738,415,616 parameters" in ran.stdout
    assert "LoRA bfloat16, checkpointed: at most" in ran.stdout
    assert ran.stdout.startswith("Fits: micro-batch 8 × 2,048 (LoRA bfloat16, ")


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


def test_estimate_memory_uses_the_projects_base_and_config(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    message = tunewright("estimate-memory", "--gpu", "1GB", "--json", "--project", folder).document
    assert message["base"] == str(tiny_base_folder)
    assert message["batch"]["rows"] == 8
    assert message["ways"][0]["name"] == "LoRA float32"
    assert len(message["ways"][0]["target_modules"]) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "24"], "--gpu: '24' is neither a memory size nor a known GPU"),
        (["--gpu", "24GB", "--length", "100", "--shared", "100"], "exceed the row length of 100"),
        (["--gpu", "24GB", "--length", "100", "--answer", "101"], "exceed the row length of 100"),
    ],
)
def test_estimate_memory_refuses_impossible_options(base: Path, tmp_path: Path, options: list[str], words: str) -> None:
    ran = tunewright("estimate-memory", "--base", base, *options, "--project", tmp_path)
    assert ran.code == 2
    assert words in ran.stderr


def test_estimate_memory_refuses_without_a_project_or_base(tmp_path: Path) -> None:
    ran = tunewright("estimate-memory", "--gpu", "24GB", "--project", tmp_path)
    assert ran.code == 2
    assert "tunewright.yaml" in ran.stderr


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


def test_estimate_memory_uses_given_rows_and_reports_how_many_fit(base: Path, tmp_path: Path) -> None:
    options = ("--base", base, "--gpu", "24GB", "--rows", "16", "--project", tmp_path)
    ran = tunewright("estimate-memory", *options)
    assert ran.code == 3
    assert "Micro-batch 8 × 2,048 does." in ran.stdout.splitlines()[0]


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


def test_estimate_memory_answers_for_longest_row_when_no_row_of_max_length_fits(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("  epochs: 2", "  epochs: 2\n  max_length: 1000000"))
    answer = tunewright("estimate-memory", "--gpu", "2GB", "--json", "-p", folder).document["answer"]
    assert answer["fits"]
    assert answer["length"] == answer["longest_row"]
    assert "train.max_length (1,000,000) does not fit." in answer["text"]
