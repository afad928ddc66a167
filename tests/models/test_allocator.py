"""The allocator's setting: in the environment before torch is imported, and the user's own takes precedence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tunewright
from command_line import tiny_project
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
if "windows" in sys.argv:
    sys.platform = "win32"
    import tunewright.models
    sys.platform = "linux"
from tunewright.cli import commands
commands()(["train", "--project", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("allocator") / "project", tiny_base_folder)
    tunewright.open(folder).data.add([folder / "pairs.jsonl"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "own", "expected"),
    [
        ((), {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ((), {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}),
        ((), {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        (("windows",), {}, {}),
    ],
)
def test_train_sets_allocator_before_torch_is_imported(
    arguments: tuple[str, ...],
    own: dict[str, str],
    expected: dict[str, str],
    project: Path,
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    ran = subprocess.run(
        [sys.executable, "-c", WATCH, str(project), *arguments],
        env={**environment, **own},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert ran.stdout == f"{expected}\n"


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_vllm_gets_only_the_users_allocator_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*ALLOCATOR)
    assert ALLOCATOR[0] not in plan(_folder(tmp_path / "one"), Path("python"), [], {}).variables
    monkeypatch.setenv(ALLOCATOR[0], "max_split_size_mb:512")
    assert plan(_folder(tmp_path / "two"), Path("python"), [], {}).variables[ALLOCATOR[0]] == "max_split_size_mb:512"
