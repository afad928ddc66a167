"""Adapters for tests of signatures and of admission: small, by hand, and every byte of them can be changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from making.command_line import tunewright
from tunewright.adapters.registry import CONFIG, LINEAGE, WEIGHTS, write_manifest
from tunewright.core.io import write_json

SHAPES = {"q_proj": (64, 64), "v_proj": (64, 32)}
"""Inputs and outputs in the tiny base."""


PHRASE = "correct horse battery"


def own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, where `create_key` keeps keys; no agent, and nobody who is asked for a passphrase."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data-home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("SSH_AUTH_SOCK", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE", "TUNEWRIGHT_SIGNING_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "home" / ".ssh"


def create_key(name: str, *, passphrase: str = "", kind: str = "ed25519") -> Path:
    """The public half of a new key in the user's home; the private one is next to it."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    file = Path.home() / ".ssh" / name
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    ssh_keygen("-q", "-t", kind, "-N", passphrase, "-C", name, "-f", str(file))
    return file.with_suffix(".pub")


def ssh_keygen(*arguments: str | Path) -> None:
    """Run it, for what tests prepare."""
    subprocess.run(["ssh-keygen", *map(str, arguments)], check=True, capture_output=True)


def lora_weights(rank: int = 4, size: float = 0.01, seed: int = 0) -> dict[str, Any]:
    """LoRA weights on q_proj and v_proj of the tiny base's two layers, float32."""
    generator = np.random.default_rng(seed)
    weights = {}
    for layer in range(2):
        for target, (inputs, outputs) in SHAPES.items():
            for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                name = f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{half}.weight"
                weights[name] = generator.normal(0, size, shape).astype(np.float32)
    return weights


def lora_config(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json of plain LoRA."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/some-base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    return config | changes


def write_adapter(
    folder: Path, config: Mapping[str, Any] | None = None, weights: Mapping[str, Any] | None = None
) -> Path:
    """An adapter's two files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(lora_config() if config is None else config))
    save_file(dict(lora_weights() if weights is None else weights), folder / WEIGHTS)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files to their bytes, links to where they lead, folders to None."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink()).encode()
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def import_adapter(project: Path, source: Path | str, *options: str) -> Any:
    """Import an adapter into a project; what was printed."""
    return tunewright("adapters", "import", source, "-p", project, "--json", *options)


def claim(folder: Path, *gone: str, **changes: Any) -> None:
    """Change an adapter's lineage as somebody would who has no key: the manifest with it."""
    lineage = {**json.loads((folder / LINEAGE).read_text()), **changes}
    write_json(folder / LINEAGE, {key: value for key, value in lineage.items() if key not in gone})
    write_manifest(folder, folder.name)


def refused_import(project: Path, source: Path | str, *options: str) -> str:
    """Import an adapter that has to be refused with nothing left behind; the error."""
    before = tree(project)
    ran = import_adapter(project, source, *options)
    assert ran.code == 2
    assert tree(project) == before
    error = ran.document["error"]
    return f"{error['where']}: {error['what']}\n{error['fix']}"
