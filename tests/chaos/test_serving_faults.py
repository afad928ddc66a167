"""Faults under a server with two tenants: usage stays exact to the request, and no answer is another adapter's."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from faulty import SEED_VARIABLE, Action, Kind, counted, seed
from stages import HANG_S, Stages

from making.forked import Command, Fault
from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import Database
from tunewright.serving.tenants.usage import UsageLine

pytestmark = pytest.mark.chaos
pytest_plugins = ["chaos_fixtures"]

ALIASES = {"courts": "acme", "recipes": "globex"}
SERVE = ("serve", "--port", "0", "--metrics-port", "0", "--json")
DAY = 86_400
MEGABYTE = 1 << 20


@dataclass
class Answers:
    """The answers that clients of each alias received."""

    whole: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {alias: [] for alias in ALIASES})
    refused: list[httpx.Response] = field(default_factory=list)
    cut_off: int = 0
    """Requests that ended without an answer."""


class Served:
    """A running server, and what its clients know of it."""

    def __init__(self, stages: Stages, fault: Fault | None) -> None:
        self.stages = stages
        self.keys: dict[str, str] = json.loads((stages.project / "keys.json").read_text())
        self.command = stages.start(SERVE, fault)
        until = time.monotonic() + HANG_S
        while not (text := (self.command.folder / "stdout").read_text()).endswith("}\n"):
            assert time.monotonic() < until and alive(self.command), self.command.stderr
            time.sleep(0.02)
        self.url = json.loads(text)["url"]

    def ask(self, alias: str, answers: Answers) -> None:
        """Send one request, and keep its answer."""
        messages = [{"role": "user", "content": "red teal navy 7"}]
        body = {"model": alias, "messages": messages, "max_tokens": 8, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.keys[alias]}"}
        try:
            reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=HANG_S)
        except httpx.TransportError:
            answers.cut_off += 1
            return
        if reply.status_code == 200:
            digest = reply.headers["x-tunewright-adapter"]
            answers.whole[alias].append({**reply.json(), "digest": digest})
        else:
            answers.refused.append(reply)

    def load(self, answers: Answers, each: int = 4) -> None:
        """Send requests of both tenants, two of each at once."""
        with ThreadPoolExecutor(4) as threads:
            for _ in threads.map(lambda alias: self.ask(alias, answers), [*ALIASES] * each):
                pass


def alive(command: Command) -> bool:
    """Return whether the process still runs."""
    try:
        with open(f"/proc/{command.pids[0]}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end between the opening and the reading
        return False


@contextmanager
def served(stages: Stages, fault: Fault | None = None) -> Iterator[Served]:
    """Serve the project, and end the server with Ctrl-C."""
    running = Served(stages, fault)
    try:
        yield running
    finally:
        if alive(running.command):
            running.command.send(signal.SIGINT)
        ended = stages.wait(running.command)
        assert "Traceback" not in ended.stderr, ended.stderr[-4000:]


def lines(stages: Stages) -> list[UsageLine]:
    """Return the recorded requests."""
    with State(f"sqlite:///{stages.project}/serving/state.sqlite") as state:
        return list(state.usage.lines())


@pytest.fixture(scope="module")
def reference(stages: Stages) -> dict[str, tuple[str, str]]:
    """Each alias's adapter and answer when nothing fails."""
    stages.prepare("tenants")
    answers = Answers()
    with served(stages) as server:
        server.load(answers, each=1)
    found = {alias: (one["digest"], text(one)) for alias, (one,) in answers.whole.items()}
    assert found["courts"][0] != found["recipes"][0]
    assert found["courts"][1] != found["recipes"][1]
    return found


def text(answer: dict[str, Any]) -> str:
    """Return an answer's text."""
    return str(answer["choices"][0]["message"]["content"])


def assert_own_adapters(answers: Answers, reference: dict[str, tuple[str, str]]) -> None:
    """Each answer is its own adapter's, and each refusal says what to do."""
    for alias, whole in answers.whole.items():
        assert all((one["digest"], text(one)) == reference[alias] for one in whole)
    for reply in answers.refused:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "state_unavailable")
        assert int(reply.headers["retry-after"]) >= 1


def assert_exact(answers: Answers, stages: Stages) -> None:
    """Every whole answer is recorded once with its tokens, and every other record is of a request without one."""
    recorded = lines(stages)
    for alias, tenant in ALIASES.items():
        settled = [line for line in recorded if line.tenant == tenant and line.outcome in ("stop", "length")]
        asked = [(one["usage"]["prompt_tokens"], one["usage"]["completion_tokens"]) for one in answers.whole[alias]]
        assert sorted((line.prompt_tokens, line.completion_tokens) for line in settled) == sorted(asked)
    others = [line for line in recorded if line.outcome not in ("stop", "length")]
    assert len(others) <= answers.cut_off + len(answers.refused)
    assert stages.read("audit", "verify")["ok"]


@pytest.fixture(scope="module")
def calls(stages: Stages, reference: dict[str, tuple[str, str]]) -> int:
    """Calls that change a file while the server starts and answers."""
    del reference
    stages.prepare("tenants")
    with served(stages, stages.fault(kinds=31)) as server:
        server.load(Answers())
        return counted(server.command)[0]


def moments(fault: str, calls: int, tries: int) -> Iterator[int]:
    """Return numbers of calls in the second half, when the server answers, by the seed.

    The last tenth is left out: the number of calls depends on how requests meet, and differs by a few each time.
    """
    draw = random.Random(f"{seed()} {fault} serve")
    middle = range(calls // 2, calls * 9 // 10)
    for number in sorted(draw.sample(middle, min(tries, len(middle)))):
        print(f"{SEED_VARIABLE}={seed()}: {fault} at call {number} of {calls} of serve")  # noqa: T201
        yield number


@pytest.mark.fault("kill", "serve")
def test_killed_server_loses_no_record_of_an_answer(
    stages: Stages, reference: dict[str, tuple[str, str]], calls: int
) -> None:
    for number in moments("kill", calls, 3 if stages.release else 2):
        stages.prepare("tenants")
        answers = Answers()
        running = Served(stages, stages.fault(kinds=31, action=Action.KILL, when=number))
        running.load(answers)
        if alive(running.command):
            running.command.send(signal.SIGKILL)
        assert stages.wait(running.command).code == -signal.SIGKILL
        assert_own_adapters(answers, reference)
        assert answers.refused == []
        recorded = lines(stages)
        for alias, tenant in ALIASES.items():
            of_tenant = [line for line in recorded if line.tenant == tenant]
            whole = len(answers.whole[alias])
            assert len(of_tenant) >= whole, "an answer without a record"
            # What was not settled counts with all the tokens that it reserved.
            assert len([line for line in of_tenant if line.outcome in ("stop", "length")]) <= whole + 2
        assert len(recorded) <= sum(map(len, answers.whole.values())) + answers.cut_off
        with served(stages) as again:
            after = Answers()
            again.load(after, each=1)
        assert_own_adapters(after, reference)
        assert [len(whole) for whole in after.whole.values()] == [1, 1]
        assert len(lines(stages)) == len(recorded) + 2


@pytest.mark.fault("kill", "serve")
def test_limits_count_what_a_killed_server_recorded(stages: Stages, calls: int) -> None:
    limit = 12
    (number,) = moments("kill, limits", calls, 1)
    for _ in range(5):  # the limit is one of a minute, in which both servers have to run
        stages.prepare("tenants")
        stages.read("tenant", "limit", "acme", "--requests", str(limit))
        began = time.monotonic()
        running = Served(stages, stages.fault(kinds=31, action=Action.KILL, when=number))
        running.load(Answers())
        if alive(running.command):
            running.command.send(signal.SIGKILL)
        stages.wait(running.command)
        recorded = sum(line.tenant == "acme" for line in lines(stages))
        after = Answers()
        with served(stages) as again:
            for _ in range(limit):
                again.ask("courts", after)
        if time.monotonic() - began < 50:
            break
    else:
        pytest.fail("the machine is too slow for a limit per minute")
    assert len(after.whole["courts"]) == limit - recorded
    codes = {(reply.status_code, reply.json()["error"]["code"]) for reply in after.refused}
    assert codes == ({(429, "rate_limit_exceeded")} if recorded else set())


@pytest.mark.fault("stop", "serve")
def test_stopped_server_continues_with_exact_usage(
    stages: Stages, reference: dict[str, tuple[str, str]], calls: int
) -> None:
    for number in moments("stop", calls, 2 if stages.release else 1):
        stages.prepare("tenants")
        answers = Answers()
        how = stages.fault(kinds=31, action=Action.STOP, when=number)
        with served(stages, how) as server, ThreadPoolExecutor(1) as threads:
            loading = threads.submit(server.load, answers)
            until = time.monotonic() + HANG_S
            while not counted(server.command)[1] and not loading.done():
                assert time.monotonic() < until
                time.sleep(0.01)
            # Another process reads and changes the state meanwhile, or is refused.
            listed = stages.read("tenant", "list")
            assert listed is None or len(listed["tenants"]) == 2
            server.command.send(signal.SIGCONT)
            loading.result()
        assert_own_adapters(answers, reference)
        assert_exact(answers, stages)
        assert answers.cut_off == 0


@pytest.mark.parametrize(
    ("fault", "number", "kinds"),
    [
        pytest.param("full disk", errno.ENOSPC, 15, marks=pytest.mark.fault("full disk", "serve")),
        pytest.param("read-only disk", errno.EROFS, 31, marks=pytest.mark.fault("read-only disk", "serve")),
        pytest.param("failing disk", errno.EIO, 31),
    ],
)
def test_usage_is_exact_after_the_disk_refused_writes_for_a_while(
    fault: str, number: int, kinds: int, stages: Stages, reference: dict[str, tuple[str, str]], calls: int
) -> None:
    draw = random.Random(f"{seed()} {fault}")
    for when in moments(fault, calls, 2 if stages.release else 1):
        stages.prepare("tenants")
        answers = Answers()
        how = stages.fault(kinds=kinds, action=Action.FAIL, when=when, number=number, lasting=draw.randrange(8))
        with served(stages, how) as server:
            server.load(answers)
            assert counted(server.command)[1], "the fault did not happen"
            until = time.monotonic() + HANG_S
            after = Answers()
            while not all(after.whole.values()):
                assert time.monotonic() < until, server.command.stderr
                server.load(after, each=1)
                time.sleep(0.2)
        for alias in ALIASES:
            answers.whole[alias] += after.whole[alias]
        answers.refused += after.refused
        assert_own_adapters(answers, reference)
        assert_exact(answers, stages)


_REOPENED = """
import ctypes, gc, sys
from tunewright.serving.tenants import StateUnavailableError
from tunewright.serving.tenants.database import Database

folder, kind, action, number, when = sys.argv[1], *map(int, sys.argv[2:])
gc.disable()  # the collector would close connections that nothing refers to
faults = ctypes.CDLL(None)

def arm(when):
    faults.faults_arm(f"{folder}-counts".encode(), folder.encode(), kind, action, ctypes.c_long(when), number, 0, 0)

def write():
    try:
        with database.writing() as connection:
            connection.exec_driver_sql("UPDATE tunewright_schema SET version = version")
        print("written")
    except StateUnavailableError as error:
        print(error)

database = Database(f"sqlite:///{folder}/state.sqlite")
if when > 1:
    database.close()
    arm(when)
with database.reading() as reader:
    reader.exec_driver_sql("SELECT * FROM tunewright_schema")
    if when == 1:
        arm(when)
    write()
arm(10**9)
write()
write()
"""


# Opened at the third creation, the index of the write-ahead log is read-only for all connections.
@pytest.mark.parametrize("when", [1, 3], ids=["one connection", "the log's index"])
def test_database_is_written_again_after_the_disk_was_read_only(when: int, library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    Database(f"sqlite:///{folder}/state.sqlite").close()
    numbers = map(str, (int(Kind.CREATE), int(Action.FAIL), errno.EROFS, when))
    with closing(sqlite3.connect(folder / "state.sqlite")) as other:
        other.execute("SELECT * FROM tunewright_schema").fetchall()  # or the last connection would delete the log
        ended = subprocess.run(
            [sys.executable, "-c", _REOPENED, str(folder), *numbers],
            env=os.environ | {"LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    refused, *_, written = ended.stdout.splitlines()
    assert "readonly database" in refused
    assert written == "written"


@pytest.mark.fault("deleted files", "serve")
def test_server_refuses_requests_when_its_state_is_deleted(
    stages: Stages, reference: dict[str, tuple[str, str]]
) -> None:
    stages.prepare("tenants")
    answers = Answers()
    with served(stages) as server:
        server.load(answers, each=1)
        for file in (stages.project / "serving").iterdir():
            file.unlink()
        server.load(answers, each=1)
        assert "deleted while it was in use" in " ".join(server.command.stderr.split())
    assert_own_adapters(answers, reference)
    assert len(answers.refused) == 2


@pytest.mark.fault("clock jump", "serve")
@pytest.mark.parametrize("days", [-400, 400])
def test_usage_is_exact_when_the_clock_jumps(
    days: int, stages: Stages, reference: dict[str, tuple[str, str]], calls: int
) -> None:
    (number,) = moments("clock jump", calls, 1)
    stages.prepare("tenants")
    answers = Answers()
    with served(stages, stages.fault(kinds=31, action=Action.JUMP, when=number, seconds=days * DAY)) as server:
        server.load(answers)
    assert_own_adapters(answers, reference)
    assert_exact(answers, stages)
    assert [len(whole) for whole in answers.whole.values()] == [4, 4]


@pytest.mark.fault("memory limit", "serve")
def test_server_without_memory_for_the_base_reports_it(stages: Stages) -> None:
    draw = random.Random(f"{seed()} memory serve")
    stages.prepare("tenants")
    reached = []
    for megabytes in (1, *draw.sample(range(2, 10), 2)):
        ended = stages.run(SERVE, memory=megabytes * MEGABYTE)
        reached.append(ended.code)
        if ended.had_no_memory_for_a_message:
            continue
        assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
        assert ended.code == 2, ended
        assert json.loads(ended.stdout)["error"]["fix"]
    assert 2 in reached
