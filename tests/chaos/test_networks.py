"""Slow and dropped connections to a judge, to PostgreSQL and to clients, and PostgreSQL restarted."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from faulty import SEED_VARIABLE, seed
from stages import CASES, Stages
from tenant_server import ASKED, Running, Stored, tenant_server, until

from making.forked import Ended
from making.postgres import USER, new_schema, restart
from tunewright.serving.tenants import State

pytestmark = pytest.mark.chaos
pytest_plugins = ["chaos_fixtures", "tenant_server"]

BACKEND = "postgresql"


class Proxy:
    """Passes connections on to an address, and asks at each piece that a client sends what happens to it.

    Args:
        target: (host, port), or a Unix socket's path.
        fault: gets the number of earlier pieces; True drops the connection.
        answered: gets the number of earlier pieces of answers; True drops the connection before this one.
    """

    def __init__(
        self,
        target: tuple[str, int] | str,
        fault: Callable[[int], bool] = lambda _: False,
        answered: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self.target = target
        self.fault = fault
        self.answered = answered
        self.pieces = itertools.count()
        self.answers = itertools.count()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        family = socket.AF_UNIX if isinstance(self.target, str) else socket.AF_INET
        with client, socket.socket(family) as server, suppress(OSError):
            server.connect(self.target)
            back = threading.Thread(target=_pass_on, args=(server, client, self.answered, self.answers))
            back.start()
            _pass_on(client, server, self.fault, self.pieces)
            back.join()

    def close(self) -> None:
        """Accept no more connections."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def _pass_on(source: socket.socket, target: socket.socket, fault: Callable[[int], bool], count: Iterator[int]) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            if fault(next(count)):
                break
            target.sendall(piece)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(*arguments: Any, **named: Any) -> Iterator[Proxy]:
    """Run a proxy while the block runs."""
    running = Proxy(*arguments, **named)
    try:
        yield running
    finally:
        running.close()


# A judge's endpoint


@pytest.mark.fault("connection", "judge")
def test_judge_finds_the_same_over_slow_and_dropped_connections(stages: Stages) -> None:
    _, after, _ = stages.listed("judge")
    draw = random.Random(f"{seed()} judge")
    print(f"{SEED_VARIABLE}={seed()}")  # noqa: T201
    stages.prepare("unjudged")
    host, port = httpx.URL(stages.judge.url).host, httpx.URL(stages.judge.url).port
    assert port is not None

    def faulty(_: int) -> bool:
        time.sleep(draw.uniform(0, 0.005))
        return draw.random() < 0.05

    with proxy((host, port), faulty, faulty) as slow:
        config = stages.project / "tunewright.yaml"
        config.write_text(config.read_text().replace(str(port), str(slow.port)))
        for _ in range(10):  # a run gives up when one request fails as often as max_retries allows
            ended = stages.run(("judge",))
            assert "Traceback" not in ended.stderr, ended.stderr
            if ended.code != 2:
                break
    assert ended.code == 0, ended
    assert CASES["judge"].state(stages) == after


# PostgreSQL under deploy and promote


def _run(name: str, stages: Stages, url: str) -> Ended:
    return stages.run((*CASES[name].command, "--database-url", url))


def _releases(stages: Stages, url: str) -> list[tuple[str, str]]:
    with State(url) as state:
        assert not state.audit.verify().faults
        return [(release.alias, release.action) for release in state.releases.history()]


def _prepared(name: str, stages: Stages, postgres: Path) -> str:
    """Return the URL of a state in PostgreSQL in which the command can run."""
    stages.prepare("second")
    url = new_schema(postgres)
    if name == "promote":
        assert _run("deploy", stages, url).code == 0
        assert _run("canary", stages, url).code == 0
    return url


def _assert_old_or_new_after(
    name: str, stages: Stages, postgres: Path, fault: Callable[[], bool], busy: threading.Lock, *, answers: bool
) -> None:
    """The fault happens at pieces of what the command sends, or of what it receives, and lasts while it is busy."""
    url = _prepared(name, stages, postgres)
    before = _releases(stages, url) if name == "promote" else []
    target = f"{postgres}/.s.PGSQL.5432"

    def through(port: int) -> str:
        return url.replace(f"@/postgres?host={postgres}&", f"@127.0.0.1:{port}/postgres?")

    with proxy(target) as counting:
        assert USER in through(counting.port)
        assert _run(name, stages, through(counting.port)).code == 0
        after, pieces = _releases(stages, url), next(counting.answers if answers else counting.pieces)
    draw = random.Random(f"{seed()} {name} {answers}")
    for number in sorted(draw.sample(range(pieces), 3 if stages.release else 2)):
        print(f"{SEED_VARIABLE}={seed()}: at piece {number} of {pieces}")  # noqa: T201
        url = _prepared(name, stages, postgres)

        def at(count: int, number: int = number) -> bool:
            return count == number and fault()

        with proxy(target, **{"answered" if answers else "fault": at}) as faulty:
            ended = _run(name, stages, through(faulty.port))
        with busy:
            pass
        assert "Traceback" not in ended.stderr, ended.stderr
        assert ended.code in (0, 2), ended
        found = _releases(stages, url)
        assert found in (before, after)
        assert ended.code == 2 or found == after, "acknowledged, and lost"
        again = _run(name, stages, url)
        assert again.code == 0 or found == after, again
        assert _releases(stages, url) == after


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fault("connection", name)) for name in ("deploy", "promote")]
)
def test_release_is_made_or_not_when_the_connection_to_postgresql_is_dropped(
    name: str, answers: bool, stages: Stages, postgres: Path
) -> None:
    _assert_old_or_new_after(name, stages, postgres, lambda: True, threading.Lock(), answers=answers)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fault("postgresql", name)) for name in ("deploy", "promote")]
)
def test_release_is_made_or_not_when_postgresql_restarts(name: str, stages: Stages, postgres: Path) -> None:
    busy = threading.Lock()

    def restarting() -> bool:
        with busy:
            restart(postgres)
        return False

    _assert_old_or_new_after(name, stages, postgres, restarting, busy, answers=False)


# A server


def _post(url: str, key: str, alias: str) -> httpx.Response | None:
    body = {"model": alias, "messages": ASKED, "max_tokens": 4}
    try:
        return httpx.post(
            f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=300
        )
    except httpx.TransportError:
        return None


def _assert_exact(state: State, adapters: dict[str, Stored], replies: list[httpx.Response | None]) -> None:
    """Each answer is its own adapter's and is recorded once; other records are of requests without an answer."""
    answered = [reply for reply in replies if reply is not None and reply.status_code == 200]
    for answer in answered:
        expected = {"courts": "one", "recipes": "two"}[answer.json()["model"]]
        assert answer.headers["x-tunewright-adapter"] == adapters[expected].digest
    for reply in replies:
        if reply is not None and reply.status_code != 200:
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "state_unavailable")
    until(lambda: all(line.outcome for line in state.usage.lines()))
    lines = list(state.usage.lines())
    settled = [line for line in lines if line.outcome in ("stop", "length")]
    tokens = sorted((line.digest, line.prompt_tokens, line.completion_tokens) for line in settled)
    received = sorted(
        (r.headers["x-tunewright-adapter"], r.json()["usage"]["prompt_tokens"], r.json()["usage"]["completion_tokens"])
        for r in answered
    )
    unread = len(replies) - len(answered)
    assert len(lines) <= len(replies)
    assert len(settled) - unread <= len(answered) <= len(settled)
    for each in received:
        tokens.remove(each)


@pytest.mark.fault("postgresql", "serve")
@pytest.mark.parametrize("state_url", [BACKEND], indirect=True)
def test_usage_is_exact_when_postgresql_restarts_under_load(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], postgres: Path
) -> None:
    keys = [(two_tenants["acme"], "courts"), (two_tenants["globex"], "recipes")]
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(_post, server.url, *keys[number % 2]) for number in range(16)]
        for _ in range(2):
            until(lambda: sum(each.done() for each in asked) >= 2)
            restart(postgres)
        replies = [each.result() for each in asked]
    after: list[httpx.Response | None] = []
    for key, alias in keys:
        until(lambda key=key, alias=alias: after.append(_post(server.url, key, alias)) or after[-1].status_code == 200)  # type: ignore[misc,union-attr,func-returns-value]
    _assert_exact(state, adapters, replies + after)


@pytest.mark.fault("connection", "serve")
def test_usage_is_exact_when_clients_and_connections_drop(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    draw = random.Random(f"{seed()} serve")
    print(f"{SEED_VARIABLE}={seed()}")  # noqa: T201

    def faulty(_: int) -> bool:
        time.sleep(draw.uniform(0, 0.01))
        return draw.random() < 0.2

    with tenant_server(state_url, adapters) as server:
        address = httpx.URL(server.url)
        with proxy((address.host, address.port), faulty, faulty) as slow, ThreadPoolExecutor(4) as threads:
            url = f"http://127.0.0.1:{slow.port}"
            keys = [(two_tenants["acme"], "courts"), (two_tenants["globex"], "recipes")]
            replies = list(threads.map(lambda number: _post(url, *keys[number % 2]), range(24)))
        assert None in replies
        for key, alias in keys:
            last = _post(server.url, key, alias)
            assert last is not None
            assert last.status_code == 200
            replies.append(last)
        _assert_exact(state, adapters, replies)
