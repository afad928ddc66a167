"""A foreign adapter's claims and signatures, checked against the project."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tunewright as api
from making.command_line import tiny_project, tunewright
from making.small_adapters import (
    claim,
    create_key,
    import_adapter,
    own_keys,
    refused_import,
)
from making.tiny_bases import build_base
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import MANIFEST, SIGNATURE
from tunewright.adapters.registry import WEIGHTS, adapter_digest, write_manifest
from tunewright.core.errors import UserError

pytest_plugins = "making.adapter_projects"


@pytest.fixture(autouse=True)
def _keys_of_my_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


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
    from tunewright.adapters.signing import sign, signing_key

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
