"""`migrate`: jobs as the services' documentation shows them become projects whose rows can be added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from making.command_line import tunewright, write_jsonl
from tunewright.data.migrate import VALIDATION_FILE

OPENAI = {
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "model": "gpt-4o-mini-2024-07-18",
    "created_at": 1721764800,
    "finished_at": 1721765800,
    "fine_tuned_model": "ft:gpt-4o-mini-2024-07-18:acme::A1b2C3d4",
    "organization_id": "org-123",
    "result_files": [],
    "status": "succeeded",
    "validation_file": "file-2",
    "training_file": "file-1",
    "hyperparameters": {"n_epochs": 4, "batch_size": 1, "learning_rate_multiplier": 1.8},
    "trained_tokens": 5768,
    "seed": 683058546,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": "auto"}}},
}
TOGETHER = {
    "id": "ft-0123",
    "status": "completed",
    "training_file": "file-1",
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "model_output_name": "acme/Llama-3.1-8B-Instruct-court-0123",
    "n_epochs": 2,
    "batch_size": "max",
    "learning_rate": 0.0001,
    "lr_scheduler": {"lr_scheduler_type": "linear", "lr_scheduler_args": {"min_lr_ratio": 0.1}},
    "warmup_ratio": 0.05,
    "max_grad_norm": 1,
    "weight_decay": 0,
    "training_method": {"method": "sft", "train_on_inputs": "auto"},
    "training_type": {"type": "Lora", "lora_r": 8, "lora_alpha": 16, "lora_trainable_modules": "all-linear"},
}
FIREWORKS = {
    "dataset": "accounts/acme/datasets/court",
    "name": "accounts/acme/supervisedFineTuningJobs/j1",
    "state": "JOB_STATE_COMPLETED",
    "outputModel": "accounts/acme/models/court",
    "baseModel": "accounts/fireworks/models/llama-v3p1-8b-instruct",
    "epochs": 2,
    "learningRate": 0.0002,
    "maxContextLength": 4096,
    "loraRank": 16,
    "batchSize": 65536,
}


def chat(n: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}]}


def tools(n: int) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": f'{{"n": {n}}}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    asked = {"role": "user", "content": f"Call number {n}."}
    return {"messages": [asked, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}


def preference(n: int) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"Which of {n}?"}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": f"good {n}"}],
        "non_preferred_output": [{"role": "assistant", "content": f"bad {n}"}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the three jobs and their files."""
    for name, job in (("openai", OPENAI), ("together", TOGETHER), ("fireworks", FIREWORKS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(job))
    write_jsonl(tmp_path / "t.jsonl", [*map(chat, range(20)), *map(tools, range(5)), *map(preference, range(7))])
    write_jsonl(tmp_path / "v.jsonl", [chat(n) for n in range(100, 108)])
    return tmp_path


def migrated(folder: Path, service: str, *options: str | Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The command's document, the written config and its text."""
    out = folder / "out"
    ran = tunewright(
        "migrate", service, folder / f"{service}.json", "--train", folder / "t.jsonl", "--out", out, "--json", *options
    )
    assert ran.code == 0, ran.stderr
    assert all(difference in ran.stderr.replace("\n", " ") for difference in ran.document["differences"][:1])
    text = (out / "tunewright.yaml").read_text(encoding="utf-8")
    return ran.document, yaml.safe_load(text), text


def test_openai_job_becomes_a_project_with_its_model_as_incumbent(folder: Path) -> None:
    document, config, text = migrated(folder, "openai", "--validation", folder / "v.jsonl")
    assert document["rows"]["train.jsonl"] == {"chat": 20, "tools": 5, "preference": 7}
    assert document["rows"][VALIDATION_FILE] == {"chat": 8, "tools": 0, "preference": 0}
    assert config["train"]["epochs"] == 4
    assert config["seed"] == 683058546
    (incumbent,) = config["evaluate"]["incumbents"]
    assert incumbent == {
        "name": "openai",
        "base_url": "https://api.openai.com/v1",
        "model": "ft:gpt-4o-mini-2024-07-18:acme::A1b2C3d4",
        "api_key_env": "OPENAI_API_KEY",
        "trained_on": ["train.jsonl"],
    }
    named = " ".join(document["differences"])
    assert "batch_size was 'auto'" in named and "learning_rate_multiplier was 1.8" in named
    assert all(f"# - {difference}" in text for difference in document["differences"])


def test_together_job_keeps_its_lora_settings_and_base(folder: Path) -> None:
    document, config, _ = migrated(folder, "together")
    assert config["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"
    expected = {
        "preset": "all-linear",
        "lora_r": 8,
        "lora_alpha": 16,
        "learning_rate": 0.0001,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.05,
        "epochs": 2,
    }
    assert config["train"] == expected
    named = " ".join(document["differences"])
    assert "batch_size was 'max'" in named and "max_grad_norm was 1" in named and "min_lr_ratio" in named


def test_fireworks_job_names_what_has_no_equal(folder: Path) -> None:
    document, config, _ = migrated(folder, "fireworks", "--base", "meta-llama/Llama-3.1-8B-Instruct")
    assert config["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert config["train"] == {"lora_r": 16, "learning_rate": 0.0002, "epochs": 2, "max_length": 4096}
    named = " ".join(document["differences"])
    assert "batchSize was 65536 tokens" in named and "llama-v3p1-8b-instruct" in named


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("openai.json", "{", "openai.json: Not JSON"),
        ("openai.json", '{"object": "list"}', "its object must be 'fine_tuning.job' (got 'list')"),
        (
            "openai.json",
            json.dumps({**OPENAI, "method": {"type": "reinforcement"}}),
            "A reinforcement job has no ideal outputs",
        ),
        ("t.jsonl", '{"messages": []}\nnot json\n', "t.jsonl:2: Not JSON"),
        ("t.jsonl", "\n\n", "t.jsonl: The file has no rows"),
    ],
)
def test_bad_file_is_one_error_and_writes_nothing(folder: Path, file: str, text: str, said: str) -> None:
    (folder / file).write_text(text)
    ran = tunewright(
        "migrate", "openai", folder / "openai.json", "--train", folder / "t.jsonl", "--out", folder / "out"
    )
    assert ran.code == 2
    assert said in ran.stderr
    assert not (folder / "out").exists()
