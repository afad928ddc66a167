"""Datasets on a Ray cluster of several raylets on this machine: the same files as without, also when one is killed."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pytest
from compute_helpers import CONFIG, built, digests, many_pairs, rows_alike, small_parts
from data_helpers import Listener, Pair, unlike_pairs, write_jsonl
from hypothesis import given
from parts import joined, lost, refused_here, timed, where
from raylets import HERE, PATH, raylets, token_required

from making.command_line import tiny_project
from making.property_examples import examples
from tunewright.api import Project
from tunewright.compute import open_workers
from tunewright.config import ComputeConfig, Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.locks import is_locked
from tunewright.core.progress import LogTask, Task
from tunewright.core.workers import ONE_CPU, THIS_PROCESS, Workers
from tunewright.data.add import add
from tunewright.demo import open_demo

pytestmark = pytest.mark.ray

WAIT_S = 240


@pytest.fixture(scope="module")
def token() -> Iterator[None]:
    with token_required():
        yield


@pytest.fixture(scope="module")
def machines(token: None) -> Iterator[Any]:
    """A cluster of two machines with a CPU each."""
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        yield cluster


@contextmanager
def _workers(cluster: str = "auto", workers: int | None = None, heard: Listener | None = None) -> Iterator[Workers]:
    config = Config(compute=ComputeConfig(cluster=cluster, workers=workers))
    with open_workers(config, heard or Listener()) as found:
        yield found


@pytest.fixture
def two_workers(machines: Any) -> Iterator[Workers]:
    with _workers() as workers:
        yield workers


def test_dataset_is_the_same_on_a_cluster(two_workers: Workers) -> None:
    @examples(40)
    @given(rows_alike)
    def is_the_same(pairs: list[Pair]) -> None:
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            whole, heard = built(Path(folder, "whole"), pairs, THIS_PROCESS)
            small_parts(patch)
            parts, also_heard = built(Path(folder, "parts"), pairs, two_workers)
        assert parts == whole
        assert (also_heard.said, also_heard.warned, also_heard.steps) == (heard.said, heard.warned, heard.steps)

    is_the_same()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Pair], dict[str, str]]:
    """Pairs, and the files of their dataset without a cluster."""
    pairs = many_pairs(8000)
    return pairs, built(tmp_path_factory.mktemp("large") / "whole", pairs, THIS_PROCESS)[0]


def test_large_dataset_is_the_same_on_a_cluster(
    two_workers: Workers, large: tuple[list[Pair], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.data.dedup.similarity._ALIKE", 200)
    pairs, whole = large
    assert built(tmp_path / "parts", pairs, two_workers)[0] == whole


class _Killing(Listener):
    """A reporter that kills a machine in the middle of a step."""

    def __init__(self, step: str, kill: Any) -> None:
        super().__init__()
        self.step, self.kill, self.killed = step, kill, False

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        killing = self

        class Watching(LogTask):
            def advance(self, steps: int = 1, note: str = "") -> None:
                if title == killing.step and not killing.killed:
                    killing.killed = True
                    killing.kill()

        yield Watching()


@pytest.mark.parametrize("step", ["clustering", pytest.param("looking for test items", marks=pytest.mark.release)])
def test_dataset_is_the_same_when_a_machine_is_killed(
    token: None,
    large: tuple[list[Pair], dict[str, str]],
    tmp_path: Path,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tunewright.data.dedup.similarity._ALIKE", 200)
    pairs, whole = large
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        victim = cluster.add_node(num_cpus=1)
        heard = _Killing(step, lambda: cluster.remove_node(victim, allow_graceful=False))
        folder = tmp_path / "parts"
        folder.mkdir()
        (folder / "tunewright.yaml").write_text(CONFIG)
        file = write_jsonl(folder / "pairs.jsonl", pairs)
        with _workers(heard=heard) as workers:
            add(ProjectFolder(folder), [file], heard, workers=workers)
        assert heard.killed
        until = time.monotonic() + WAIT_S
        while sum(node["Alive"] for node in cluster.global_state.node_table()) != 2:
            assert time.monotonic() < until
            time.sleep(0.1)
    assert digests(folder / "dataset") == whole
    assert capsys.readouterr().out == ""


def test_results_are_the_same_when_the_object_store_is_full(
    token: None, large: tuple[list[Pair], dict[str, str]], tmp_path: Path
) -> None:
    size = 2_000_000  # numbers of 8 bytes: 16 MB a part, 32 MB a result, in a store of 80 MB
    with raylets(object_store_memory=80 * 2**20) as cluster:
        cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
        with _workers() as workers:
            shared = np.arange(size)
            parts = (np.full(size, n) for n in range(12))
            sums = [int(result.sum()) for result in workers.map(joined, shared, parts, LogTask())]
            assert sums == [int(shared.sum()) + size * n for n in range(12)]
            assert built(tmp_path / "parts", large[0], workers)[0] == large[1]
        assert list(Path(cluster.head_node.get_session_dir_path()).rglob("*ray_spilled_objects*"))


def _command(folder: Path, *arguments: str, cluster: str = "auto") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tunewright", "data", "add", "--cluster", cluster, "--json", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tunewright.yaml").write_text(CONFIG)
    return folder


def _wait_for_lock(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a command compares rows."""
    until = time.monotonic() + WAIT_S
    while not ((folder / "dataset").is_dir() and is_locked(folder / "dataset")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_command_that_was_killed_leaves_nothing_half_done(
    machines: Any, large: tuple[list[Pair], dict[str, str]], project: Path
) -> None:
    write_jsonl(project / "pairs.jsonl", large[0])
    killed = _command(project, "pairs.jsonl")
    _wait_for_lock(project, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (project / "dataset" / "HEAD").exists()
    again = _command(project, "pairs.jsonl")
    out, err = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, (out, err)
    assert json.loads(out)["created"]
    assert digests(project / "dataset") == large[1]


def test_second_cluster_on_a_project_is_refused_by_its_lock(
    machines: Any, two_workers: Workers, large: tuple[list[Pair], dict[str, str]], project: Path
) -> None:
    write_jsonl(project / "pairs.jsonl", large[0])
    few = write_jsonl(project / "few.jsonl", unlike_pairs(60))
    first = _command(project, "pairs.jsonl", cluster="local")
    _wait_for_lock(project, first)
    with pytest.raises(UserError, match="Another command is changing this dataset"):
        add(ProjectFolder(project), [few], Listener(), workers=two_workers)
    out, err = first.communicate(timeout=WAIT_S)
    assert first.returncode == 0, (out, err)
    assert digests(project / "dataset") == large[1]


# Ray leaves the logs of its client server open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_client_gives_the_same_dataset(token: None, tmp_path: Path) -> None:
    pairs = many_pairs(600)
    whole, _ = built(tmp_path / "whole", pairs, THIS_PROCESS)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tunewright.yaml").write_text(CONFIG)
    write_jsonl(folder / "pairs.jsonl", pairs)
    with raylets(ray_client_server_port=23001) as cluster:
        cluster.add_node(num_cpus=1)
        ran = _command(folder, "pairs.jsonl", cluster="ray://127.0.0.1:23001")
        out, err = ran.communicate(timeout=WAIT_S)
    assert ran.returncode == 0, (out, err)
    assert digests(folder / "dataset") == whole


@pytest.mark.release
def test_adapter_is_the_same_when_its_data_came_from_a_cluster(
    machines: Any, tiny_base_folder: Path, tmp_path: Path
) -> None:
    weights = []
    for cluster in (None, "auto"):
        folder = tiny_project(tmp_path / str(cluster), tiny_base_folder, count=80)
        project = Project(ProjectFolder(folder).on_cluster(cluster))
        version = project.data.add([folder / "pairs.jsonl"]).version
        adapter = project.train().adapter
        weights.append((version.digest, (adapter.folder / "adapter_model.safetensors").read_bytes()))
        assert "compute" not in adapter.lineage["config"]
    assert weights[0] == weights[1]


def test_machine_with_another_tunewright_is_refused(token: None, tmp_path: Path) -> None:
    other = tmp_path / "src"
    shutil.copytree(HERE / "src", other, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    with (other / "tunewright" / "data" / "dedup" / "similarity.py").open("a") as file:
        file.write("\n_CHANGED = True\n")
    with raylets() as cluster:
        cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": PATH.replace(str(HERE / "src"), str(other))})
        with (
            pytest.raises(UserError, match=r"The machine .* has tunewright .*\(here .*\)\n.*Use one image"),
            _workers(),
        ):
            pass


def test_machine_that_joins_later_with_another_tunewright_is_refused(token: None, tmp_path: Path) -> None:
    other = tmp_path / "src"
    shutil.copytree(HERE / "src", other, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (other / "tunewright" / "changed.py").write_text("")
    with raylets() as cluster:
        equal = cluster.add_node(num_cpus=1)
        with _workers() as workers:
            cluster.remove_node(equal, allow_graceful=False)
            cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": PATH.replace(str(HERE / "src"), str(other))})
            with pytest.raises(UserError, match="has tunewright"):
                list(workers.map(joined, np.arange(3), [np.arange(2)], LogTask()))


def test_part_that_is_lost_again_and_again_is_one_error(two_workers: Workers) -> None:
    with pytest.raises(UserError, match="The cluster lost a part of the work 4 times: WorkerCrashedError"):
        list(two_workers.map(lost, "", [1], LogTask()))
    assert next(two_workers.map(joined, np.arange(1), [np.arange(2)], LogTask())).tolist() == [0, 0, 1]


def test_fewer_workers_than_cpus_compute_no_more_at_once(machines: Any) -> None:
    with _workers(workers=1) as workers:
        answers = list(workers.map(timed, 0.1, range(6), LogTask(), needs=ONE_CPU))
    assert [part for part, _, _ in answers] == list(range(6))
    assert all(ended <= began for (_, _, ended), (_, began, _) in pairwise(answers))


def test_brief_parts_are_sent_more_at_once_and_stay_in_order(two_workers: Workers) -> None:
    class Sent(LogTask):
        tasks = 0

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.tasks += 1

    sent = Sent()
    answers = list(two_workers.map(timed, 0.0, range(200), sent, batch=2, needs=ONE_CPU))
    assert [part for part, _, _ in answers] == list(range(200))
    assert 8 <= sent.tasks < 30  # 100 if all had two


def test_this_process_computes_while_it_waits_unless_it_must_not(machines: Any) -> None:
    with _workers(workers=1) as workers:
        for here in (True, False):
            answers = list(workers.map(where, 0.05, range(40), LogTask(), needs=None if here else ONE_CPU))
            assert [part for part, _ in answers] == list(range(40))
            computed_here = sum(number == os.getpid() for _, number in answers)
            assert 1 <= computed_here <= 30 if here else computed_here == 0


def test_rows_are_kept_from_rays_collections_while_a_cluster_is_open(machines: Any) -> None:
    before = gc.get_freeze_count()
    with _workers() as workers:
        rows = [[n] for n in range(1000)]
        list(workers.map(joined, np.arange(1), [np.arange(2)], LogTask()))
        assert gc.get_freeze_count() > before + len(rows)
    assert gc.get_freeze_count() == 0


def test_error_of_a_part_computed_here_is_that_of_the_step(machines: Any) -> None:
    with _workers(workers=1) as workers, pytest.raises(UserError, match=r"Part \d is refused"):
        list(workers.map(refused_here, os.getpid(), range(9), LogTask()))


def test_too_few_cpus_are_refused_before_work(machines: Any) -> None:
    wanted = r"Too few CPUs in the cluster: 2 \(compute.workers: 9\)"
    with pytest.raises(UserError, match=wanted), _workers(workers=9):
        pass


@pytest.mark.parametrize(
    ("address", "mode", "message"),
    [
        ("ray://127.0.0.1:9", "token", "The cluster cannot be reached: Connection refused"),
        ("ray://198.51.100.7:10001", "disabled", "No token authentication on 198.51.100.7"),
        ("local", "disabled", "No token authentication on this machine"),
    ],
)
def test_unreachable_and_open_clusters_are_refused(project: Path, address: str, mode: str, message: str) -> None:
    write_jsonl(project / "pairs.jsonl", unlike_pairs(60))
    environment = {**os.environ, "RAY_AUTH_MODE": mode, "PYTHONPATH": PATH}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ran = _command(project, "pairs.jsonl", cluster=address)
        out, _ = ran.communicate(timeout=WAIT_S)
    assert ran.returncode == 2
    assert message in json.loads(out)["error"]["what"]
    assert not (project / "dataset").exists()


def test_this_machine_alone_gives_the_same_dataset(project: Path, tmp_path: Path) -> None:
    pairs = many_pairs(600)
    whole, _ = built(tmp_path / "whole", pairs, THIS_PROCESS)
    write_jsonl(project / "pairs.jsonl", pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        patch.delenv("RAY_ADDRESS", raising=False)
        ran = _command(project, "pairs.jsonl", cluster="local")
        out, err = ran.communicate(timeout=WAIT_S)
    assert ran.returncode == 0, (out, err)
    assert json.loads(out)["created"]
    assert digests(project / "dataset") == whole


def test_head_that_is_lost_is_one_error_and_a_new_one_finishes(
    token: None, large: tuple[list[Pair], dict[str, str]], project: Path
) -> None:
    write_jsonl(project / "pairs.jsonl", large[0])
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        stopped = _command(project, "pairs.jsonl")
        _wait_for_lock(project, stopped)
        # It compares rows. Within a call of Ray, the loss of a machine's object store would end it without a word.
        os.killpg(stopped.pid, signal.SIGSTOP)
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        os.killpg(stopped.pid, signal.SIGCONT)
        out, err = stopped.communicate(timeout=WAIT_S)
    assert stopped.returncode == 2, (out, err)
    assert "The head of the cluster is lost" in json.loads(out)["error"]["what"]
    assert not (project / "dataset" / "HEAD").exists()
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        again = _command(project, "pairs.jsonl")
        out, err = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, (out, err)
    assert digests(project / "dataset") == large[1]


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def test_machine_that_stands_still_for_some_seconds_changes_nothing(
    token: None, large: tuple[list[Pair], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.data.dedup.similarity._ALIKE", 200)
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        slow = cluster.add_node(num_cpus=1)
        still: list[psutil.Process] = []

        def stand_still() -> None:
            raylet = psutil.Process(slow.all_processes["raylet"][0].process.pid)
            still.extend([raylet, *raylet.children(recursive=True)])
            _send(still, signal.SIGSTOP)
            threading.Timer(5, _send, (still, signal.SIGCONT)).start()

        heard = _Killing("clustering", stand_still)
        folder = tmp_path / "parts"
        folder.mkdir()
        (folder / "tunewright.yaml").write_text(CONFIG)
        file = write_jsonl(folder / "pairs.jsonl", large[0])
        with _workers(heard=heard) as workers:
            add(ProjectFolder(folder), [file], heard, workers=workers)
    assert heard.killed
    assert len(still) > 1
    assert digests(folder / "dataset") == large[1]


def test_demo_has_the_same_dataset_on_a_cluster(machines: Any, tmp_path: Path) -> None:
    files = []
    for cluster in (None, "auto"):
        demo = open_demo(tmp_path / str(cluster), Listener(), cluster=cluster)
        demo.data.add([demo.folder.root / source for source in demo.folder.config.data.sources])
        files.append(digests(demo.folder.dataset))
    assert files[0] == files[1]
