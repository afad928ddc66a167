"""``export`` through the command line, on a tiny trained project: kept and removed results."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import logits, peft_logits, read_json
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from making.command_line import trained_project, tunewright
from making.counted_bases import counted_bases
from making.tiny_bases import build_base
from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.config.project import ProjectFolder
from tunewright.export import merge as merging
from tunewright.export import templates
from tunewright.export.artifact import Export
from tunewright.export.gguf import artifact
from tunewright.export.gguf import model as gguf_model
from tunewright.export.weights import LoraDelta, read_deltas


def _trained(folder: Path, quantization: str = "none") -> Path:
    """Return a project on a bfloat16 base with effective attention, and an adapter that has an effect."""
    base = build_base(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 30
    model.save_pretrained(base)
    return trained_project(
        folder / "project",
        base,
        ("dtype: float32", f"dtype: bfloat16\n  quantization: {quantization}"),
        ("learning_rate: 0.003", "learning_rate: 0.01"),
        # Random weights find many tokens as good as equally likely: of a long answer, 8 bits would change a token.
        ("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("export"))


@pytest.fixture
def project(trained: Path) -> Path:
    shutil.rmtree(trained / "exports", ignore_errors=True)
    return trained


def _adapter(project: Path) -> Path:
    (folder,) = ProjectFolder(project).adapters.iterdir()
    return folder


def _ids(project: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(project.parent / "base")
    return [tokenizer(text)["input_ids"] for text in ("What is as red as blue?", "navy teal coral 17")]


def test_merged_folder_computes_as_peft_and_its_record_is_true(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_bases(monkeypatch) as counts:
        ran = tunewright("export", "merge", "-p", project, "--json")
    assert counts == [0] * 2  # one base is in memory at a time
    assert ran.code == 0, ran.stderr
    folder = Path(ran.document["folder"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(project.parent / "base", dtype=torch.float32)
    ids = _ids(project)
    wanted = peft_logits(project.parent / "base", _adapter(project), ids)
    merged: Any = PeftModel.from_pretrained(copy.deepcopy(base), _adapter(project)).merge_and_unload()
    for weight in merged.parameters():
        weight.data = weight.data.bfloat16().float()
    every = zip(logits(model, ids), wanted, logits(base, ids), logits(merged, ids), strict=True)
    for found, tuned, plain, rounded in every:
        # Rounding to bfloat16 moves a single logit of this random model by more than half of what the adapter does.
        assert torch.allclose(found, rounded, atol=1e-4)
        assert float((found - tuned).abs().mean()) < 0.1 * float((plain - tuned).abs().mean())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16

    figures = ran.document["figures"]
    assert figures["prompts"] == figures["rendered"] == 12
    assert 0 < figures["kl"] < figures["lost"] < 0.02
    assert figures["from_base"] == pytest.approx(figures["effect"], rel=0.5)
    assert ran.document["shortcomings"] == []
    assert ran.document["lineage"] == read_json(_adapter(project) / "lineage.json")
    record = read_json(folder / "export.json")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= record["files"].keys()
    assert record == {key: ran.document[key] for key in record}


def test_merged_folder_of_an_imported_adapter_computes_as_peft(project: Path, tmp_path: Path) -> None:
    stock, other = tmp_path / "stock", tmp_path / "other"
    stock.mkdir()
    shutil.copyfile(_adapter(project) / WEIGHTS, stock / WEIGHTS)
    config = read_json(_adapter(project) / CONFIG)
    (stock / CONFIG).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}), encoding="utf-8")
    shutil.copytree(project, other, ignore=shutil.ignore_patterns("adapters", "exports"))
    options = ("--base-matches", "--unsigned", "-p", other, "--json")
    imported = tunewright("adapters", "import", stock, *options)
    assert imported.code == 0, imported.stderr
    ran = tunewright("export", "merge", imported.document["adapter"], "-p", other, "--json")
    assert ran.code == 0, ran.stderr
    assert (
        "bfloat16 is assumed: the adapter's lineage does not name the precision of its training"
        in ran.document["notes"]
    )
    model: Any = AutoModelForCausalLM.from_pretrained(ran.document["folder"], dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(project.parent / "base", dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, stock).merge_and_unload()
    for found, wanted in zip(model.parameters(), merged.parameters(), strict=True):
        assert torch.equal(found, wanted.bfloat16().float())


def test_export_finds_its_result_and_refuses_changed_or_foreign_folders(project: Path) -> None:
    folder = Path(tunewright("export", "merge", "-p", project, "--json").document["folder"])
    again = tunewright("export", "merge", "-p", project, "--json")
    assert (again.code, again.document["made"]) == (0, False)

    record = folder / "export.json"
    text = record.read_text(encoding="utf-8")
    record.write_text(text.replace('"kind": "merged"', '"kind": "gguf"'), encoding="utf-8")
    assert "cannot be read" in tunewright("export", "merge", "-p", project).stderr
    record.write_text(text, encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    changed = tunewright("export", "merge", "-p", project)
    assert changed.code == 2
    assert "Exported files have changed: config.json" in changed.stderr

    foreign = tunewright("export", "merge", "-p", project, "--to", project / "dataset")
    assert foreign.code == 2
    assert "is not an export" in foreign.stderr


def test_gguf_and_ollama_exports_are_run_and_kept(project: Path) -> None:
    exports = project / "exports"
    for arguments in (["gguf"], ["gguf", "--merged"], ["gguf", "--merged", "--type", "q8_0"]):
        ran = tunewright("export", *arguments, "-p", project, "--json")
        assert ran.code == 0, ran.stderr + ran.stdout
        assert ran.document["figures"]["arithmetic"] == "llama.cpp"
        assert ran.document["figures"]["greedy"] >= 0.9
    ran = tunewright("export", "ollama", "--lora", "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    folder = Path(ran.document["folder"])
    lines = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    named = [line.split("./")[1] for line in lines if line.startswith(("FROM ", "ADAPTER "))]
    assert len(named) == 2
    # Newer versions of Ollama refuse the file.
    assert "0.34.1" in ran.stderr
    assert "Leave out --lora" in ran.stderr
    assert {path.name for path in folder.iterdir()} == {"Modelfile", "export.json", *named}
    assert len(list(exports.iterdir())) == 4


FAULTS: dict[str, tuple[list[str], Callable[[pytest.MonkeyPatch], None], str]] = {}


def _fault(arguments: list[str], message: str) -> Callable[[Callable[[pytest.MonkeyPatch], None]], None]:
    def plant(fault: Callable[[pytest.MonkeyPatch], None]) -> None:
        FAULTS[f"{fault.__name__}, {' '.join(arguments)}"] = arguments, fault, message

    return plant


@_fault(["merge"], "it is the base")
def merged_with_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merging, "read_deltas", lambda folder: {})


@_fault(["merge"], "of the adapter's effect")
def twice_the_scale(patch: pytest.MonkeyPatch) -> None:
    def doubled(folder: Path) -> dict[str, LoraDelta]:
        return {name: replace(change, scale=2 * change.scale) for name, change in read_deltas(folder).items()}

    patch.setattr(merging, "read_deltas", doubled)


@_fault(["merge"], "to other tokens than training did")
def another_template(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merging, "exported_template", lambda *given: templates.exported_template(*given) + "\n ")


@_fault(["gguf", "--merged"], "of the adapter's effect")
def queries_and_keys_in_the_order_of_transformers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_model, "interleaved", lambda rows, heads: rows)


@_fault(["gguf", "--merged"], "to other tokens than training did")
def another_template_in_the_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_model, "exported_template", lambda *given: templates.exported_template(*given) + "\n ")


@_fault(["gguf", "--merged"], "llama.cpp rejected the file")
def a_file_that_is_none(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(artifact, "add_tokenizer", lambda *given: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_export_detects_a_planted_fault_and_keeps_only_the_record(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, plant, message = FAULTS[name]
    plant(monkeypatch)
    ran = tunewright("export", *arguments, "-p", project, "--json")
    assert ran.code == 3, ran.stderr
    assert any(message in fault for fault in ran.document["shortcomings"]), ran.document["shortcomings"]
    assert ran.document["folder"] is None
    (left,) = (project / "exports").iterdir()
    assert left.name.endswith(".failed.json")
    assert Export.model_validate(read_json(left)).shortcomings

    monkeypatch.undo()
    if name.startswith("merged_with_nothing"):
        mended = tunewright("export", *arguments, "-p", project)
        assert mended.code == 0
        assert [path.suffix for path in (project / "exports").iterdir()] != [".json"]


@pytest.mark.slow
def test_merge_over_nf4_measures_both_methods_and_takes_the_closer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _trained(tmp_path, "nf4")
    with counted_bases(monkeypatch) as counts:
        ran = tunewright("export", "merge", "-p", project, "--json")
    # One base is in memory at a time: the trained model's, one for each method, and the merged folder.
    assert counts == [0] * 4
    ways = {way["way"]: way["kl"] for way in ran.document["ways"]}
    assert ways.keys() == {"original", "dequantized"}
    assert ran.document["way"] == min(ways, key=lambda way: ways[way]) == "dequantized"
    assert ways["original"] > 2 * ways["dequantized"]
    assert f"Merged into the {ran.document['way']} base" in ran.stderr
    assert ran.code == 0, ran.document["shortcomings"]
