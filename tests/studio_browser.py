"""A browser without JavaScript on a studio."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape

import httpx

PASSWORD = "a long password"


class Browser:
    """A signed-in browser without JavaScript."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        signed_in = client.post("/sign-in", data={"secret": PASSWORD})
        assert (signed_in.status_code, signed_in.url.path) == (200, "/")

    def get(self, path: str) -> str:
        """Return a page's HTML."""
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def send(self, path: str, page: str, **fields: str) -> httpx.Response:
        """Send a form with the hidden fields of the page that it stands on."""
        html = self.get(page)
        hidden = re.findall('<input type="hidden" name="([^"]*)" value="([^"]*)"', html)
        kept = {name: unescape(value) for name, value in hidden if name in ("form_token", "key", "file")}
        return self.client.post(path, data=kept | fields)

    def judge(self, action: str, page: str = "/review", **fields: str) -> str:
        """Press a button of a page of the review."""
        answer = self.send(page, page, action=action, **fields)
        assert answer.status_code == 200, answer.text
        return answer.text


@contextmanager
def opened(url: str) -> Iterator[Browser]:
    """A browser on a running studio."""
    with httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client:
        yield Browser(client)
