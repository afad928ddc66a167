"""Good adapters come in as they are, ours and peft's; and what an adapter says of itself is held to the project."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
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
from adapter_helpers import lora_config, lora_weights, own_keys, tree, write_adapter
from command_line import tiny_project, tunewright
from tiny import build_base
from tunewright.adapters.admission import admit as admission
from tunewright.adapters.admission.config import read_config
from tunewright.adapters.admission.quarantine import take_folder
from tunewright.adapters.keys import new_private_key
from tunewright.adapters.manifest import MANIFEST, SIGNATURE
from tunewright.adapters.registry import CONFIG, LINEAGE, WEIGHTS, Adapter, adapter_digest, write_manifest
from tunewright.data.examples import Message
from tunewright.disk import write_json
from tunewright.errors import UserError
from tunewright.evaluation.evidence import load_evidence, load_items
from tunewright.evaluation.verdict import verdict
from tunewright.models.fit.shape import read_shape


@pytest.fixture(autouse=True)
def _keys_of_my_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter of its own."""
    folder = tiny_project(tmp_path_factory.mktemp("trained") / "project", tiny_base_folder)
    road = api.open(folder)
    road.data.add([folder / "pairs.jsonl"])
    road.train()
    return folder


@pytest.fixture
def ours(trained: Path, tmp_path: Path) -> Path:
    """A copy of that adapter, to be changed and imported."""
    (adapter,) = (trained / "adapters").iterdir()
    return Path(shutil.copytree(adapter, tmp_path / "came" / adapter.name))


@pytest.fixture
def other(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """Another project on the same base, with the same pairs."""
    folder = tiny_project(tmp_path / "other", tiny_base_folder)
    api.open(folder).data.add([folder / "pairs.jsonl"])
    return folder


@pytest.fixture
def stock(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """An adapter as peft saves it, with its README, and weights that change the answers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tuned.save_pretrained(str(tmp_path / "stock"))
    assert (tmp_path / "stock" / "README.md").exists()
    return tmp_path / "stock"


def _import(project: Path, source: Path, *options: str) -> Any:
    return tunewright("adapters", "import", source, "-p", project, "--json", *options)


# Good ones


def test_ours_comes_in_to_the_byte_and_is_evaluated_as_where_it_was_trained(
    trained: Path, ours: Path, other: Path
) -> None:
    ran = _import(other, ours)
    assert ran.code == 0, ran.stderr
    assert (ran.document["adapter"], ran.document["lineage"]) == (ours.name, "its own")
    stored = Path(ran.document["folder"])
    assert tree(stored).keys() == tree(ours).keys() | {"local.json"}
    assert {name: data for name, data in tree(stored).items() if name != "local.json"} == tree(ours)

    there, here = (api.open(folder).evaluate(ours.name) for folder in (trained, other))
    answers = [[item.answers for item in load_items(result.folder)] for result in (there, here)]
    assert answers[0] == answers[1]
    evidence = load_evidence(here.folder)
    assert any("what it was trained on is only claimed" in reason for reason in verdict(evidence).reasons)
    assert not any("imported" in reason for reason in verdict(load_evidence(there.folder)).reasons)
    shown = tunewright("adapters", "show", "-p", other, "--json").document
    assert shown["evaluations"] == [{"id": evidence.id, "decision": verdict(evidence).decision}]


def test_pefts_own_is_served_as_peft_answers(stock: Path, other: Path, tiny_base_folder: Path) -> None:
    ran = _import(other, stock, "--base-matches")
    assert ran.code == 0, ran.stderr
    assert "README.md is not taken along." in ran.stderr
    name = ran.document["adapter"]
    assert name == f"stock-{adapter_digest(stock)[:12]}"
    stored = Path(ran.document["folder"])
    assert [(stored / f).read_bytes() for f in (CONFIG, WEIGHTS)] == [
        (stock / f).read_bytes() for f in (CONFIG, WEIGHTS)
    ]

    road = api.open(other)
    messages = [{"role": "user", "content": "red green blue"}]
    base = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    prompt = torch.tensor([road.chat.prompt([Message("user", "red green blue")])])
    plain = base.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    tuned = PeftModel.from_pretrained(base, stock).generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    expected = tuned[0, prompt.shape[1] :]
    assert expected.tolist() != plain.tolist()
    with road.serve([name]).running() as url:
        body = {"model": name, "messages": messages, "max_tokens": 12}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == road.chat.text(expected.tolist())


def test_it_says_who_stated_what_and_nothing_that_is_not_known(stock: Path, other: Path) -> None:
    assert _import(other, stock, "--base-matches", "--quantize", "nf4").code == 0
    (adapter,) = api.open(other).adapters.list()
    lineage = adapter.lineage
    assert lineage["stated"]["names_base"]
    assert (adapter.quantize, adapter.dataset) == ("nf4", None)
    assert not {"recipe", "training", "dataset", "inputs_digest"} & lineage.keys()
    shown = tunewright("adapters", "show", "-p", other)
    assert "dataset: not known" in shown.stderr
    assert "not proved" in shown.stderr
    assert tunewright("data", "where", "pairs.jsonl:1", "-p", other).stderr.startswith(f"{adapter.name}: unknown")


def _zip(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as opened:
        for path in sorted(folder.rglob("*")):
            opened.write(path, f"{folder.name}/{path.relative_to(folder)}")
    return target


def _tar(mode: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, target: Path) -> Path:
        with tarfile.open(target, mode) as tar:
            tar.add(folder, f"./{folder.name}")
        return target

    return write


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.zip", _zip),
        ("a.tar", _tar("w:")),
        ("a.tar.gz", _tar("w:gz")),
        ("a.tar.xz", _tar("w:xz")),
        ("a.tbz", _tar("w:bz2")),
    ],
)
def test_archives_bring_what_the_folder_has(
    name: str, write: Callable[[Path, Path], Path], ours: Path, other: Path, tmp_path: Path
) -> None:
    ran = _import(other, write(ours, tmp_path / name))
    assert ran.code == 0, ran.stdout
    stored = Path(ran.document["folder"])
    assert {path: data for path, data in tree(stored).items() if path != "local.json"} == tree(ours)
    assert _import(other, ours).document["new"] is False


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sixteen_bits_come_in_too(dtype: Any, other: Path, tmp_path: Path) -> None:
    weights = {name: weight.astype(dtype) for name, weight in lora_weights().items()}
    assert _import(other, write_adapter(tmp_path / "good", weights=weights), "--base-matches").code == 0


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
def test_modules_ranks_and_scales_are_those_that_peft_makes(changes: dict[str, Any], tiny_base_folder: Path) -> None:
    """And so whatever passes the check of names and shapes is all that peft loads."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base_folder), LoraConfig(**values))
    prefix = "base_model.model."
    layers = {name.removeprefix(prefix): part for name, part in model.named_modules() if hasattr(part, "lora_A")}
    shape = read_shape(tiny_base_folder / "config.json")
    config = read_config(json.dumps(lora_config(**values)).encode(), shape, "config")
    assert {m: config.rank(m) for m in config.modules} == {m: part.r["default"] for m, part in layers.items()}
    scales = {m: part.scaling["default"] for m, part in layers.items()}
    assert {m: config.scale(m) for m in config.modules} == pytest.approx(scales)


@pytest.mark.parametrize("size", [0.5, 0.9, 1.1, 2.0])
def test_the_cap_on_the_change_is_the_norm_of_the_product_over_the_bases(
    size: float, other: Path, tmp_path: Path, tiny_base_folder: Path
) -> None:
    """Brute force: scale·BA is computed whole, and brought to ``size`` times the cap of 2."""
    weights = lora_weights(seed=3)
    stem = "base_model.model.model.layers.1.self_attn.v_proj"
    base = load_file(tiny_base_folder / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    product = 8 / 4 * weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
    weights[f"{stem}.lora_B.weight"] *= np.float32(2 * size * np.linalg.norm(base) / np.linalg.norm(product))
    ran = _import(other, write_adapter(tmp_path / "large", weights=weights), "--base-matches")
    assert ran.code == (0 if size < 1 else 2)
    if size > 1:
        assert f"by {2 * size:.1f} times their norm" in ran.document["error"]["what"]


# What it says of itself


def _lineage(folder: Path, *gone: str, **changes: Any) -> None:
    """Change an adapter's lineage as somebody would who has no key: the manifest with it."""
    lineage = {**json.loads((folder / LINEAGE).read_text()), **changes}
    write_json(folder / LINEAGE, {key: value for key, value in lineage.items() if key not in gone})
    write_manifest(folder, folder.name)


def _refused(project: Path, source: Path, *options: str) -> str:
    before = tree(project)
    ran = _import(project, source, *options)
    assert ran.code == 2
    assert tree(project) == before
    error = ran.document["error"]
    return f"{error['where']}: {error['what']}\n{error['fix']}"


def test_without_digests_the_base_has_to_be_stated(stock: Path, other: Path) -> None:
    told = _refused(other, stock)
    assert "does not say by digest which base and chat template it was trained with" in told
    assert "--base-matches" in told


def test_with_digests_nothing_is_to_be_stated(ours: Path, other: Path) -> None:
    assert "its lineage says so by digest" in _refused(other, ours, "--base-matches")


def test_another_base_is_refused_by_the_files_that_differ(ours: Path, tmp_path: Path) -> None:
    project = tiny_project(tmp_path / "elsewhere", build_base(tmp_path / "another-base", seed=1))
    told = _refused(project, ours)
    assert "and the base here is" in told
    assert "other model.safetensors" in told


def test_another_chat_template_is_refused(ours: Path, other: Path) -> None:
    _lineage(ours, template_digest="0" * 64)
    assert "it was trained with another chat template" in _refused(other, ours)


def test_a_lineage_of_other_weights_is_refused(ours: Path, other: Path) -> None:
    weights = load_file(ours / WEIGHTS)
    save_file({name: weight * np.float32(0.5) for name, weight in weights.items()}, ours / WEIGHTS)
    (ours / MANIFEST).unlink()
    assert "its lineage is that of other weights" in _refused(other, ours)


@pytest.mark.parametrize(
    ("gone", "changes", "words"),
    [
        (("dataset",), {}, "not a lineage of this version of tunewright: dataset: Field required"),
        ((), {"created": "whenever"}, "created: String should match"),
        ((), {"seed": "\x1b]0;owned\x07"}, "a text holds the control character 0x1b"),
        ((), {"packages": {"\x9b2J": "1"}}, "a text holds the control character 0x9b"),
        ((), {"training": {"kept_step": 1}}, "training.seconds"),
        ((), {"scaled": {"parent": 7}}, "scaled.parent"),
    ],
)
def test_a_lineage_that_is_none_is_refused(
    gone: tuple[str, ...], changes: dict[str, Any], words: str, ours: Path, other: Path
) -> None:
    _lineage(ours, *gone, **changes)
    assert words in _refused(other, ours)


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("metrics.jsonl", b'{"step": "one"}\n', "metrics.jsonl:1: not a line of metrics"),
        ("metrics.jsonl", b'{"step": NaN}\n', "NaN is no number of JSON"),
        ("replay.jsonl", b'{"messages": [{"role": "root", "content": ""}]}\n', "replay.jsonl:1: not a conversation"),
    ],
)
def test_records_of_a_training_that_are_none_are_refused(
    file: str, line: bytes, words: str, ours: Path, other: Path
) -> None:
    (ours / file).write_bytes(line)
    write_manifest(ours, ours.name)
    assert words in _refused(other, ours)


def test_earlier_checkpoints_are_held_to_the_same(ours: Path, other: Path) -> None:
    path = next(ours.glob(f"checkpoints/*/{WEIGHTS}"))
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name][0, 0] = np.nan
    save_file(weights, path)
    write_manifest(ours, ours.name)
    told = _refused(other, ours)
    assert f"checkpoints/{path.parent.name}/{WEIGHTS}, {name}: 1 of its" in told
    path.unlink()
    write_manifest(ours, ours.name)
    assert f"it is missing: {WEIGHTS}" in _refused(other, ours)


def test_a_manifest_that_is_not_of_these_files_is_refused(ours: Path, other: Path) -> None:
    (ours / "metrics.jsonl").write_text("{}\n")
    assert "it is not what its manifest says: metrics.jsonl has changed" in _refused(other, ours)


def test_a_manifest_of_another_name_is_refused(ours: Path, other: Path) -> None:
    write_manifest(ours, "tiny-000000000000")
    assert "its manifest is that of tiny-000000000000" in _refused(other, ours)
    write_manifest(ours, ours.name)
    assert "its manifest names it" in _refused(other, ours, "--name", "mine")


def test_a_name_is_no_path(stock: Path, other: Path, tmp_path: Path) -> None:
    for name in ("../evil", "Evil", "évil", "a" * 60, ""):
        folder = stock if name else Path(shutil.copytree(stock, tmp_path / "Ünnamed"))
        options = ["--name", name] if name else []
        assert "is no name" in _refused(other, folder, "--base-matches", *options)
    assert _import(other, stock, "--base-matches", "--name", "mine").document["adapter"].startswith("mine-")


def test_an_adapter_that_only_claims_to_be_done_does_not_keep_the_project_from_training(
    ours: Path, other: Path
) -> None:
    """The claim is of the very inputs that this project would train on, and the weights are not what comes of them."""
    weights = load_file(ours / WEIGHTS)
    save_file({name: weight * np.float32(0.5) for name, weight in weights.items()}, ours / WEIGHTS)
    _lineage(ours, digest=adapter_digest(ours))
    forged = ours.rename(ours.with_name(f"tiny-{adapter_digest(ours)[:12]}"))
    write_manifest(forged, forged.name)
    assert _import(other, forged).code == 0
    result = api.open(other).train()
    assert result.trained
    assert result.adapter.name != forged.name


# Signatures


def _signed(folder: Path, project: Path, name: str = "ann", *, trust: bool = True) -> None:
    from tunewright.adapters.signing import sign

    key = new_private_key(name)
    sign(folder, key)
    if trust:
        api.open(project).keys.trust(name)


def test_signed_by_a_trusted_key_it_comes_in_signed_and_what_it_claims_is_believed(ours: Path, other: Path) -> None:
    _signed(ours, other)
    assert _import(other, ours).document["signed"] == "signed"
    (adapter,) = api.open(other).adapters.list()
    assert adapter.was_trained_by(adapter.lineage["inputs_digest"])
    assert tunewright("adapters", "verify", "-p", other).code == 0


def test_where_keys_are_trusted_unsigned_and_untrusted_ones_stay_out_unless_asked_for(ours: Path, other: Path) -> None:
    new_private_key("ann")
    api.open(other).keys.trust("ann")
    assert "it is unsigned, and this project trusts keys" in _refused(other, ours)
    _signed(ours, other, "bob", trust=False)
    assert "it is untrusted, and this project trusts keys" in _refused(other, ours)
    assert _import(other, ours, "--unsigned").document["signed"] == "untrusted"
    assert tunewright("adapters", "verify", "-p", other).code == 4
    with pytest.raises(UserError, match="it is untrusted"):
        api.open(other).serve([ours.name])


def test_a_signature_of_something_else_keeps_it_out_even_with_unsigned(ours: Path, other: Path) -> None:
    _signed(ours, other)
    _lineage(ours, seed=7)
    assert "the signature of ann is of another manifest" in _refused(other, ours, "--unsigned")


def test_a_revoked_key_keeps_it_out_even_with_unsigned(ours: Path, other: Path) -> None:
    _signed(ours, other)
    assert tunewright("keys", "revoke", "ann", "--because", "it leaked", "-p", other).code == 0
    assert "ann was revoked on" in _refused(other, ours, "--unsigned")


def test_a_signature_without_a_manifest_is_refused(ours: Path, other: Path) -> None:
    _signed(ours, other)
    (ours / MANIFEST).unlink()
    assert f"a signature, and no {MANIFEST}" in _refused(other, ours)
    assert (ours / SIGNATURE).exists()


# Quarantine


def test_what_is_stored_is_what_was_checked_whatever_becomes_of_the_source(
    stock: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = tree(stock)
    take = take_folder

    def then_change(source: Path, intake: Any) -> None:
        take(source, intake)
        for path in source.iterdir():
            path.write_bytes(b"evil")

    monkeypatch.setattr(admission, "take_folder", then_change)
    ran = _import(other, stock, "--base-matches")
    assert ran.code == 0, ran.stdout
    stored = tree(Path(ran.document["folder"]))
    assert [stored[name] for name in (CONFIG, WEIGHTS)] == [checked[name] for name in (CONFIG, WEIGHTS)]


def test_a_file_that_becomes_a_link_after_it_was_looked_at_is_not_followed(
    stock: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunewright.adapters.admission import quarantine

    secret = tmp_path / "secret"
    secret.write_text("{}")
    look = quarantine._require_plain

    def then_swap(kind: int, where: str) -> None:
        look(kind, where)
        if CONFIG in where:
            (stock / CONFIG).unlink()
            (stock / CONFIG).symlink_to(secret)

    monkeypatch.setattr(quarantine, "_require_plain", then_swap)
    assert "cannot be read: Too many levels of symbolic links" in _refused(other, stock, "--base-matches")


def test_what_a_killed_import_left_goes_with_the_next_and_a_running_one_is_let_be(stock: Path, other: Path) -> None:
    import fcntl
    import os

    left, running = other / ".quarantine-killed", other / ".quarantine-running"
    for folder in (left, running):
        write_adapter(folder / "adapter")
    handle = os.open(running, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        assert _import(other, stock, "--base-matches").code == 0
        assert not left.exists()
        assert running.exists()
    finally:
        os.close(handle)


def test_what_is_not_there_is_said(other: Path) -> None:
    assert "there is no such folder or archive" in _refused(other, Path("nowhere"))


def test_an_adapter_of_an_adapter_that_is_here_is_not_written_over(stock: Path, other: Path) -> None:
    first = _import(other, stock, "--base-matches").document
    before = tree(other)
    second = _import(other, stock, "--base-matches").document
    assert (first["new"], second["new"]) == (True, False)
    assert tree(other) == before
    assert Adapter(Path(first["folder"])).imported is not None
