"""Faults of machines in the middle of each command: it leaves the old state or the new one, and the next one works."""

from __future__ import annotations

import errno
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faulty import SEED_VARIABLE, Action, seed
from stages import CASES, HANG_S, Stages

from making.forked import FOREVER, Command, Ended

pytestmark = pytest.mark.chaos
pytest_plugins = ["chaos_fixtures"]

COMMANDS = ("add", "train", "evaluate", "judge", "deploy", "promote", "export")
TRIES = (3, 2)
"""Moments of each fault before a release: of a quick command, and of one that takes seconds. In CI quick ones
are killed at two moments and see the clock jump both ways, and all else happens at one moment."""
TRIED_AT_EACH_CALL = ("full disk", "read-only disk")
"""Faults of single calls, which test_every_call.py lets happen at each place: one random moment is enough here."""
DAY = 86_400
MEGABYTE = 1 << 20
IGNORED = re.compile(r"Exception ignored in(?: thread started by)?: .*\n(?:Traceback .*\n(?:  .*\n)*)?MemoryError: \n")
"""Printed by Python where a generator is closed or a thread begins without memory: the command has its own message."""


def each_command(fault: str) -> pytest.MarkDecorator:
    """Run a test with each command, as a cell of this fault's row."""
    cells = [pytest.param(name, marks=pytest.mark.fault(fault, name)) for name in COMMANDS]
    return pytest.mark.parametrize("name", cells)


def moments(fault: str, name: str, stages: Stages) -> Iterator[int]:
    """Return numbers of calls that change a file, by the seed; a failure prints it."""
    calls = len(stages.listed(name)[2])
    draw = random.Random(f"{seed()} {fault} {name}")
    quick, slow = TRIES if stages.release else (2 if fault in ("kill", "clock jump") else 1, 1)
    tries = 1 if fault in TRIED_AT_EACH_CALL else quick if CASES[name].quick else slow
    for number in sorted(draw.sample(range(1, calls + 1), min(tries, calls))):
        print(f"{SEED_VARIABLE}={seed()}: {fault} at call {number} of {calls} of {name}")  # noqa: T201
        yield number


def assert_reported(ended: Ended, codes: tuple[int, ...]) -> None:
    """The command succeeded, or ended with one clear message."""
    assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert ended.code in (2, *codes), ended
    assert ended.stderr.count("Error: ") == (ended.code == 2), ended


def assert_old_or_new(name: str, stages: Stages, ended: Ended | None) -> None:
    """The state is that before the command or that after it, and the command makes the latter when repeated."""
    case = CASES[name]
    before, after, _ = stages.listed(name)
    found = case.state(stages)
    assert found in (before, after)
    if ended is not None and ended.code != 2:
        assert found == after, "acknowledged, and lost"
    again = stages.run(case.command)
    assert_reported(again, case.codes)
    assert again.code in case.codes or found == after, again
    assert case.state(stages) == after


@each_command("kill")
def test_killed_command_leaves_the_old_or_the_new_state(name: str, stages: Stages) -> None:
    for number in moments("kill", name, stages):
        stages.prepare(CASES[name].stage)
        ended = stages.run(CASES[name].command, stages.fault(kinds=31, action=Action.KILL, when=number))
        assert ended.code == -signal.SIGKILL
        assert_old_or_new(name, stages, None)


def wait_until_stopped(command: Command) -> bool:
    """Return True when the command is stopped, and False when it has ended before."""
    until = time.monotonic() + HANG_S
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{command.pids[0]}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "TZ":
            return state == "T"
        time.sleep(0.005)
    raise AssertionError(f"neither stopped nor ended: {command.stderr}")


@each_command("stop")
def test_second_command_meanwhile_and_a_stopped_one_make_the_same_state(
    name: str, stages: Stages, second: Stages
) -> None:
    case = CASES[name]
    _, after, _ = stages.listed(name)
    for number in moments("stop", name, stages):
        stages.prepare(case.stage)
        second.work = stages.work
        second.project = stages.project
        stopped = stages.start(case.command, stages.fault(kinds=31, action=Action.STOP, when=number))
        assert wait_until_stopped(stopped)
        try:
            meanwhile = second.run(case.command)
        finally:
            stopped.send(signal.SIGCONT)
        first = stages.wait(stopped)
        for ended in (first, meanwhile):
            assert_reported(ended, case.codes)
        assert first.code in case.codes or meanwhile.code in case.codes, (first, meanwhile)
        assert case.state(stages) == after


@each_command("full disk")
def test_full_disk_leaves_the_old_or_the_new_state(name: str, stages: Stages) -> None:
    for number in moments("full disk", name, stages):
        stages.prepare(CASES[name].stage)
        # Removing works on a full disk.
        calls = stages.listed(name)[2][: number - 1]
        when = sum(call.split()[0] not in ("unlink", "unlinkat", "rmdir") for call in calls) + 1
        fault = stages.fault(kinds=15, action=Action.FAIL, when=when, number=errno.ENOSPC, lasting=FOREVER)
        ended = stages.run(CASES[name].command, fault)
        assert_reported(ended, CASES[name].codes)
        if ended.code == 2:
            # SQLite's words where it meets a full disk elsewhere than in a write.
            of_sqlite = ("disk I/O error", "unable to open database file")
            assert any(words in ended.stderr for words in ("full", *of_sqlite)), ended.stderr
        assert_old_or_new(name, stages, ended)


@each_command("read-only disk")
def test_disk_that_becomes_read_only_leaves_the_old_or_the_new_state(name: str, stages: Stages) -> None:
    for number in [1, *moments("read-only disk", name, stages)]:
        stages.prepare(CASES[name].stage)
        fault = stages.fault(kinds=31, action=Action.FAIL, when=number, number=errno.EROFS, lasting=FOREVER)
        ended = stages.run(CASES[name].command, fault)
        assert_reported(ended, CASES[name].codes)
        if number == 1:
            assert ended.code == 2
        assert_old_or_new(name, stages, ended)


@each_command("deleted files")
def test_files_deleted_meanwhile_are_reported(name: str, stages: Stages) -> None:
    """The next command works or reports what is missing; what was deleted is lost."""
    case = CASES[name]
    draw = random.Random(f"{seed()} {name}")
    for number in moments("deleted files", name, stages):
        stages.prepare(case.stage)
        command = stages.named(case.command)  # the adapter's name, which may be deleted
        started = stages.start(command, stages.fault(kinds=31, action=Action.STOP, when=number))
        assert wait_until_stopped(started)
        folders = [path for path in stages.project.rglob("*") if path.is_dir()]
        deleted = draw.choice(sorted(folders)) if folders else stages.project / "tunewright.yaml"
        print("deleted:", deleted)  # noqa: T201
        if deleted.is_dir():
            shutil.rmtree(deleted)
        else:
            deleted.unlink()
        started.send(signal.SIGCONT)
        assert_reported(stages.wait(started), case.codes)
        assert_reported(stages.run(command), (0, 1, 3, 4))


@each_command("clock jump")
def test_clock_that_jumps_changes_no_result(name: str, stages: Stages) -> None:
    case = CASES[name]
    for number, days in zip(moments("clock jump", name, stages), (-4000, 4000, -1), strict=False):
        stages.prepare(case.stage)
        fault = stages.fault(kinds=31, action=Action.JUMP, when=number, seconds=days * DAY)
        ended = stages.run(case.command, fault)
        assert ended.code in case.codes, ended
        assert case.state(stages) == stages.listed(name)[1]
        assert_reported(stages.run(case.command), case.codes)
        assert case.state(stages) == stages.listed(name)[1]


@each_command("memory limit")
def test_command_with_too_little_memory_leaves_the_old_or_the_new_state(name: str, stages: Stages) -> None:
    stages.listed(name)
    draw = random.Random(f"{seed()} memory {name}")
    reached = []
    for megabytes in (1, draw.randrange(2, 20), draw.randrange(20, 200)):
        print(f"{SEED_VARIABLE}={seed()}: {megabytes} MB for {name}")  # noqa: T201
        stages.prepare(CASES[name].stage)
        ended = stages.run(CASES[name].command, memory=megabytes * MEGABYTE)
        if not ended.had_no_memory_for_a_message:
            assert_reported(replace(ended, stderr=IGNORED.sub("", ended.stderr)), CASES[name].codes)
        reached.append(ended.code)
        if "Micro-batch:" in ended.stderr:  # its steps, with which the next command resumes, differ in the last bits
            assert_reported(stages.run(CASES[name].command), CASES[name].codes)
            continue
        assert_old_or_new(name, stages, None if ended.had_no_memory_for_a_message else ended)
    assert set(reached) - set(CASES[name].codes), "no limit was reached"
