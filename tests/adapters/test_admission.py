"""Foreign adapters: valid ones are imported unchanged, what is stored was checked, and claims are not believed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import tunewright as api
from making.command_line import tiny_project, tunewright
from making.small_adapters import (
    claim,
    create_key,
    import_adapter,
    lora_config,
    lora_weights,
    own_keys,
    refused_import,
    tree,
    write_adapter,
)
from making.tiny_bases import build_base
from tunewright.adapters.foreign import importer as admission
from tunewright.adapters.foreign import quarantine
from tunewright.adapters.foreign.documents import read_config
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.lineage import SystemPrompt, system_prompt
from tunewright.adapters.manifest import MANIFEST, SIGNATURE
from tunewright.adapters.registry import (
    CONFIG,
    WEIGHTS,
    Adapter,
    adapter_digest,
    find_adapter,
    list_adapters,
    write_manifest,
)
from tunewright.adapters.signing import sign, signing_key
from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.evidence.files import load_evidence, load_items
from tunewright.evidence.verdict import verdict
from tunewright.models.families import read_shape
from tunewright.serving.options import ServeOptions

pytest_plugins = "making.adapter_projects"


@pytest.fixture(autouse=True)
def _keys_of_my_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


# Good ones


@pytest.mark.slow
def test_imported_own_adapter_is_identical_and_evaluates_the_same(trained: Path, ours: Path, other: Path) -> None:
    ran = import_adapter(other, ours)
    assert ran.code == 0, ran.stderr
    assert (ran.document["adapter"], ran.document["lineage"]) == (ours.name, "its own")
    stored = Path(ran.document["folder"])
    assert tree(stored).keys() == tree(ours).keys() | {"local.json"}
    assert {name: data for name, data in tree(stored).items() if name != "local.json"} == tree(ours)

    there, here = (api.open(folder).evaluate(ours.name) for folder in (trained, other))
    answers = [[item.answers for item in load_items(result.folder)] for result in (there, here)]
    assert answers[0] == answers[1]
    evidence = load_evidence(here.folder)
    assert any("its training data is only claimed" in reason for reason in verdict(evidence).reasons)
    assert not any("imported" in reason for reason in verdict(load_evidence(there.folder)).reasons)
    shown = tunewright("adapters", "show", "-p", other, "--json").document
    assert shown["evaluations"] == [{"id": evidence.id, "decision": verdict(evidence).decision}]


def test_imported_peft_adapter_is_served_as_peft_answers(stock: Path, other: Path, tiny_base_folder: Path) -> None:
    ran = import_adapter(other, stock, "--base-matches")
    assert ran.code == 0, ran.stderr
    assert "README.md is not imported." in ran.stderr
    name = ran.document["adapter"]
    assert name == f"stock-{adapter_digest(stock)[:12]}"
    stored = Path(ran.document["folder"])
    assert [(stored / f).read_bytes() for f in (CONFIG, WEIGHTS)] == [
        (stock / f).read_bytes() for f in (CONFIG, WEIGHTS)
    ]

    opened = api.open(other)
    messages = [{"role": "user", "content": "red green blue"}]
    base = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    prompt = torch.tensor([opened.chat.prompt([Message("user", "red green blue")])])
    plain = base.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    tuned = PeftModel.from_pretrained(base, stock).generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    expected = tuned[0, prompt.shape[1] :]
    assert expected.tolist() != plain.tolist()
    with opened.serve([name], ServeOptions(port=0)).running() as url:
        body = {"model": name, "messages": messages, "max_tokens": 12}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == opened.chat.text(expected.tolist())


def test_import_records_statements_and_nothing_unknown(stock: Path, other: Path) -> None:
    assert import_adapter(other, stock, "--base-matches", "--quantization", "nf4").code == 0
    (adapter,) = api.open(other).adapters.list()
    lineage = adapter.lineage
    assert lineage["stated"]["names_base"]
    assert (adapter.quantization, adapter.dataset) == ("nf4", None)
    assert not {"config", "training", "dataset", "inputs_digest"} & lineage.keys()
    shown = tunewright("adapters", "show", "-p", other)
    assert "dataset: unknown" in shown.stdout
    assert "not verified" in shown.stdout
    assert tunewright("data", "trained-by", "pairs.jsonl:1", "-p", other).stdout.startswith(f"{adapter.name}: unknown")


def test_system_prompt_of_a_foreign_adapter_is_the_stated_one(stock: Path, ours: Path, other: Path) -> None:
    assert import_adapter(other, stock, "--base-matches", "--system-prompt", "Cite the cafe\u0301.").code == 0
    (adapter,) = api.open(other).adapters.list()
    assert system_prompt(adapter, other / "dataset") == SystemPrompt("Cite the café.")
    assert "has its own lineage" in refused_import(other, ours, "--system-prompt", "Cite.")
    marks = "e" + "\u0300\u0316" * 16
    refusal = "The system prompt has more than 30 combining marks in a row, from character 2"
    assert refusal in refused_import(other, stock, "--base-matches", "--system-prompt", marks)
    assert "The system prompt is empty" in refused_import(other, stock, "--base-matches", "--system-prompt", " ")


def test_16_bit_weights_are_imported(other: Path, tmp_path: Path) -> None:
    weights = {name: weight.astype(np.float16) for name, weight in lora_weights().items()}
    assert import_adapter(other, write_adapter(tmp_path / "good", weights=weights), "--base-matches").code == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 3}},
        {"alpha_pattern": {"q_proj": 32}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0},
    ],
)
def test_modules_ranks_and_scales_equal_those_of_peft(changes: dict[str, Any], tiny_base_folder: Path) -> None:
    """So peft loads exactly the weights that pass the checks of names and shapes."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base_folder), LoraConfig(**values))
    prefix = "base_model.model."
    layers = {name.removeprefix(prefix): part for name, part in model.named_modules() if hasattr(part, "lora_A")}
    shape = read_shape(tiny_base_folder / "config.json")
    config = read_config(json.dumps(lora_config(**values)).encode(), shape, "LlamaForCausalLM", "config")
    expected: Any = {m: (part.r["default"], pytest.approx(part.scaling["default"])) for m, part in layers.items()}
    assert {m: config.rank_and_scale(m) for m in config.modules} == expected


@pytest.mark.parametrize("size", [0.9, 1.1])
def test_change_limit_is_the_ratio_of_frobenius_norms(
    size: float, other: Path, tmp_path: Path, tiny_base_folder: Path
) -> None:
    """Brute force: scale·BA is computed in full, and scaled to ``size`` times the limit of 2."""
    weights = lora_weights(seed=3)
    stem = "base_model.model.model.layers.1.self_attn.v_proj"
    base = load_file(tiny_base_folder / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    product = 8 / 4 * weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
    weights[f"{stem}.lora_B.weight"] *= np.float32(2 * size * np.linalg.norm(base) / np.linalg.norm(product))
    ran = import_adapter(other, write_adapter(tmp_path / "large", weights=weights), "--base-matches")
    assert ran.code == (0 if size < 1 else 2)
    if size > 1:
        assert f"is {2 * size:.1f} times their norm" in ran.document["error"]["what"]


@pytest.mark.parametrize(("a", "b", "alpha"), [(6e4, 1e-8, 8), (3e2, 3e2, 1e-6), (1e3, 1e-7, 8), (1.0, 1e-3, 8)])
def test_weights_whose_products_overflow_float16_are_refused(
    a: float, b: float, alpha: float, other: Path, tmp_path: Path
) -> None:
    """Reference: float16 itself, on an input of ones."""
    weights = {
        name: np.full(tensor.shape, a if "lora_A" in name else b, tensor.dtype)
        for name, tensor in lora_weights(seed=3).items()
    }
    stem = "base_model.model.model.layers.1.self_attn.v_proj"
    down, up = (weights[f"{stem}.lora_{half}.weight"].astype(np.float16) for half in "AB")
    with np.errstate(over="ignore"):
        inner = down @ np.ones(down.shape[1], np.float16)
        finite = bool(np.isfinite(inner).all() and np.isfinite(up @ inner).all())
    adapter = write_adapter(tmp_path / "products", weights=weights, config=lora_config(lora_alpha=alpha))
    ran = import_adapter(other, adapter, "--base-matches")
    assert ran.code == (0 if finite else 2)
    if not finite:
        assert "overflows float16" in ran.document["error"]["what"]


# Quarantine


def test_stored_files_are_the_checked_ones_when_the_source_changes(
    stock: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = tree(stock)
    take = quarantine.quarantine_folder

    def then_change(source: Path, intake: Any) -> None:
        take(source, intake)
        for path in source.iterdir():
            path.write_bytes(b"evil")

    monkeypatch.setattr(admission, "quarantine_folder", then_change)
    ran = import_adapter(other, stock, "--base-matches")
    assert ran.code == 0, ran.stdout
    stored = tree(Path(ran.document["folder"]))
    assert [stored[name] for name in (CONFIG, WEIGHTS)] == [checked[name] for name in (CONFIG, WEIGHTS)]


def test_file_replaced_by_a_link_is_not_followed(
    stock: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    look = quarantine._require_plain

    def then_swap(kind: int, where: str) -> None:
        look(kind, where)
        if CONFIG in where:
            (stock / CONFIG).unlink()
            (stock / CONFIG).symlink_to(secret)

    monkeypatch.setattr(quarantine, "_require_plain", then_swap)
    assert "Cannot read the file: Too many levels of symbolic links" in refused_import(other, stock, "--base-matches")


def test_import_removes_leftovers_of_killed_imports_only(stock: Path, other: Path) -> None:
    left, running = other / ".quarantine-killed", other / ".quarantine-running"
    for folder in (left, running):
        write_adapter(folder / "adapter")
    handle = os.open(running, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        assert import_adapter(other, stock, "--base-matches").code == 0
        assert not left.exists()
        assert running.exists()
    finally:
        os.close(handle)


def test_import_of_a_known_adapter_overwrites_nothing(stock: Path, other: Path) -> None:
    first = import_adapter(other, stock, "--base-matches").document
    before = tree(other)
    second = import_adapter(other, stock, "--base-matches").document
    assert (first["new"], second["new"]) == (True, False)
    assert tree(other) == before
    assert Adapter(Path(first["folder"])).imported is not None


def test_find_adapter_prefers_one_trained_here_without_a_name(stock: Path, trained: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "mixed"))
    (own,) = list_adapters(project / "adapters")
    assert import_adapter(project, stock, "--base-matches").code == 0
    assert list_adapters(project / "adapters")[-1].imported is not None
    assert find_adapter(project / "adapters").name == own.name


# What it says of itself


def test_import_requires_a_stated_base_without_digests(stock: Path, other: Path) -> None:
    assert "--base-matches" in refused_import(other, stock)


def test_import_refuses_another_base_and_names_the_differing_files(ours: Path, tmp_path: Path) -> None:
    project = tiny_project(tmp_path / "elsewhere", build_base(tmp_path / "another-base", seed=1))
    assert "other model.safetensors" in refused_import(project, ours)


def _other_weights(ours: Path) -> None:
    weights = load_file(ours / WEIGHTS)
    save_file({name: weight * np.float32(0.5) for name, weight in weights.items()}, ours / WEIGHTS)


def _lineage_of_others(ours: Path) -> None:
    _other_weights(ours)
    (ours / MANIFEST).unlink()


def _record(file: str, line: str) -> Callable[[Path], None]:
    def write(ours: Path) -> None:
        (ours / file).write_text(line)
        write_manifest(ours, ours.name)

    return write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ours: claim(ours, template_digest="0" * 64), "The adapter was trained with another chat template"),
        (_lineage_of_others, "The lineage belongs to other weights"),
        (lambda ours: claim(ours, "dataset"), "Not a lineage of this version of tunewright: dataset: Field required"),
        (lambda ours: claim(ours, created="whenever"), "created: String should match"),
        (lambda ours: claim(ours, seed="\x1b]0;owned\x07"), "A text has the control character 0x1b"),
        (lambda ours: claim(ours, packages={"\x9b2J": "1"}), "A text has the control character 0x9b"),
        (lambda ours: claim(ours, training={"kept_step": 1}), "training.seconds"),
        (_record("metrics.jsonl", '{"step": "one"}\n'), "metrics.jsonl:1: Not a line of metrics"),
        (_record("metrics.jsonl", '{"step": NaN}\n'), "NaN is not JSON"),
        (_record("replay.jsonl", '{"messages": [{"role": "root", "content": ""}]}\n'), "replay.jsonl:1: Not a conv"),
        (
            lambda ours: (ours / "metrics.jsonl").write_text("{}\n"),
            "metrics.jsonl has changed",
        ),
        (lambda ours: write_manifest(ours, "tiny-000000000000"), "The manifest names tiny-000000000000"),
    ],
)
def test_import_refuses_a_wrong_claim(change: Callable[[Path], Any], words: str, ours: Path, other: Path) -> None:
    change(ours)
    assert words in refused_import(other, ours)


def test_import_refuses_statements_that_the_adapter_makes_itself(ours: Path, other: Path) -> None:
    assert "The lineage already says so by digest" in refused_import(other, ours, "--base-matches")
    assert "The manifest names the adapter already" in refused_import(other, ours, "--name", "mine")


def test_import_checks_earlier_checkpoints_like_the_adapter(ours: Path, other: Path) -> None:
    path = next(ours.glob(f"checkpoints/*/{WEIGHTS}"))
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name][0, 0] = np.nan
    save_file(weights, path)
    write_manifest(ours, ours.name)
    message = refused_import(other, ours)
    assert f"checkpoints/{path.parent.name}/{WEIGHTS}, {name}: 1 of " in message
    path.unlink()
    write_manifest(ours, ours.name)
    assert f"{WEIGHTS} is missing" in refused_import(other, ours)


def test_import_refuses_a_path_as_name(stock: Path, other: Path, tmp_path: Path) -> None:
    for name in ("../evil", "Evil", "évil", "a" * 60, ""):
        folder = stock if name else Path(shutil.copytree(stock, tmp_path / "Ünnamed"))
        options = ["--name", name] if name else []
        assert "Invalid name" in refused_import(other, folder, "--base-matches", *options)
    assert import_adapter(other, stock, "--base-matches", "--name", "mine").document["adapter"].startswith("mine-")


def test_unsigned_claim_of_inputs_does_not_prevent_training(ours: Path, other: Path) -> None:
    """The claim names the inputs that this project would train on; the weights are others."""
    _other_weights(ours)
    claim(ours, digest=adapter_digest(ours))
    forged = ours.rename(ours.with_name(f"tiny-{adapter_digest(ours)[:12]}"))
    write_manifest(forged, forged.name)
    assert import_adapter(other, forged).code == 0
    result = api.open(other).train()
    assert result.trained
    assert result.adapter.name != forged.name


# Signatures


def _signed(folder: Path, project: Path, name: str = "ann", *, trust: bool = True) -> None:
    public = create_key(name)
    elsewhere = TrustedKeys(folder.parent / name / "keys")
    (folder.parent / name).mkdir()
    elsewhere.trust(public)
    sign(folder, signing_key(TrustedKeys(elsewhere.folder), name))
    if trust:
        api.open(project).keys.trust(public)


def test_import_believes_claims_signed_by_a_trusted_key(ours: Path, other: Path) -> None:
    _signed(ours, other)
    assert import_adapter(other, ours).document["signed"] == "signed"
    (adapter,) = api.open(other).adapters.list()
    assert adapter.was_trained_by(adapter.lineage["inputs_digest"])
    assert tunewright("adapters", "verify", "-p", other).code == 0


def test_import_refuses_unsigned_adapters_when_keys_are_trusted(ours: Path, other: Path) -> None:
    api.open(other).keys.trust(create_key("ann"))
    assert "The adapter is unsigned, and this project requires a trusted signature" in refused_import(other, ours)
    _signed(ours, other, "bob", trust=False)
    assert "The adapter is untrusted, and this project requires a trusted signature" in refused_import(other, ours)
    assert import_adapter(other, ours, "--unsigned").document["signed"] == "untrusted"
    assert tunewright("adapters", "verify", "-p", other).code == 4
    with pytest.raises(UserError, match="The adapter is untrusted"):
        api.open(other).serve([ours.name])


def test_import_refuses_a_foreign_signature_and_a_revoked_key_even_with_unsigned(ours: Path, other: Path) -> None:
    _signed(ours, other)
    api.open(other).keys.revoke("ann", "it leaked")
    assert "ann was revoked on" in refused_import(other, ours, "--unsigned")
    claim(ours, seed=7)
    assert "the signature of ann is of another manifest" in refused_import(other, ours, "--unsigned")


def test_import_refuses_a_signature_that_nobody_can_check(
    ours: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _signed(ours, other)
    monkeypatch.setenv("PATH", str(ours))
    refused = refused_import(other, ours)
    assert "The adapter is not checked, and this project requires a trusted signature" in refused
    assert "ssh-keygen is not installed" in refused
    assert import_adapter(other, ours, "--unsigned").document["signed"] == "not checked"
    assert tunewright("adapters", "verify", "-p", other).code == 4


def test_import_refuses_a_signature_without_a_manifest(ours: Path, other: Path) -> None:
    _signed(ours, other)
    (ours / MANIFEST).unlink()
    assert f"a signature but no {MANIFEST}" in refused_import(other, ours)
    assert (ours / SIGNATURE).exists()
