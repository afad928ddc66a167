"""A browser without JavaScript on a running studio."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path

import httpx

from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

PASSWORD = "a long password"


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true; the limit only ends a hang."""
    until = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def row_key(html: str) -> str:
    """Return the key of the row that a page of the review shows."""
    (key,) = set(re.findall('name="key" value="([0-9a-f]+)"', html))
    return str(key)


class Browser:
    """A signed-in browser without JavaScript."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        signed_in = client.post("/sign-in", data={"secret": PASSWORD})
        assert signed_in.status_code == 200 and signed_in.url.path in ("/", "/new")

    def get(self, path: str) -> str:
        """Return a page's HTML."""
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def get_whole(self, path: str) -> str:
        """Return a page's HTML, once all of its parts are computed."""
        while computing := re.search('data-computing="([^"]*)"', html := self.get(path)):
            self.client.get(computing[1])
        return html

    def send(self, path: str, page: str, **fields: str) -> httpx.Response:
        """Send a form with the hidden fields of the page that it stands on."""
        html = self.get(page)
        hidden = re.findall('<input type="hidden" name="([^"]*)" value="([^"]*)"', html)
        kept = {
            name: unescape(value) for name, value in hidden if name in ("form_token", "key", "file", "version", "back")
        }
        return self.client.post(path, data=kept | fields)

    def upload(self, name: str, content: bytes) -> httpx.Response:
        """Send a file from the page Data."""
        token = re.search('name="form_token" value="([^"]*)"', self.get("/data"))
        assert token is not None
        return self.client.post("/data/upload", data={"form_token": token[1]}, files={"file": (name, content)})

    def judge(self, action: str, page: str = "/review", **fields: str) -> str:
        """Press a button of a page of the review; a refusal stands on the row's page."""
        answer = self.send(page, page, action=action, **fields)
        assert answer.status_code == (400 if 'role="alert"' in answer.text else 200), answer.text
        return answer.text


@contextmanager
def opened(url: str) -> Iterator[Browser]:
    """A browser on a running studio."""
    with httpx.Client(base_url=url, follow_redirects=True, timeout=300) as client:
        yield Browser(client)


@contextmanager
def restarted(project: Path) -> Iterator[Browser]:
    """A browser on a studio that is started for it."""
    with serving(Studio(project, "ada", password=PASSWORD).app()) as url, opened(url) as browser:
        yield browser
