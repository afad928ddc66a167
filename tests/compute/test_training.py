"""One training in several processes of a Ray cluster: the adapter of torchrun's, also when a machine is killed."""

from __future__ import annotations

import os
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

from command_line import tiny_project
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST

pytestmark = pytest.mark.ray

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
    text = config.read_text().replace("batch_size: 8", "batch_size: 8\n  micro_batch_size: 2\n  eval_max_samples: 3")
    config.write_text(f"{text}compute: {{workers: 2}}\n")
    Project(ProjectFolder(folder), Listener()).data.add([folder / "pairs.jsonl"])
    return folder


@pytest.fixture(scope="module")
def torchrun(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """What two processes of torchrun train."""
    folder = _copy(project, tmp_path_factory.mktemp("torchrun"))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tunewright"]
    environment = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    subprocess.run([*run, "train", "-p", folder], env=environment, check=True, timeout=WAIT_S, capture_output=True)
    return find_adapter(folder / "adapters")


def _copy(project: Path, to: Path) -> Path:
    return Path(shutil.copytree(project, to / "project"))


def _project(folder: Path, heard: Listener, **compute: Any) -> Project:
    opened = ProjectFolder(folder).on_cluster("auto")
    section = opened.config.compute.model_copy(update=compute)
    return Project(ProjectFolder(folder, opened.config.model_copy(update={"compute": section})), heard)


def test_adapter_is_that_of_torchrun(machines: Any, project: Path, torchrun: Adapter, tmp_path: Path) -> None:
    folder, heard = _copy(project, tmp_path), Listener()
    trained = _project(folder, heard).train()
    print("SECONDS", trained.adapter.lineage["training"]["seconds"])
    assert trained.trained
    assert trained.adapter.digest == torchrun.digest
    assert trained.adapter.history[-1]["eval_loss"] == torchrun.history[-1]["eval_loss"]
    assert trained.adapter.lineage["training"]["processes"] == 2
    assert trained.adapter.lineage["inputs_digest"] == torchrun.lineage["inputs_digest"]
    assert "Cluster: 3 machines; 2 CPUs, each for one process" in heard.said
    assert sum(text.startswith("Epoch 1 ") for text in heard.said) == 1
    assert (
        list((folder / ".tunewright" / "ray").iterdir()) == list((folder / ".tunewright" / "training").iterdir()) == []
    )
    assert not _project(folder, heard).train().trained


class _Adding(Listener):
    """Adds a machine once the cluster has too few."""

    def __init__(self, cluster: Any) -> None:
        super().__init__()
        self.cluster = cluster

    def warn(self, message: str) -> None:
        super().warn(message)
        if message.startswith("Too few CPUs are left in the cluster: 1 (needed: 2)"):
            self.cluster.add_node(num_cpus=1)


def test_adapter_is_the_same_when_a_machine_is_killed_while_it_writes_a_checkpoint(
    token: None, project: Path, torchrun: Adapter, tmp_path: Path
) -> None:
    """The machine of the process that writes; no other is free, until one joins."""
    folder, killed = _copy(project, tmp_path), tmp_path / "killed"
    faults = Path(__file__).parent / "faults"
    environment = {
        "PYTHONPATH": f"{faults}:{PATH}",
        "MACHINE_KILLED_AT": f"*/checkpoint-15/*{MANIFEST}*",
        "MACHINE_KILLED": str(killed),
    }
    with raylets() as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=1, env_vars=environment)
        heard = _Adding(cluster)
        trained = _project(folder, heard).train()
    assert killed.exists()
    assert heard.warned[0].startswith("Too few CPUs are left")
    assert heard.warned[1].startswith("The cluster lost a process of this run")
    assert "Resuming from step 13 of 26" in heard.said
    assert trained.adapter.digest == torchrun.digest


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


def test_stopped_and_killed_commands_resume(machines: Any, project: Path, torchrun: Adapter, tmp_path: Path) -> None:
    folder = _copy(project, tmp_path)
    stopped = _command(folder)
    _reach(folder, 5, stopped)
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=WAIT_S)
    assert stopped.returncode == 130, err
    assert err.count("This step is saved.") == err.count("the same command resumes from there") == 1, err
    assert "Traceback" not in err

    # An error in the processes ends the command at once; nothing starts again.
    with pytest.raises(UserError, match="This run started without FSDP and cannot resume with it"):
        _project(folder, heard := Listener(), fsdp=True).train()
    assert not any("lost" in text for text in heard.warned)

    killed = _command(folder)
    _reach(folder, 20, killed)
    killed.kill()
    killed.communicate()
    trained = _project(folder, heard := Listener()).train()
    assert any(text.startswith("Resuming from step 2") for text in heard.said)
    assert trained.adapter.digest == torchrun.digest


def test_fsdp_shards_the_base(machines: Any, project: Path, torchrun: Adapter, tmp_path: Path) -> None:
    adapter = _project(_copy(project, tmp_path), heard := Listener(), fsdp=True).train().adapter
    assert any(text.startswith("FSDP: the base is sharded over 2 processes") for text in heard.said)
    assert len(adapter.lineage["training"]["bytes_held"]) == 2
    ours = [row["loss"] for row in adapter.history if "loss" in row]
    assert ours == pytest.approx([row["loss"] for row in torchrun.history if "loss" in row], rel=1e-4)


def test_what_the_cluster_lacks_is_said_before_work(machines: Any, project: Path) -> None:
    with pytest.raises(UserError, match=r"Too few CPUs in the cluster: 3 \(compute.workers: 4\)"):
        _project(project, Listener(), workers=4).train()
    with pytest.raises(UserError, match="8 rows cannot be shared equally by 3 processes"):
        _project(project, Listener(), workers=3).train()
    assert not (project / ".tunewright" / "training").exists()
