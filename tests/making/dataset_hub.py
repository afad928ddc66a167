"""A Hugging Face hub on this machine, with datasets: the routes that the hub's client and `datasets` ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5" * 40


@dataclass
class DatasetHub:
    """Datasets by id, each with its files at one commit, and the requests so far."""

    datasets: dict[str, dict[str, bytes]]
    url: str = ""
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub

    def do_GET(self) -> None:
        self._reply(unquote(urlsplit(self.path).path))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._reply(unquote(urlsplit(self.path).path), body)

    def _reply(self, path: str, body: dict[str, Any] | None = None) -> None:
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.removeprefix("/api").strip("/").split("/")
        files = self.hub.datasets.get("/".join(parts[1:3])) if parts[0] == "datasets" else None
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        verb, revision, rest = (*parts[3:5], "", "")[0], (*parts[4:5], "main")[0], "/".join(parts[5:])
        if revision not in ("main", "v1", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if verb == "resolve":
            if rest not in files:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            tag = hashlib.sha1(files[rest]).hexdigest()
            return self._send(200, files[rest], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        if verb == "tree":
            recursive = "true" in parse_qs(urlsplit(self.path).query.lower()).get("recursive", [])
            return self._json(_tree(files, f"{rest}/" if rest else "", recursive=recursive))
        if verb == "paths-info":
            assert body is not None
            there: list[Any] = []
            for name in body["paths"]:
                if name in files:
                    there.append(_entry(name, files[name]))
                elif any(file.startswith(f"{name}/") for file in files):
                    there.append(_folder(name))
            return self._json(there)
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings})

    def _json(self, value: Any) -> None:
        if value is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        pass


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


def _folder(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}


def _tree(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    below = [name for name in files if name.startswith(folder)]
    inside = {folder + name.removeprefix(folder).split("/")[0] for name in below if "/" in name.removeprefix(folder)}
    shown = [name for name in below if recursive or "/" not in name.removeprefix(folder)]
    return [*map(_folder, sorted(inside)), *(_entry(name, files[name]) for name in shown)] if below else None


@contextmanager
def serve(datasets: dict[str, dict[str, bytes]]) -> Iterator[DatasetHub]:
    """Serve the datasets until the block ends."""
    hub = DatasetHub(datasets)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
