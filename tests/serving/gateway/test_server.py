"""Start and stop of the server, in the background and by Ctrl-C, and its effect on its own process."""

from __future__ import annotations

import gc
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import tunewright
from making.command_line import tiny_project
from tunewright.config import GatewayConfig
from tunewright.core.errors import UserError
from tunewright.serving.gateway.server import _listen, serve, serving
from tunewright.serving.options import ServeOptions


async def _hello(_request: Request) -> Response:
    return PlainTextResponse("hello")


APP = Starlette(routes=[Route("/", _hello)])

FOREGROUND = """
import asyncio, sys
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from tunewright.config import GatewayConfig
from tunewright.serving.gateway.server import serve

async def words():
    yield "first "
    while not server_is_stopping():
        await asyncio.sleep(0.01)
    yield "last"

async def answer(request):
    return StreamingResponse(words())

def server_is_stopping():
    # uvicorn closes its listening socket first of all.
    import socket
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0

def on_ready(url):
    global port
    port = int(url.rsplit(":", 1)[1])
    print(url, flush=True)

serve(Starlette(routes=[Route("/", answer)]), "127.0.0.1", 0, GatewayConfig(), on_ready=on_ready)
print("in good order", flush=True)
"""


def test_background_server_runs_for_its_block() -> None:
    with serving(APP) as url:
        assert httpx.get(url, trust_env=False).text == "hello"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_ctrl_c_finishes_answers_without_a_traceback(tmp_path: Path) -> None:
    script = tmp_path / "foreground.py"
    script.write_text(FOREGROUND)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.stream("GET", url, trust_env=False) as response:
            pieces = response.iter_text()
            assert next(pieces) == "first "
            process.send_signal(signal.SIGINT)
            assert "".join(pieces) == "last"
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out.strip()) == (0, "in good order")
    assert "Traceback" not in err


def test_serve_names_the_port_when_the_address_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Cannot listen on 127.0.0.1 port {port}"):
            serve(APP, "127.0.0.1", port, GatewayConfig())


def test_tokens_do_not_wait_for_tcp_acknowledgements() -> None:
    """Nagle's algorithm is off on the connections that come in."""
    listener = _listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.slow
def test_garbage_collection_skips_loaded_objects_while_serving(small_base: Path, tmp_path: Path) -> None:
    service = tunewright.open(tiny_project(tmp_path / "project", small_base)).serve(options=ServeOptions(port=0))
    gc.unfreeze()  # what tests/conftest.py exempts
    loaded = len(gc.get_objects())
    with service.running():
        assert len(gc.get_objects()) < loaded / 10
    assert len(gc.get_objects()) > loaded / 2
    assert gc.get_freeze_count() == 0
