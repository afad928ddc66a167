"""A package index on loopback (PEP 503): ranges, cuts, a password, and the requests that it got."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tunewright.core.packages import Package

MEMBER = "tiny_data/rows.bin"
CONTENT = bytes(range(256)) * 4096


def build_wheel(content: bytes = CONTENT) -> bytes:
    """Return a wheel with one file, uncompressed so that it has about the file's size."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in ((MEMBER, content), ("tiny_data-1.0.dist-info/METADATA", b"Name: tiny-data\nVersion: 1.0\n")):
            archive.writestr(zipfile.ZipInfo(name), data)
    return packed.getvalue()


WHEEL = build_wheel()
TINY = Package("tiny-data", "1.0", hashlib.sha256(WHEEL).hexdigest(), len(WHEEL), "rows by nobody (1 MB, MIT)")


@dataclass
class Index:
    """The server's settings, which tests change, and what it was asked."""

    address: str = ""
    """HOST:PORT"""
    wheel: bytes = WHEEL
    names: list[str] = field(default_factory=lambda: ["tiny_data-0.9-py3-none-any.whl", TINY.wheel])
    """The files that its page lists."""
    files_at: str | None = None
    """Another server that links lead to, as ``http://HOST:PORT``; None: relative links."""
    password: str | None = None
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    """For each of the next downloads, the bytes after which the connection is cut."""
    failing: bool = False
    """Answer downloads with HTTP status 503."""
    hold: threading.Event | None = None
    """What a download waits for after its first half."""
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """Path, range and authorization of each request."""

    @property
    def url(self) -> str:
        return f"http://{self.address}/simple"

    @property
    def downloads(self) -> list[str | None]:
        """The range of each download."""
        return [wanted for path, wanted, _ in self.requests if path.endswith(".whl")]


@contextmanager
def wheel_index() -> Iterator[Index]:
    """Run an index with the package ``tiny-data`` until the end of the block."""
    index = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.requests.append((self.path, self.headers["Range"], self.headers["Authorization"]))
            if index.password and self.headers["Authorization"] != _basic(index.password):
                self._send(401, b"")
            elif self.path == "/simple/tiny-data/":
                self._send(200, *_page(index))
            elif self.path == f"/files/{TINY.wheel}":
                self._send_file()
            else:
                self._send(404, b"")

        def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send_file(self) -> None:
            if index.failing:
                self._send(503, b"")
                return
            wanted = self.headers["Range"]
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and index.ranges else 0
            body = index.wheel[start:]
            if not body:
                self._send(416, b"")
                return
            cut = index.cuts.pop(0) if index.cuts else len(body)
            self.send_response(206 if wanted and index.ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # the client has had enough, or is interrupted
                self.wfile.write(body[: cut // 2])
                if index.hold:
                    assert index.hold.wait(60)
                self.wfile.write(body[cut // 2 : cut])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index.address = f"127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield index
        server.shutdown()


def hide_installed(package: Package, folder: Path) -> Path:
    """Return a folder that, first on the path, lets another version of the package seem installed."""
    about = folder / f"{package.name.replace('-', '_')}-0.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Name: {package.name}\nVersion: 0.0\n", encoding="utf-8")
    return folder


def _page(index: Index) -> tuple[bytes, str]:
    place = "../.." if index.files_at is None else index.files_at
    links = [(name, f"{place}/files/{name}#sha256=0") for name in index.names]
    anchors = [f"<A data-requires-python=\"&gt;=3.8\" HREF='{url}'>{name}</A><br>" for name, url in links]
    return f"<!DOCTYPE html><html><body>{''.join(anchors)}</body></html>".encode(), "text/html; charset=utf-8"


def _basic(password: str) -> str:
    return f"Basic {base64.b64encode(password.encode()).decode()}"
