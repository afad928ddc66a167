"""People who can reach the studio but have no password: what their requests cost, and whom they keep out."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from making.command_line import tiny_project
from making.studio_client import PASSWORD, Browser
from tunewright.studio import access

pytest_plugins = ["studio_fixtures"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    return tiny_project(tmp_path_factory.mktemp("studio-strangers") / "project", tiny_base_folder)


def _sign_in(client: httpx.Client, secret: str, address: str) -> httpx.Response:
    # As a proxy on this machine passes it on.
    return client.post("/sign-in", data={"secret": secret}, headers={"X-Forwarded-For": address})


def test_guesses_at_once_are_refused_after_five_and_the_right_one_too(url: str) -> None:
    async def guess() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            guesses = [client.post("/sign-in", data={"secret": f"guess number {number}"}) for number in range(40)]
            return await asyncio.gather(*guesses)

    answers = asyncio.run(guess())
    assert Counter(each.status_code for each in answers) == {403: access.MAX_WRONG, 429: 40 - access.MAX_WRONG}
    refused = httpx.post(f"{url}/sign-in", data={"secret": PASSWORD})
    assert refused.status_code == 429 and "set-cookie" not in refused.headers
    assert 0 < int(refused.headers["retry-after"]) <= access.WRONG_S
    assert "wrong sign-ins from your address" in refused.text


def test_wrong_sign_ins_of_one_address_do_not_keep_others_out(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        attackers = [_sign_in(client, "a wrong guess", f"2001:db8:0:7::{number:x}") for number in range(7)]
        assert [each.status_code for each in attackers] == [403] * 5 + [429] * 2  # one /64 is one address
        assert _sign_in(client, PASSWORD, "2001:db8:0:7::ffff").status_code == 429
        assert _sign_in(client, "a typo", "198.51.100.4").status_code == 403
        assert _sign_in(client, PASSWORD, "198.51.100.4").status_code == 303


def _begin(url: str, path: str, length: int, sent: bytes, cookie: str = "") -> socket.socket:
    """Send the head of a form and a part of its body."""
    place = urlsplit(url)
    assert place.hostname is not None
    connection = socket.create_connection((place.hostname, place.port or 80), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nCookie: {cookie}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


def test_forms_without_a_session_are_read_eight_at_once(url: str) -> None:
    begun = [_begin(url, "/review", 900_000, b"output=" + b"a" * 1000) for _ in range(12)]
    begun[-1].settimeout(60)
    answered = b""
    while b"Your session has ended" not in answered:  # head and body may come apart
        answered += (piece := begun[-1].recv(1 << 16))
        assert piece, answered
    assert answered.startswith(b"HTTP/1.1 403")
    # Those whose text is still on its way are not answered.
    begun[0].settimeout(0.05)
    with pytest.raises(TimeoutError):
        begun[0].recv(1)
    for connection in begun:
        connection.close()


@pytest.mark.parametrize("path", ["/sign-in", "/review"])
def test_form_that_does_not_arrive_in_time_is_refused(url: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_S", 0.05)
    with _begin(url, path, 2_000, b"secret=a") as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_sign_in_of_over_four_kilobytes_is_refused(url: str) -> None:
    refused = httpx.post(f"{url}/sign-in", data={"secret": "x" * 4_200})
    assert refused.status_code == 400 and "larger than 4,096 bytes" in refused.text


def _upload(browser: Browser, name: str) -> httpx.Response:
    """Upload a file with a name as it stands here: httpx would escape control characters."""
    token = browser.get("/data").partition('name="form_token" value="')[2].partition('"')[0]
    body = (
        f'--x\r\nContent-Disposition: form-data; name="form_token"\r\n\r\n{token}\r\n'
        f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\nprompt,completion\n\r\n--x--\r\n'
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return browser.client.post("/data/upload", content=body.encode(), headers=headers)


@pytest.mark.parametrize(
    "name", [".", "..", "dir/.", "a" * 300 + ".csv", "é" * 101, "a\tb.csv", "a\x1b[1m.csv", "a\u202eb.csv", ".hidden"]
)
def test_upload_with_an_unusable_name_is_refused(browser: Browser, project: Path, name: str) -> None:
    refused = _upload(browser, name)
    assert refused.status_code == 400, refused.text
    assert "name cannot be used" in refused.text
    assert not (project / "uploads").exists()
