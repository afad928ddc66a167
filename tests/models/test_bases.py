"""Finding a base: accepted and refused ones, with their messages."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from making.tiny_bases import build_base
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.models import bases
from tunewright.models.bases import Base, resolve_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _resolve(spec: str, root: Path, revision: str | None = None) -> Base:
    return resolve_base(spec, revision, root, LogReporter())


@pytest.fixture
def base(tmp_path: Path, tiny_base_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def _edit_config(base: Path, **values: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_resolve_base_finds_a_folder_and_digests_its_content(base: Path, tmp_path: Path) -> None:
    here = _resolve("base", tmp_path)
    copied = shutil.copytree(base, tmp_path / "elsewhere" / "copy")
    assert here.architecture == "LlamaForCausalLM"
    assert _resolve(str(copied), tmp_path).digest == here.digest
    _edit_config(base, rope_theta=1.0)
    assert _resolve("base", tmp_path).digest != here.digest


def test_resolve_base_accepts_a_mistral(tmp_path: Path) -> None:
    build_base(tmp_path / "mistral", "mistral")
    assert _resolve("mistral", tmp_path).architecture == "MistralForCausalLM"


def _cut_weights(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _index_of_two(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        (lambda base: _edit_config(base, architectures=["BertForMaskedLM"]), "config.json", "BertForMaskedLM"),
        (lambda base: _edit_config(base, architectures=[]), "config.json", "unknown"),
        (lambda base: _edit_config(base, auto_map={"AutoModel": "evil.Model"}), "config.json", "auto_map"),
        (lambda base: _edit_config(base, quantization_config={"quant_method": "gptq"}), "config.json", "gptq"),
        (lambda base: (base / "config.json").write_bytes(b"{"), "config.json", ""),
        (lambda base: (base / "config.json").write_bytes(b"[]"), "config.json", "list"),
        (lambda base: (base / "config.json").write_bytes(b"\xff\xfe"), "config.json", ""),
        (lambda base: (base / "model.safetensors").unlink(), "", r"model\.safetensors"),
        (lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"), "", "can run code"),
        (_index_of_two, "", r"model-2\.safetensors"),
        (_cut_weights, "model.safetensors", ""),
        (lambda base: (base / "tokenizer.json").unlink(), "", r"tokenizer\.json"),
    ],
)
def test_resolve_base_refuses_unusable_bases(
    base: Path, tmp_path: Path, change: Callable[[Path], object], where: str, words: str
) -> None:
    change(base)
    with pytest.raises(UserError, match=words) as caught:
        _resolve("base", tmp_path)
    assert caught.value.where == str(base / where)


@pytest.mark.parametrize("spec", ["./nowhere", "just-a-word", "bundled:other", "package:other", "s3:a/b"])
def test_resolve_base_refuses_an_unknown_name(tmp_path: Path, spec: str) -> None:
    with pytest.raises(UserError) as caught:
        _resolve(spec, tmp_path)
    assert caught.value.where == "base_model"
    assert caught.value.fix


@pytest.mark.usefixtures("base")
def test_revision_is_refused_for_bases_not_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Only a hub id has a revision"):
        _resolve("base", tmp_path, revision="main")


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as its client needs: model information, the tree, and files with their digests."""

    folder: Path
    gated = False

    def do_GET(self) -> None:
        self._reply(body=True)

    def do_HEAD(self) -> None:
        self._reply(body=False)

    def _reply(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        names = sorted(str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file())
        if "/gated/" in path:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if path.startswith("/api/models/org/tiny"):
            if "nowhere" in path:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            if "/tree/" in path:
                tree = [{"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": n} for n in names]
                return self._send(200, json.dumps(tree).encode(), {}, body)
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return self._send(200, json.dumps(info).encode(), {}, body)
        if path.startswith("/org/tiny/resolve/"):
            content = (self.folder / path.split("/", 5)[5]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub on the loopback address that holds one model, org/tiny."""
    handler = type("Handler", (_Hub,), {"folder": tiny_base_folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "hub-cache")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_base_is_pinned_to_its_commit_and_then_needs_no_hub(
    hub: ThreadingHTTPServer, tmp_path: Path, tiny_base_folder: Path
) -> None:
    assert bases.local_base("org/tiny", None, tmp_path, LogReporter()) is None
    first = _resolve("org/tiny", tmp_path)
    assert first.commit == COMMIT
    assert first.files == _resolve(str(tiny_base_folder), tmp_path).files
    hub.shutdown()
    hub.server_close()
    for project in (tmp_path, tmp_path / "new"):
        project.mkdir(exist_ok=True)
        assert _resolve("org/tiny", project) == first
        assert json.loads((project / "base.lock.json").read_text()) == {"org/tiny@main": COMMIT}
    found = bases.local_base("org/tiny", None, tmp_path, LogReporter())
    assert found is not None and found.folder == first.folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["NextYearForCausalLM"]}, "has no NextYearForCausalLM"),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantized .fp8."),
    ],
)
def test_refused_hub_base_downloads_no_weights(
    hub: ThreadingHTTPServer, base: Path, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    _edit_config(base, **values)
    hub.RequestHandlerClass.folder = base  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=words):
        _resolve("org/tiny", tmp_path)
    assert [path.name for path in (tmp_path / "hub-cache").rglob("*.*") if path.suffix == ".safetensors"] == []


def test_duplicate_weights_of_a_hub_base_are_downloaded_once(
    hub: ThreadingHTTPServer, base: Path, tmp_path: Path
) -> None:
    before = _resolve(str(base), tmp_path).digest
    shutil.copyfile(base / "model.safetensors", base / "consolidated.safetensors")
    (base / "original").mkdir()
    shutil.copyfile(base / "model.safetensors", base / "original" / "model.safetensors")
    assert _resolve(str(base), tmp_path).digest == before
    hub.RequestHandlerClass.folder = base  # type: ignore[attr-defined]
    fetched = _resolve("org/tiny", tmp_path)
    assert fetched.digest == before
    assert sorted(path.name for path in fetched.folder.rglob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("spec", "revision", "words"),
    [
        ("gated/model", None, "gated/model is gated"),
        ("org/other", None, "has no model org/other"),
        ("org/tiny", "nowhere", "has no revision 'nowhere'"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_hub_refusals_are_reported(tmp_path: Path, spec: str, revision: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _resolve(spec, tmp_path, revision)
    assert not (tmp_path / "base.lock.json").exists()


def test_unreachable_hub_is_reported(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{hub.server_port}"
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match=f"org/tiny is not .* and the hub .{url}. is unreachable: ConnectError"):
        _resolve("org/tiny", tmp_path)


def _use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.mark.slow
def test_hub_that_never_responds_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        _use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "hub-cache")
        with pytest.raises(UserError, match=r"no response within 3 s|ReadTimeout") as caught:
            _resolve("org/tiny", tmp_path)
    assert "use its folder as base_model" in str(caught.value.fix)


def test_unresolved_hub_name_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_hub(monkeypatch, "http://hub.invalid", tmp_path / "hub-cache")
    with pytest.raises(UserError, match=r"http://hub\.invalid"):
        _resolve("org/tiny", tmp_path)
