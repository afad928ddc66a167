"""One training in several processes of a Ray cluster: the adapter of torchrun's, also when a machine is killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener
from raylets import PATH, raylets, token_required

from making.command_line import tiny_project
from making.forked import Server
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST

pytestmark = pytest.mark.ray

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WAIT_S = 240


@pytest.fixture(scope="module")
def token() -> Iterator[None]:
    with token_required():
        yield


@pytest.fixture(scope="module")
def machines(token: None) -> Iterator[Any]:
    """A cluster of three machines with a CPU each, one more than the training needs."""
    with raylets() as cluster:
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        yield cluster


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project to copy, with its dataset."""
    folder = tiny_project(tmp_path_factory.mktemp("of-all") / "project", tiny_base_folder, count=121)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 6\n  eval_max_samples: 3\n  micro_batch_size: 2")
    text = text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 6\n")
    config.write_text(f"{text}compute: {{workers: 2}}\n")
    Project(ProjectFolder(folder), Listener()).data.add([folder / "pairs.jsonl"])
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("commands")) as running:
        yield running


@pytest.fixture(scope="module")
def torchrun(project: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """The adapters of two processes that are started as by torchrun: with DDP, and with FSDP."""
    trained = {}
    for kind, environment in (("DDP", {}), ("FSDP", FSDP)):
        folder = _copy(project, tmp_path_factory.mktemp(kind), "{}")
        assert server.run("train", "-p", folder, processes=2, environment=environment).code == 0
        trained[kind] = find_adapter(folder / "adapters")
    return trained


def _copy(project: Path, to: Path, compute: str = "{workers: 2}") -> Path:
    folder = Path(shutil.copytree(project, to / "project"))
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("compute: {workers: 2}", f"compute: {compute}"))
    return folder


def _opened(folder: Path, heard: Listener) -> Project:
    return Project(ProjectFolder(folder).on_cluster("auto"), heard)


class _Adding(Listener):
    """Adds a machine once the cluster has too few."""

    def __init__(self, cluster: Any) -> None:
        super().__init__()
        self.cluster = cluster

    def warn(self, message: str) -> None:
        super().warn(message)
        if message.startswith("Too few CPUs are left in the cluster: 1 (needed: 2)"):
            self.cluster.add_node(num_cpus=1)


def test_adapter_is_that_of_torchrun_when_a_machine_is_killed_while_it_writes_a_checkpoint(
    token: None, project: Path, torchrun: dict[str, Adapter], tmp_path: Path
) -> None:
    """The machine of the process that writes. No other is free, until one joins."""
    folder, killed = _copy(project, tmp_path), tmp_path / "killed"
    environment = {
        "PYTHONPATH": f"{Path(__file__).parent / 'faults'}:{PATH}",
        "MACHINE_KILLED_AT": f"*/checkpoint-15/*{MANIFEST}*",
        "MACHINE_KILLED": str(killed),
    }
    with raylets() as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=1, env_vars=environment)
        heard = _Adding(cluster)
        trained = _opened(folder, heard).train()
    assert killed.exists()
    assert [text.partition(".")[0] for text in heard.warned] == [
        "Too few CPUs are left in the cluster: 1 (needed: 2)",
        "The cluster lost a process of this run",
    ]
    assert "Cluster: 2 machines; 2 CPUs, each for one process" in heard.said
    assert "Resuming from step 13 of 78" in heard.said
    assert sum(text.startswith("Epoch 1 ") for text in heard.said) == 1
    assert trained.trained
    assert trained.adapter.digest == torchrun["DDP"].digest
    assert trained.adapter.lineage["training"]["processes"] == 2
    assert trained.adapter.lineage["inputs_digest"] == torchrun["DDP"].lineage["inputs_digest"]
    assert not list((folder / ".tunewright" / "ray").iterdir())
    assert not list((folder / ".tunewright" / "training").iterdir())
    assert not _opened(folder, heard).train().trained


def _command(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tunewright", "train", "--cluster", "auto"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _reach(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + WAIT_S
    while not list(folder.glob(f".tunewright/training/*/checkpoint-{step}/{MANIFEST}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.release
def test_killed_and_stopped_commands_resume_with_fsdp(
    machines: Any, project: Path, server: Server, torchrun: dict[str, Adapter], tmp_path: Path
) -> None:
    folder = _copy(project, tmp_path, "{workers: 2, fsdp: true}")
    killed = _command(folder)
    _reach(folder, 5, killed)
    killed.kill()
    killed.communicate()

    stopped = _command(folder)
    _reach(folder, 40, stopped)
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=WAIT_S)
    assert stopped.returncode == 130, err
    assert err.count("FSDP: the base is sharded over 2 processes") == err.count("Resuming from step") == 1, err
    assert err.count("This step is saved.") == err.count("the same command resumes from there") == 1, err
    assert "Traceback" not in err

    # An error in the processes ends the command at once: nothing starts again.
    without = ProjectFolder(_copy(project, tmp_path / "without")).on_cluster("auto").config
    with pytest.raises(UserError, match="This run started with FSDP and cannot resume without it"):
        Project(ProjectFolder(folder, without), heard := Listener()).train()
    assert not heard.warned

    # Processes of torchrun finish what a cluster began.
    ended = server.run("train", "-p", _without_cluster(folder), processes=2, environment=FSDP)
    assert ended.stderr.count("Resuming from step") == 1
    adapter = find_adapter(folder / "adapters")
    assert adapter.digest == torchrun["FSDP"].digest
    assert len(adapter.lineage["training"]["bytes_held"]) == 2


def _without_cluster(folder: Path) -> Path:
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("{workers: 2, fsdp: true}", "{}"))
    return folder


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ("{workers: 4}", r"Too few CPUs in the cluster: 3 \(compute.workers: 4\)"),
        ("{workers: 3}", "8 rows cannot be shared equally by 3 processes"),
        ("{fsdp: true}", "FSDP needs at least 2 processes"),
    ],
)
def test_what_the_cluster_lacks_is_said_before_work(
    machines: Any, project: Path, tmp_path: Path, compute: str, message: str
) -> None:
    folder = _copy(project, tmp_path, compute)
    with pytest.raises(UserError, match=message):
        _opened(folder, Listener()).train()
    assert not (folder / ".tunewright" / "training").exists()
