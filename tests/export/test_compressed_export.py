"""Exports in FP8 and W4A16. Those marked ``vllm`` run llm-compressor in the environment that `make test-vllm` makes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import logits, open_base, read_json
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from making.command_line import tiny_project, trained_project, tunewright
from making.tiny_bases import build_base, byte_tokenizer, chat_of
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.data.versions import load_version
from tunewright.engines.environment import LLMCOMPRESSOR, VLLM, Environment, Tool, find
from tunewright.export import merge as merging
from tunewright.export.compressed import ROWS, Compression, compression, group_size, write_compressed
from tunewright.export.weights import Weights
from tunewright.models.bases import Base
from tunewright.open_project import OpenProject

VERSIONS = {"llmcompressor": "0.14.0.1", "compressed-tensors": "0.19.0", "torch": "2.13.0+cpu"}


def _installed(tool: Tool) -> Environment:
    try:
        return find(tool)
    except UserError as error:
        pytest.skip(f"{error.what}: `make test-vllm` installs it")


# Refusals, and what is given to llm-compressor


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    return tiny_project(tmp_path / "project", build_base(tmp_path / "base"))


def test_export_compressed_names_the_command_that_installs_llmcompressor(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = tunewright("export", "compressed", "-p", untrained)
    assert ran.code == 2
    assert "llm-compressor is not installed" in ran.stderr
    assert "tunewright engine install llmcompressor" in ran.stderr


@pytest.mark.parametrize(("hidden", "middle", "expected"), [(256, 512, 128), (576, 1536, 64), (96, 128, 32)])
def test_group_size_is_the_largest_that_divides_every_row(
    hidden: int, middle: int, expected: int, tmp_path: Path
) -> None:
    assert group_size(_shaped(tmp_path, hidden, middle)) == expected


def test_group_size_refuses_rows_that_no_group_divides(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="rows of a multiple of 32 weights, and this base has rows of 72, 128"
    ) as caught:
        group_size(_shaped(tmp_path, 72, 128))
    assert caught.value.fix == "Use --scheme fp8."


def _shaped(folder: Path, hidden: int, middle: int) -> Base:
    shape = {"hidden_size": hidden, "intermediate_size": middle, "num_attention_heads": 2, "num_key_value_heads": 2}
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape})
    return Base("shaped", folder, None, "LlamaForCausalLM", {})


def test_calibration_rows_are_training_rows_alone(untrained: Path) -> None:
    assert tunewright("data", "add", untrained / "pairs.jsonl", "-p", untrained).code == 0
    opened = OpenProject(ProjectFolder(untrained), LogReporter())
    version = load_version(opened.folder.dataset, None)
    environment = Environment("llmcompressor", untrained, "cpu", VERSIONS)

    def drawn(max_length: int = 2048, seed: int = 0) -> set[tuple[int, ...]]:
        how = compression("w4a16", environment, opened.base, opened.chat, version, max_length=max_length, seed=seed)
        return {tuple(row) for row in how.rows}

    ids = {
        split: {opened.chat.encode(member.example.messages).ids for member in version.domain_of(split)}
        for split in ("train", "dev", "test")
    }
    assert drawn() == {tuple(row) for row in ids["train"]}
    assert len(ids["train"]) < ROWS
    assert not drawn() & {tuple(row) for row in ids["dev"] | ids["test"]}
    shortest = min(map(len, ids["train"]))
    assert {len(row) for row in drawn(shortest)} == {shortest}
    with pytest.raises(UserError, match="No training row is available to calibrate on"):
        drawn(1)


def test_failure_of_llmcompressor_is_one_error_with_the_end_of_its_output(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    environment = Environment("llmcompressor", tmp_path, "cpu", VERSIONS)
    environment.python.write_text("#!/bin/sh\necho loading\necho 'RuntimeError: no Hessian' >&2\nexit 1\n")
    environment.python.chmod(0o755)
    base = open_base(tiny_base_folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="llm-compressor failed:\nloading\nRuntimeError: no Hessian") as caught:
        write_compressed(
            tmp_path / "out",
            Compression("fp8", environment),
            Weights(base, "float32", {}),
            base,
            chat_of(byte_tokenizer()),
            None,
            LogReporter(),
        )
    assert caught.value.where == str(tmp_path)


# With llm-compressor


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project on a bfloat16 base with effective attention and heads that vLLM takes, and an adapter."""
    _installed(LLMCOMPRESSOR)
    folder = tmp_path_factory.mktemp("compressed")
    base = build_base(folder / "base", hidden_size=128, intermediate_size=256)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    return trained_project(
        folder / "project",
        base,
        ("dtype: float32", "dtype: bfloat16"),
        ("0.003", "0.01"),
        ("evaluate:\n", "chat:\n  tools: hermes\nevaluate:\n  max_new_tokens: 3\n"),
    )


@pytest.fixture
def exported(project: Path, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A scheme, and the export in it."""
    ran = tunewright("export", "compressed", "--scheme", request.param, "-p", project, "--json")
    assert ran.code == 0, ran.stderr + ran.stdout
    return request.param, ran.document


@pytest.mark.vllm
@pytest.mark.parametrize("exported", ["fp8", "w4a16"], indirect=True)
def test_compressed_folder_computes_what_its_files_say_and_its_record_is_true(
    exported: tuple[str, dict[str, Any]], project: Path
) -> None:
    scheme, document = exported
    folder = Path(document["folder"])
    tensors = load_file(folder / "model.safetensors")
    ids = AutoTokenizer.from_pretrained(folder)(["What is as red as blue?", "navy teal coral 17"])["input_ids"]
    (adapter,) = ProjectFolder(project).adapters.iterdir()
    base: Any = AutoModelForCausalLM.from_pretrained(project.parent / "base", dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    wanted = copy.deepcopy(merged)
    for name, layer in wanted.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            before = layer.weight.data.clone()
            layer.weight.data = _floats(tensors, name) if scheme == "fp8" else _integers(tensors, name)
            assert _cosine(before, layer.weight.data) > (0.999 if scheme == "fp8" else 0.98), name
            if scheme == "fp8":
                layer.register_forward_pre_hook(_rounded_inputs)
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ours, theirs in zip(logits(wanted, ids), logits(found, ids), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)

    figures, record = document["figures"], read_json(folder / "export.json")
    assert figures["rendered"] == figures["prompts"] > 0
    assert figures["functions_rendered"] == figures["functions"] > 0
    assert document["packages"]["llmcompressor:llmcompressor"] == VERSIONS["llmcompressor"]
    assert {path.name for path in folder.iterdir()} == {*record["files"], "export.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= record["files"].keys()
    assert record == {key: document[key] for key in record}
    again = tunewright("export", "compressed", "--scheme", scheme, "-p", project, "--json")
    assert (again.code, again.document["made"]) == (0, False)


def _floats(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].float()


def _rounded_inputs(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round to FP8 (e4m3, whose largest number is 448) with one scale per token."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / 448
    return ((inputs[0] / scale).to(torch.float8_e4m3fn).float() * scale,)


def _integers(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Unpack 4-bit integers: eight in each int32, the first in the lowest bits, with 8 added."""
    packed, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
    values = torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1) - 8
    return values.float() * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


@pytest.mark.vllm
def test_compressed_base_without_the_adapter_is_not_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "read_deltas", lambda folder: {})
    arguments = ("--to", project / "nothing", "-p", project, "--json")
    ran = tunewright("export", "compressed", *arguments)
    assert ran.code == 3, ran.stderr
    assert any("of the adapter's effect" in fault for fault in ran.document["shortcomings"])
    assert not (project / "nothing").exists()
    assert (project / "nothing.failed.json").exists()


VLLM_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=4)
wanted = SamplingParams(temperature=0, max_tokens=3)
answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
print("\\nAnswers:" + json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


@pytest.mark.vllm
@pytest.mark.parametrize("exported", ["w4a16"], indirect=True)  # vLLM's FP8 kernels need a card
def test_vllm_answers_with_the_compressed_folder(exported: tuple[str, dict[str, Any]], project: Path) -> None:
    folder = exported[1]["folder"]
    opened = OpenProject(ProjectFolder(project), LogReporter())
    version = load_version(opened.folder.dataset, None)
    prompts = [list(opened.chat.prompt(member.example.prompt)) for member in version.domain_of("dev")][:4]
    command = [str(_installed(VLLM).python), "-c", VLLM_SCRIPT, folder, json.dumps(prompts)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables = {**inherited, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (printed,) = [line for line in ran.stdout.splitlines() if line.startswith("Answers:")]
    answers = json.loads(printed.removeprefix("Answers:"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        (after,) = logits(model, [[*prompt, *answer]])
        for place, token in enumerate(answer, len(prompt) - 1):
            assert after[place].max() - after[place][token] < 0.2, (prompt, answer)  # a near tie in bfloat16
