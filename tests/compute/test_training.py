"""One training in several processes of a Ray cluster: the adapter of torchrun's, also when a machine is killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from data_helpers import Listener
from raylets import ONE, PATH, WAIT_S, Machines, command, wait_until

from making.command_line import tiny_project
from making.forked import Server
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST

pytest_plugins = ["raylets"]
pytestmark = pytest.mark.ray

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


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
def torchrun(project: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapter]:
    """The adapter of two processes that are started as by torchrun: with DDP, or with FSDP."""

    @cache
    def trained(kind: str) -> Adapter:
        folder = _copy(project, tmp_path_factory.mktemp(kind), "{}")
        environment = FSDP if kind == "FSDP" else {}
        assert server.run("train", "-p", folder, processes=2, environment=environment).code == 0
        return find_adapter(folder / "adapters")

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

    def __init__(self, machines: Machines) -> None:
        super().__init__()
        self.machines = machines

    def warn(self, message: str) -> None:
        super().warn(message)
        if message.startswith("Too few CPUs are left in the cluster: 1 (needed: 2)"):
            self.machines.cluster.add_node(**ONE)


def test_adapter_is_that_of_torchrun_when_a_machine_is_killed_while_it_writes_a_checkpoint(
    machines: Machines, project: Path, torchrun: Callable[[str], Adapter], tmp_path: Path
) -> None:
    """The machine of the process that writes. No other is free, until one joins."""
    folder, killed = _copy(project, tmp_path), tmp_path / "killed"
    environment = {
        "PYTHONPATH": f"{Path(__file__).parent / 'faults'}:{PATH}",
        "MACHINE_KILLED_AT": f"*/checkpoint-15/*{MANIFEST}*",
        "MACHINE_KILLED": str(killed),
    }
    machines.have(*[{**ONE, "env_vars": environment}] * 2)
    heard, expected = _Adding(machines), torchrun("DDP")
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
    assert trained.adapter.digest == expected.digest
    assert trained.adapter.lineage["training"]["processes"] == 2
    assert trained.adapter.lineage["inputs_digest"] == expected.lineage["inputs_digest"]
    assert not list((folder / ".tunewright" / "ray").iterdir())
    assert not list((folder / ".tunewright" / "training").iterdir())
    assert not _opened(folder, heard).train().trained


def _reach(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    saved = f".tunewright/training/*/checkpoint-{step}/{MANIFEST}"
    wait_until(lambda: bool(list(folder.glob(saved))), process)


@pytest.mark.release
def test_killed_and_stopped_commands_resume_with_fsdp(
    machines: Machines, project: Path, server: Server, torchrun: Callable[[str], Adapter], tmp_path: Path
) -> None:
    machines.have(ONE, ONE, ONE)
    folder = _copy(project, tmp_path, "{workers: 2, fsdp: true}")
    killed = command(folder, "train")
    _reach(folder, 5, killed)
    killed.kill()
    killed.communicate()

    stopped = command(folder, "train")
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
    assert adapter.digest == torchrun("FSDP").digest
    assert len(adapter.lineage["training"]["bytes_held"]) == 2


def _without_cluster(folder: Path) -> Path:
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("{workers: 2, fsdp: true}", "{}"))
    return folder


def test_run_is_not_described_by_its_rows() -> None:
    """Ray's dashboard can show what the processes are given."""
    from tunewright.compute.cluster import Image
    from tunewright.compute.group import _Work

    assert "a private row" not in str(_Work(print, "a private row", None, Image("", {})))


def test_what_the_cluster_lacks_is_said_before_work(machines: Machines, project: Path, tmp_path: Path) -> None:
    machines.have(ONE, ONE, ONE)
    by_client = command(_copy(project, tmp_path), "train", cluster=f"ray://127.0.0.1:{machines.client_port}")
    for number, (compute, message) in enumerate(
        (
            ("{workers: 4}", r"Too few CPUs in the cluster: 3 \(compute.workers: 4\)"),
            ("{workers: 3}", "8 rows cannot be shared equally by 3 processes"),
            ("{fsdp: true}", "FSDP needs at least 2 processes"),
        )
    ):
        folder = _copy(project, tmp_path / str(number), compute)
        with pytest.raises(UserError, match=message):
            _opened(folder, Listener()).train()
        assert not (folder / ".tunewright" / "training").exists()
    _, err = by_client.communicate(timeout=WAIT_S)
    assert by_client.returncode == 2, err
    assert "compute.cluster: A training in several processes cannot be started through ray://" in err
