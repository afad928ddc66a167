"""Files of a web server: no redirect of it is followed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tunewright.core.errors import UserError
from tunewright.core.remote_files import RemoteFiles


class _Redirecting(BaseHTTPRequestHandler):
    hits: list[str]

    def do_GET(self) -> None:
        self.hits.append(self.path)
        if self.path.startswith("/moved/"):
            self.send_response(307)
            self.send_header("Location", "/inside?token=secret")
        else:
            self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"{}")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    _Redirecting.hits = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _opened(files: RemoteFiles) -> bytes:
    with files.opened("manifest.json") as file:
        return file.read(100)


@pytest.mark.parametrize(
    "read", [_opened, lambda files: files.has("manifest.json"), lambda files: files.read_if_there("manifest.json")]
)
def test_redirect_is_refused_and_named(server: str, read: Callable[[RemoteFiles], object]) -> None:
    assert read(RemoteFiles(f"{server}/here")) in (b"{}", True)
    with pytest.raises(UserError) as caught:
        read(RemoteFiles(f"{server}/moved"))
    assert (caught.value.what, caught.value.where) == (
        "The server redirects to '/inside'",
        f"{server}/moved/manifest.json",
    )
    assert not [path for path in _Redirecting.hits if path.startswith("/inside")]
