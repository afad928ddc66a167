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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from compute_helpers import CONFIG, built, digests, many_pairs, small_parts
from data_helpers import Listener, Pair, unlike_pairs, write_jsonl
from parts import joined, lost, ready, refused_here, timed, unreachable, where
from raylets import HERE, ONE, PATH, WAIT_S, Machines, command, wait_until

from tunewright.compute import open_workers
from tunewright.config import ComputeConfig, Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.locks import is_locked
from tunewright.core.progress import LogTask, Task
from tunewright.core.workers import ONE_CPU, THIS_PROCESS, Workers
from tunewright.data.add import add

# Ray leaves the logs of its client server open.
pytest_plugins = ["raylets"]
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@contextmanager
def _workers(workers: int | None = None, heard: Listener | None = None) -> Iterator[Workers]:
    config = Config(compute=ComputeConfig(cluster="auto", workers=workers))
    with open_workers(config, heard or Listener()) as found:
        yield found


@pytest.fixture
def two_workers(machines: Machines) -> Iterator[Workers]:
    machines.have(ONE, ONE)
    with _workers() as workers:
        yield workers


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tunewright.yaml").write_text(CONFIG)
    return folder


def test_dataset_and_messages_are_the_same_on_a_cluster(
    two_workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = many_pairs(400)
    whole, heard = built(tmp_path / "whole", pairs, THIS_PROCESS)
    small_parts(monkeypatch)
    parts, also_heard = built(tmp_path / "parts", pairs, two_workers)
    assert parts == whole
    assert (also_heard.said, also_heard.warned, also_heard.steps) == (heard.said, heard.warned, heard.steps)


class _Meddling(Listener):
    """A reporter that meddles with a machine in the middle of a step."""

    def __init__(self, step: str, meddle: Callable[[], None]) -> None:
        super().__init__()
        self.step, self.meddle, self.meddled = step, meddle, False

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        meddling = self

        class Watching(LogTask):
            def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
                if title == meddling.step and not meddling.meddled:
                    meddling.meddled = True
                    meddling.meddle()

        yield Watching()


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _stand_still(machines: Machines, node: Any) -> None:
    """Stop a machine for five seconds."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    still = [raylet, *raylet.children(recursive=True)]
    assert len(still) > 1
    _send(still, signal.SIGSTOP)
    threading.Timer(5, _send, (still, signal.SIGCONT)).start()


@pytest.mark.parametrize(
    ("step", "meddle"),
    [
        ("clustering", Machines.kill),
        ("clustering", _stand_still),
        pytest.param("looking for test items", Machines.kill, marks=pytest.mark.release),
    ],
)
def test_dataset_is_the_same_when_a_machine_is_killed_or_stands_still(
    machines: Machines,
    large: tuple[list[Pair], dict[str, str]],
    project: Path,
    step: str,
    meddle: Callable[[Machines, Any], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tunewright.data.dedup.similarity._ALIKE", 60)
    _, victim = machines.have(ONE, ONE)
    heard = _Meddling(step, lambda: meddle(machines, victim))
    file = write_jsonl(project / "pairs.jsonl", large[0])
    with _workers(heard=heard) as workers:
        add(ProjectFolder(project), [file], heard, workers=workers)
    assert heard.meddled
    wait_until(lambda: machines.alive() == (1 if meddle is Machines.kill else 2))
    assert digests(project / "dataset") == large[1]
    assert capsys.readouterr().out == ""


def test_results_are_the_same_when_the_object_store_is_full(machines: Machines) -> None:
    size = 2_000_000  # numbers of 8 bytes: 16 MB a part, 32 MB a result, in stores of 80 MB
    machines.have({"num_cpus": 2, "object_store_memory": 80 * 2**20})
    with _workers() as workers:
        shared = np.arange(size)
        parts = (np.full(size, n) for n in range(12))
        sums = [int(result.sum()) for result in workers.map(joined, shared, parts, LogTask())]
    assert sums == [int(shared.sum()) + size * n for n in range(12)]
    assert list(Path(machines.cluster.head_node.get_session_dir_path()).rglob("*ray_spilled_objects*"))


def _add(folder: Path, cluster: str = "auto") -> subprocess.Popen[str]:
    return command(folder, "data", "add", "--json", "pairs.jsonl", cluster=cluster)


def _wait_for_lock(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a command compares rows."""
    wait_until(lambda: (folder / "dataset").is_dir() and is_locked(folder / "dataset"), process)


def test_command_that_was_killed_leaves_nothing_half_done_and_rays_client_finishes(
    machines: Machines, large: tuple[list[Pair], dict[str, str]], project: Path
) -> None:
    machines.have(ONE, ONE)
    write_jsonl(project / "pairs.jsonl", large[0])
    killed = _add(project)
    _wait_for_lock(project, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (project / "dataset" / "HEAD").exists()
    again = _add(project, f"ray://127.0.0.1:{machines.client_port}")
    out, err = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, (out, err)
    assert json.loads(out)["created"]
    assert digests(project / "dataset") == large[1]


def test_second_cluster_on_a_project_is_refused_by_its_lock(
    two_workers: Workers, large: tuple[list[Pair], dict[str, str]], project: Path
) -> None:
    write_jsonl(project / "pairs.jsonl", large[0])
    few = write_jsonl(project / "few.jsonl", unlike_pairs(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        first = _add(project, "local")
    _wait_for_lock(project, first)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="Another command is changing this dataset"):
        add(ProjectFolder(project), [few], Listener(), workers=two_workers)
    os.kill(first.pid, signal.SIGCONT)
    out, err = first.communicate(timeout=WAIT_S)
    assert first.returncode == 0, (out, err)
    assert digests(project / "dataset") == large[1]


def test_machine_with_another_tunewright_is_refused_also_if_it_joins_later(machines: Machines, tmp_path: Path) -> None:
    other = tmp_path / "src"
    shutil.copytree(HERE / "src", other, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    with (other / "tunewright" / "data" / "dedup" / "similarity.py").open("a") as file:
        file.write("\n_CHANGED = True\n")
    changed = {**ONE, "env_vars": {"PYTHONPATH": PATH.replace(str(HERE / "src"), str(other))}}
    machines.have(ONE)
    with _workers() as workers:
        machines.have(changed)
        with pytest.raises(UserError, match="has tunewright"):
            list(workers.map(joined, np.arange(3), [np.arange(2)], LogTask(), needs=ONE_CPU))
    with pytest.raises(UserError, match=r"The machine .* has tunewright .*\(here .*\)"), _workers():
        pass


def test_machine_that_is_lost_before_it_was_checked_is_named_as_lost(machines: Machines) -> None:
    _, victim = machines.have(ONE, ONE)
    with _workers() as workers:
        machines.kill(victim)
        with pytest.raises(UserError, match=r"The machine [\d.]+ was lost before it answered"):
            workers.ask(ready, "")


@pytest.mark.release
def test_work_that_no_machine_can_do_any_more_is_one_error(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright.compute.workers._LOOK_S", 0.5)
    monkeypatch.setattr("tunewright.compute.workers._REPLACED_S", 1.0)
    heard = Listener()
    machines.have(ONE)
    with _workers(heard=heard) as workers:
        machines.have()
        with pytest.raises(UserError, match="has had no machine that can compute this"):
            list(workers.map(joined, np.arange(3), [np.arange(2)], LogTask(), needs=ONE_CPU))
    assert heard.warned == ["The cluster has lost every machine that can compute this: waiting for another."]


def test_part_that_is_lost_again_and_again_is_one_error(two_workers: Workers) -> None:
    with pytest.raises(UserError, match="The cluster lost a part of the work 4 times: WorkerCrashedError"):
        list(two_workers.map(lost, "", [1], LogTask(), needs=ONE_CPU))
    assert next(two_workers.map(joined, np.arange(1), [np.arange(2)], LogTask())).tolist() == [0, 0, 1]


def test_connection_that_a_part_loses_is_not_that_of_the_cluster(two_workers: Workers) -> None:
    with pytest.raises(ConnectionError, match="a tracker"):
        list(two_workers.map(unreachable, "a tracker", [1], LogTask(), needs=ONE_CPU))


def test_failed_part_is_not_cancelled_as_it_completes(two_workers: Workers) -> None:
    for _ in range(200):  # Ray aborts this process if a cancellation meets a task's end: it took fewer than 100
        with pytest.raises(ConnectionError, match="a tracker"):
            list(two_workers.map(unreachable, "a tracker", [1, 2], LogTask(), needs=ONE_CPU))


def test_fewer_workers_than_cpus_compute_no_more_at_once(machines: Machines) -> None:
    machines.have(ONE, ONE)
    with _workers(workers=1) as workers:
        answers = list(workers.map(timed, 0.1, range(6), LogTask(), needs=ONE_CPU))
    assert [part for part, _, _ in answers] == list(range(6))
    assert all(ended <= began for (_, _, ended), (_, began, _) in pairwise(answers))


def test_brief_parts_are_sent_more_at_once_and_stay_in_order(two_workers: Workers) -> None:
    class Sent(LogTask):
        tasks = 0

        def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
            self.tasks += 1

    sent = Sent()
    answers = list(two_workers.map(timed, 0.0, range(200), sent, batch=2, needs=ONE_CPU))
    assert [part for part, _, _ in answers] == list(range(200))
    assert 8 <= sent.tasks < 30  # 100 if all had two


def test_this_process_computes_while_it_waits_unless_it_must_not(machines: Machines) -> None:
    machines.have(ONE, ONE)
    with _workers(workers=1) as workers:
        for here in (True, False):
            answers = list(workers.map(where, 0.05, range(40), LogTask(), needs=None if here else ONE_CPU))
            assert [part for part, _ in answers] == list(range(40))
            computed_here = sum(number == os.getpid() for _, number in answers)
            assert 1 <= computed_here <= 30 if here else computed_here == 0
        with pytest.raises(UserError, match=r"Part \d is refused"):
            list(workers.map(refused_here, os.getpid(), range(9), LogTask()))


def test_rows_are_kept_from_rays_collections_while_a_cluster_is_open(machines: Machines) -> None:
    before = gc.get_freeze_count()
    machines.have(ONE)
    with _workers() as workers:
        rows = [[n] for n in range(1000)]
        list(workers.map(joined, np.arange(1), [np.arange(2)], LogTask()))
        assert gc.get_freeze_count() > before + len(rows)
    assert gc.get_freeze_count() == 0


def test_too_few_cpus_are_refused_before_work(machines: Machines) -> None:
    machines.have(ONE, ONE)
    wanted = r"Too few CPUs in the cluster: 2 \(compute.workers: 9\)"
    with pytest.raises(UserError, match=wanted), _workers(workers=9):
        pass


OPENED = """
import sys
from tunewright.compute import open_workers
from tunewright.config import ComputeConfig, Config
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
for address in sys.argv[1:]:
    try:
        with open_workers(Config(compute=ComputeConfig(cluster=address)), LogReporter()):
            print("opened")
    except UserError as error:
        print(error.what)
"""


def test_unreachable_and_open_clusters_are_refused() -> None:
    addresses = ("ray://127.0.0.1:9", "ray://198.51.100.7:10001", "local")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": PATH}
    ran = subprocess.run(
        [sys.executable, "-c", OPENED, *addresses], env=environment, capture_output=True, text=True, timeout=WAIT_S
    )
    unreachable, other, local = ran.stdout.splitlines()
    assert unreachable == "The cluster cannot be reached: Connection refused"
    assert other.startswith("No token authentication on 198.51.100.7")
    assert local.startswith("No token authentication on this machine")
