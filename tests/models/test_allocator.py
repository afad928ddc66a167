"""The allocator's setting: in the environment before torch is imported, and the user's own takes precedence."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tunewright
from making.command_line import tiny_project
from tunewright import models
from tunewright.engines.vllm.engine import plan
from tunewright.models import ALLOCATOR

WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print({key: value for key, value in sorted(os.environ.items()) if key.endswith("ALLOC_CONF")})
            raise SystemExit

sys.meta_path.insert(0, Watch())
from tunewright.cli import commands
commands()(["train", "--project", sys.argv[1]])
"""


@pytest.mark.slow
def test_train_sets_allocator_before_torch_is_imported(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    tunewright.open(folder).data.add([folder / "pairs.jsonl"])
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    command = [sys.executable, "-c", WATCH, str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    assert ran.stdout == f"{dict([ALLOCATOR])}\n"


@pytest.mark.parametrize(
    ("own", "platform", "expected"),
    [
        ({}, "linux", dict([ALLOCATOR])),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "linux", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "linux", {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ({}, "win32", {}),
    ],
)
def test_users_allocator_setting_takes_precedence(
    own: dict[str, str], platform: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        patch.setattr(sys, "platform", platform)
        runpy.run_path(str(models.__file__))
        assert {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")} == expected
        os.environ.pop(ALLOCATOR[0], None)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_vllm_gets_only_the_users_allocator_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*ALLOCATOR)
    assert ALLOCATOR[0] not in plan(_folder(tmp_path / "one"), Path("python"), [], {}).variables
    monkeypatch.setenv(ALLOCATOR[0], "max_split_size_mb:512")
    assert plan(_folder(tmp_path / "two"), Path("python"), [], {}).variables[ALLOCATOR[0]] == "max_split_size_mb:512"
