"""Graceful shutdown: SIGTERM during an answer, as an orchestrator sends it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow

SERVER = """
import sys
from scripted_engine import LIMITS, MODELS, TOKENIZATION, ScriptedEngine
from tunewright.config import GatewayConfig
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.server import serve

gateway = Gateway(ScriptedEngine([0.02] * int(sys.argv[1])), AnonymousAuth(MODELS), TOKENIZATION, LIMITS)
report = lambda what: print(what, flush=True)
limits = GatewayConfig(drain_timeout_s=float(sys.argv[2]))
serve(gateway.app, "127.0.0.1", 0, limits, drain=gateway, on_ready=report, say=report)
print("in good order", flush=True)
"""
ASKED = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "stream": True}


@contextmanager
def server(tokens: int, drain_seconds: float, *, cut_off: bool) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Run a server with answers of this many tokens, fifty per second, and check its messages at the end."""
    command = [sys.executable, "-c", SERVER, str(tokens), str(drain_seconds)]
    paths = {"PYTHONPATH": ":".join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=paths) as process:
        try:
            assert process.stdout is not None
            with httpx.Client(base_url=process.stdout.readline().strip(), trust_env=False, timeout=60) as client:
                yield process, client
            out, err = process.communicate(timeout=300)
            begun = f"Stopping: refusing new requests and waiting up to {drain_seconds:g} s for 1 request."
            ended = ["Timed out: aborting 1 request."] if cut_off else []
            assert (process.returncode, out.splitlines()) == (0, [begun, *ended, "Stopped.", "in good order"]), err
            assert "Traceback" not in err
        finally:
            process.kill()


def test_drain_finishes_running_requests_and_refuses_new_ones() -> None:
    with server(tokens=100, drain_seconds=60, cut_off=False) as (process, client):
        assert client.get("/ready").json() == {"status": "ready"}
        with client.stream("POST", "/v1/chat/completions", json=ASKED) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            # The signal is a matter of microseconds, the answer one of two seconds.
            ready = client.get("/ready")
            while ready.status_code == 200:
                ready = client.get("/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/chat/completions", json=ASKED)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
            text = [line for line in lines if line]
        assert text[-1] == "data: [DONE]"
        assert sum('"content": "a"' in line for line in text) == 100


@pytest.mark.parametrize(("seconds", "signals"), [(0.5, [signal.SIGTERM]), (600, [signal.SIGINT, signal.SIGINT])])
def test_drain_aborts_requests_when_it_times_out_and_on_a_second_signal(
    seconds: float, signals: list[signal.Signals]
) -> None:
    with (
        server(tokens=100_000, drain_seconds=seconds, cut_off=True) as (process, client),
        client.stream("POST", "/v1/chat/completions", json=ASKED) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        first, *more = signals
        process.send_signal(first)
        for number in more:
            while client.get("/ready").status_code == 200:
                pass
            process.send_signal(number)
        *_, last = (line for line in lines if line)
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["message"]) == ("shutting_down", "The server is shutting down.")
