"""Bounds on connections, by clients without a key over raw sockets."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine, scripted_server, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunewright.config import GatewayConfig
from tunewright.serving.gateway.connections import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED,
    raise_descriptor_limit,
)
from tunewright.serving.gateway.server import serving

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
TEN_MEGABYTES = 10 << 20
CHAT = "/v1/chat/completions"


async def _echo(request: Request) -> Response:
    body = await request.body()
    return JSONResponse({"headers": request.headers.items(), "body": body.decode()})


async def _refuse(_request: Request) -> Response:
    return Response(status_code=401)


APP = Starlette(routes=[Route("/", _echo, methods=["GET", "POST"]), Route("/refuse", _refuse, methods=["POST"])])


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        connection.settimeout(120)
        yield connection


@contextmanager
def connection_to(**limits: float) -> Iterator[socket.socket]:
    with serving(APP, limits=GatewayConfig.model_validate(limits)) as url, connected(url) as connection:
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection, which the server must close."""
    said = b""
    while chunk := connection.recv(65536):
        said += chunk
    return said


def read_answer(connection: socket.socket) -> tuple[int, Any]:
    """The status and document of one answer, on a connection that may stay open."""
    said = b""
    while b"\r\n\r\n" not in said:
        chunk = connection.recv(65536)
        assert chunk, said
        said += chunk
    head, _, body = said.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body or b"null")


def refusal(said: bytes) -> tuple[int, str]:
    """The status and code of the only answer, which closes the connection."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def send_until_refused(connection: socket.socket, pieces: Iterator[bytes]) -> int:
    """Send as long as the server takes it, and return the number of bytes."""
    sent = 0
    for piece in pieces:
        try:
            connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            break
        sent += len(piece)
    return sent


TOO_LARGE = {
    "one header": HEAD + b"a: " + b"x" * TEN_MEGABYTES,
    "many headers": HEAD + b"a1: b\r\n" * (TEN_MEGABYTES // 7),
    "one name": HEAD + b"x" * TEN_MEGABYTES,
    "a URL": b"GET /" + b"x" * TEN_MEGABYTES,
    "a method": b"G" * TEN_MEGABYTES,
    "empty lines": b"\r\n" * (TEN_MEGABYTES // 2),
    "one trailer": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na: " + b"x" * TEN_MEGABYTES,
    "trailers": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    + b"a: b\r\n" * (TEN_MEGABYTES // 6),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
@pytest.mark.parametrize("piece", [1 << 10, TEN_MEGABYTES * 2])
def test_request_head_of_ten_megabytes_is_refused_and_the_connection_closed(kind: str, piece: int) -> None:
    data = TOO_LARGE[kind]
    with connection_to() as connection:
        send_until_refused(connection, (data[at : at + piece] for at in range(0, len(data), piece)))
        status, code = refusal(read_to_end(connection))
    assert (status, code) == ((400, "invalid_http") if kind == "a method" else (431, "headers_too_large"))


def test_refused_heads_take_little_memory() -> None:
    data = TOO_LARGE["one header"]
    with serving(APP) as url, ExitStack() as opened:
        connections = [opened.enter_context(connected(url)) for _ in range(20)]
        tracemalloc.start()
        try:
            for connection in connections:
                send_until_refused(connection, iter([data]))
            for connection in connections:
                assert refusal(read_to_end(connection)) == (431, "headers_too_large")
            assert tracemalloc.get_traced_memory()[1] < len(data)
        finally:
            tracemalloc.stop()


def test_request_head_at_the_limits_is_answered_and_one_header_or_byte_more_is_refused() -> None:
    def ask(headers: list[bytes]) -> bytes:
        with connection_to() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n" + b"".join(headers) + b"Connection: close\r\n\r\n")
            return read_to_end(connection)

    own = len("/" + "connection" + "close")
    for count, size, status in (
        (MAX_HEADERS - 1, 2, 200),
        (MAX_HEADERS, 2, 431),
        (1, MAX_HEADER_BYTES - own, 200),
        (1, MAX_HEADER_BYTES - own + 1, 431),
    ):
        said = ask([b"a: " + b"x" * (size - 1) + b"\r\n"] * count)
        assert int(said.split()[1]) == status, (count, size)


def test_large_body_is_no_head() -> None:
    with connection_to() as connection:
        body = b"x" * (8 * MAX_HEADER_BYTES)
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        status, answer = read_answer(connection)
        assert (status, len(answer["body"])) == (200, len(body))
        connection.sendall(HEAD + b"\r\n")
        assert read_answer(connection)[0] == 200


def test_trailers_do_not_become_headers() -> None:
    """A proxy checks headers only, and a key in a trailer would pass it."""
    with connection_to() as connection:
        connection.sendall(
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nhi\r\n0\r\nAuthorization: Bearer another\r\n\r\n"
        )
        status, answer = read_answer(connection)
    assert (status, answer["body"]) == (200, "hi")
    assert sorted(name for name, _ in answer["headers"]) == ["host", "transfer-encoding"]


@pytest.mark.parametrize("begun", [HEAD, HEAD + b"a: ", b"G"])
def test_request_head_that_does_not_arrive_times_out(begun: bytes) -> None:
    with connection_to(header_timeout_s=0.2) as connection:
        connection.sendall(begun)
        assert refusal(read_to_end(connection)) == (408, "header_timeout")


@pytest.mark.slow
@pytest.mark.fault("connection", "serve")
def test_request_head_that_trickles_times_out() -> None:
    with connection_to(header_timeout_s=0.5) as connection:
        trickle = send_until_refused(connection, _slowly(HEAD + b"a: " + b"x" * 10_000_000))
        assert refusal(read_to_end(connection)) == (408, "header_timeout")
        assert trickle < 10_000_000


def _slowly(data: bytes) -> Iterator[bytes]:
    for at in range(len(data)):
        time.sleep(0.01)
        yield data[at : at + 1]


def test_connection_without_a_request_is_closed_without_an_answer() -> None:
    with connection_to(header_timeout_s=0.2) as connection:
        assert read_to_end(connection) == b""


def test_connection_is_closed_when_its_next_request_does_not_come() -> None:
    with connection_to(keep_alive_timeout_s=1) as connection:
        for _ in range(2):
            connection.sendall(HEAD + b"\r\n")
            assert read_answer(connection)[0] == 200
        assert read_to_end(connection) == b""


def test_second_request_head_times_out_too() -> None:
    with connection_to(header_timeout_s=0.3) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert read_answer(connection)[0] == 200
        connection.sendall(HEAD)
        assert refusal(read_to_end(connection)) == (408, "header_timeout")


def test_rest_of_a_refused_body_must_arrive_in_the_time_of_a_head() -> None:
    with connection_to(header_timeout_s=0.3) as connection:
        connection.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n")
        assert read_answer(connection)[0] == 401
        send_until_refused(connection, _slowly(b"x" * 10_000_000))
        assert connection.recv(1) == b""


def test_connection_is_kept_after_the_rest_of_a_refused_body() -> None:
    with connection_to(header_timeout_s=60) as connection:
        connection.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        assert read_answer(connection)[0] == 401
        connection.sendall(b"x" * 10 + HEAD + b"\r\n")
        assert read_answer(connection)[0] == 200


def test_bytes_that_are_no_http_are_refused() -> None:
    with connection_to() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        assert refusal(read_to_end(connection)) == (400, "invalid_http")


def test_oversized_second_request_does_not_write_into_the_first_answer() -> None:
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "hello"}], "stream": True}).encode()
    engine = ScriptedEngine([0.05] * 1000)
    with scripted_server(engine) as client, connected(str(client.base_url)) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        first = connection.recv(65536)
        assert first.startswith(b"HTTP/1.1 200")
        send_until_refused(connection, iter([TOO_LARGE["one header"]]))
        said = first
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                said += chunk
        assert b"HTTP/1.1 431" not in said and b"[DONE]" not in said
        until(lambda: engine.aborted == 1)


def read_answers(connection: socket.socket, count: int) -> bytes:
    """Read as many answers, which are one of _echo each."""
    said = b""
    while said.count(b'"body"') < count:
        chunk = connection.recv(65536)
        assert chunk, said
        said += chunk
    return said


def asking(body: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def test_pipelined_requests_are_answered_in_order() -> None:
    bodies = [b"%d" % number for number in range(1 + MAX_PIPELINED)]
    with connection_to() as connection:
        for few in (bodies[:2], bodies):
            connection.sendall(b"".join(map(asking, few)))
            said = read_answers(connection, len(few))
            assert re.findall(rb'"body":"(\d)"', said) == few


def test_pipelined_request_whose_body_comes_later_is_answered() -> None:
    large = b"x" * (8 * MAX_HEADER_BYTES)
    with connection_to() as connection:
        connection.sendall(asking(b"1") + asking(large)[:-1])
        assert b'"body":"1"' in read_answers(connection, 1)
        connection.sendall(large[-1:] + asking(b"3"))
        assert b'"body":"3"' in read_answers(connection, 2)


def test_pipelined_requests_over_the_limit_end_the_connection_after_the_earlier_answers() -> None:
    with connection_to() as connection:
        connection.sendall(asking(b"1") * (MAX_PIPELINED + 20))
        said = read_to_end(connection)
    answers, version, error = said.rpartition(b"HTTP/1.1 ")
    assert answers.count(b"HTTP/1.1 200") == 1 + MAX_PIPELINED
    assert refusal(version + error) == (429, "too_many_pipelined_requests")


PIPELINED = {"shortest": b"GET / HTTP/1.1\r\n\r\n", "with a body": asking(b"1")}


@pytest.mark.parametrize("kind", PIPELINED)
def test_pipelined_requests_that_are_never_read_take_little_memory_and_stop_nobody(kind: str) -> None:
    data = PIPELINED[kind] * ((2 << 20) // len(PIPELINED[kind]))
    with serving(APP) as url, ExitStack() as opened:
        tracemalloc.start()
        try:
            for count, most in ((1, 10 << 20), (49, 100 << 20)):
                for _ in range(count):
                    connection = opened.enter_context(connected(url))
                    connection.setblocking(False)
                    with suppress(BlockingIOError, ConnectionResetError, BrokenPipeError):
                        for at in range(0, len(data), 1 << 16):
                            connection.send(data[at : at + (1 << 16)])
                assert httpx.get(url, trust_env=False, timeout=60).status_code == 200
                assert tracemalloc.get_traced_memory()[1] < most
        finally:
            tracemalloc.stop()


def test_upgrade_is_answered_as_an_ordinary_request() -> None:
    for protocol in (b"websocket", b"h2c"):
        with connection_to() as connection:
            connection.sendall(
                HEAD + b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            assert read_answer(connection)[0] == 200


def test_new_connection_replaces_the_longest_idle_one_at_the_maximum(caplog: pytest.LogCaptureFixture) -> None:
    limits = GatewayConfig(max_connections=3, header_timeout_s=600)
    with caplog.at_level(logging.WARNING), serving(APP, limits=limits) as url, ExitStack() as opened:
        used = opened.enter_context(connected(url))
        used.sendall(HEAD + b"\r\n")
        assert read_answer(used)[0] == 200
        idle = [opened.enter_context(connected(url)) for _ in range(2)]
        for connection in idle:  # all are accepted, in this order
            connection.sendall(HEAD)
        # `used` has waited for a request since its answer, which is before the others came.
        newcomers = [opened.enter_context(connected(url)) for _ in range(2)]
        for newcomer in newcomers:
            newcomer.sendall(HEAD + b"\r\n")
            assert read_answer(newcomer)[0] == 200
        assert read_to_end(used) == b""
        assert read_to_end(idle[0]) == b""
        idle[1].sendall(b"\r\n")
        assert read_answer(idle[1])[0] == 200
        until(lambda: bool(caplog.records))
    assert sum("idle connection at the maximum of 3" in record.message for record in caplog.records) == 1


def test_connection_is_refused_when_all_others_have_requests() -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    engine = ScriptedEngine([0.0] + [60.0] * 10)
    with scripted_server(engine, max_connections=2) as client, ExitStack() as opened:
        for _ in range(2):
            answer = opened.enter_context(client.stream("POST", CHAT, json=body))
            assert answer.status_code == 200
        with connected(str(client.base_url)) as newcomer:
            assert refusal(read_to_end(newcomer)) == (503, "too_many_connections")


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from test_connections import APP
from tunewright.config import GatewayConfig
from tunewright.serving.gateway.server import serving

with serving(APP, limits=GatewayConfig(header_timeout_s=float(sys.argv[3]))) as url:
    print(url, resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
    sys.stdin.readline()
    print(len(list(Path("/proc/self/fd").iterdir())), flush=True)
"""


@contextmanager
def server_under_a_limit(
    soft: int, hard: int, header_timeout_s: float = 600
) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    command = [sys.executable, "-c", UNDER_A_LIMIT, *map(str, (soft, hard, header_timeout_s))]
    paths = {"PYTHONPATH": ":".join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=paths) as process:
        assert process.stdout is not None
        url, limit = process.stdout.readline().split()
        yield process, url, int(limit)


@pytest.mark.slow
def test_request_sent_while_the_server_is_stopped_is_answered() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with server_under_a_limit(400, hard, 2) as (process, url, _), connected(url) as connection:
        assert httpx.get(url, trust_env=False).status_code == 200  # so the connection is accepted
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        connection.sendall(HEAD + b"\r\n")
        process.send_signal(signal.SIGCONT)
        assert read_answer(connection)[0] == 200
        process.communicate("\n", timeout=300)


@pytest.mark.slow
def test_newcomers_are_answered_with_more_idle_connections_than_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_descriptor_limit(min(2048, hard))
    with server_under_a_limit(400, 400) as (process, url, _), ExitStack() as opened:
        for _ in range(600):
            opened.enter_context(connected(url))
        for _ in range(5):
            assert httpx.get(url, trust_env=False).status_code == 200
        out, err = process.communicate("\n", timeout=300)
    assert int(out) < 400
    at_start, reached = [line for line in err.splitlines() if "max_connections" in line]
    assert "accepts 200 connections instead of 4096 (gateway.max_connections)" in at_start
    assert "idle connection at the maximum of 200" in reached


@pytest.mark.slow
def test_soft_limit_of_descriptors_is_raised_at_the_start() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 8192:
        pytest.skip(f"the hard limit is {hard}")
    with server_under_a_limit(256, 8192) as (process, _, limit):
        _, err = process.communicate("\n", timeout=300)
    assert 4096 < limit <= 8192
    assert "max_connections" not in err


def test_refused_connections_are_logged_in_one_line_however_many(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(APP) as url:
        for _ in range(50):
            with connected(url) as connection:
                connection.sendall(b"not HTTP\r\n\r\n")
                assert refusal(read_to_end(connection))[0] == 400
        until(lambda: bool(caplog.records))
    assert len(caplog.records) == 1
    assert "Invalid HTTP request" in caplog.records[0].message
