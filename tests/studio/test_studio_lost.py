"""Uploads that are too large or break off, and forms that come too late: nothing is half-done, and no text is lost."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import tunewright as library
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.studio_client import PASSWORD, Browser
from tunewright.data.versions import locked
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

pytest_plugins = ["studio_fixtures"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("studio-lost") / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def url(project: Path) -> Iterator[str]:
    with serving(Studio(project, "ada", password=PASSWORD).app()) as url:
        yield url


def _head(browser: Browser, length: int) -> bytes:
    """The head of an upload whose body has this length."""
    cookies = "; ".join(f"{name}={value}" for name, value in browser.client.cookies.items())
    place = urlsplit(str(browser.client.base_url))
    return (
        f"POST /data/upload HTTP/1.1\r\nHost: {place.netloc}\r\nCookie: {cookies}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def _body(browser: Browser) -> bytes:
    token = browser.get("/data").partition('name="form_token" value="')[2].partition('"')[0]
    return (
        f'--x\r\nContent-Disposition: form-data; name="form_token"\r\n\r\n{token}\r\n'
        '--x\r\nContent-Disposition: form-data; name="file"; filename="half.jsonl"\r\n\r\n{"prompt": "a'
    ).encode()


def _connection(browser: Browser) -> socket.socket:
    place = urlsplit(str(browser.client.base_url))
    assert place.hostname is not None
    return socket.create_connection((place.hostname, place.port or 80), timeout=60)


def test_upload_of_two_gigabytes_is_refused_before_it_is_sent(browser: Browser, project: Path) -> None:
    with _connection(browser) as connection:
        connection.sendall(_head(browser, 2_000_000_000))
        answer = b""
        while b"</html>" not in answer:
            piece = connection.recv(1 << 16)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400") and b"The file is larger than 200,000,000 bytes" in answer
    assert not (project / "uploads").exists()


def test_lost_connection_leaves_nothing_of_an_upload(
    browser: Browser, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        with _connection(browser) as connection:
            connection.sendall(_head(browser, 10_000_000) + _body(browser))
        assert "half.jsonl" not in browser.get("/data")
    assert not (project / "uploads").exists()
    assert caplog.records == []


def test_text_sent_after_the_session_ended_is_shown_and_not_recorded(browser: Browser, url: str, project: Path) -> None:
    browser.get("/review")
    log = (project / "dataset" / "reviews.jsonl").read_text()
    sent = {"form_token": "of an earlier start", "key": "k", "action": "edit", "output": "a long <b>answer</b>"}
    late = httpx.post(f"{url}/review", data=sent, headers={"Cookie": "tunewright_studio_0=old"})
    assert late.status_code == 403 and "set-cookie" not in late.headers
    assert "Your session has ended" in late.text and "Nothing was recorded" in late.text
    assert "a long &lt;b&gt;answer&lt;/b&gt;" in late.text and "of an earlier start" not in late.text
    assert (project / "dataset" / "reviews.jsonl").read_text() == log
    upload = httpx.post(f"{url}/data/upload", files={"file": ("late.csv", b"a;b\n")})
    assert upload.status_code == 403 and not (project / "uploads").exists()


def test_file_is_kept_when_another_command_is_writing_the_dataset(browser: Browser, project: Path) -> None:
    rows = "".join(
        f'{{"prompt": "{row["prompt"]}", "completion": "{row["completion"]}"}}\n' for row in pairs(5, seed=3)
    )
    browser.upload("five.jsonl", rows.encode())
    before = library.open(project).data.version().digest
    with locked(project / "dataset"):
        refused = browser.send("/data/add", "/data/check?file=five.jsonl", message="five more")
        assert refused.status_code == 400 and "Another command is changing this dataset" in refused.text
        assert '<input id="message" name="message" value="five more">' in refused.text
    assert library.open(project).data.version().digest == before
    assert (project / "uploads" / "five.jsonl").read_text() == rows
    assert "is new" in browser.send("/data/add", "/data/check?file=five.jsonl").text


def test_rows_that_a_terminal_adds_are_on_the_next_page(browser: Browser, project: Path) -> None:
    write_jsonl(project / "new.jsonl", [{"prompt": "added in a terminal", "completion": "indeed"}])
    assert "0 rows, page" in browser.get("/rows?q=terminal")
    assert tunewright("data", "add", project / "new.jsonl", "-p", project).code == 0
    assert "1 rows, page" in browser.get("/rows?q=terminal")


def test_two_tabs_add_the_same_file_once(browser: Browser, project: Path) -> None:
    browser.upload("tabs.jsonl", b'{"prompt": "two tabs", "completion": "one row"}\n')
    path = "/data/check?file=tabs.jsonl"
    version = library.open(project).data.version().digest
    browser.send("/data/add", path)
    second = browser.send("/data/add", path, version=version)
    assert "Nothing was added" in second.text and "<dd>1</dd><dt>known before</dt>" in second.text
    assert len(library.open(project).data.log()) == len({each.digest for each in library.open(project).data.log()})
