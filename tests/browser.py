"""A headless Chromium, driven over its debugging pipe (Chrome DevTools Protocol): no driver to install."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
EXECUTABLE = next((found for name in NAMES if (found := shutil.which(name))), None)
AXE = Path(__file__).parents[1] / "build/clients/node/node_modules/axe-core/axe.min.js"
"""From `make test-clients`."""

# Contrast of each element that has text of its own with what is behind it, by WCAG 2.2's formula.
CONTRASTS = """(() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const rgb = numbers(getComputedStyle(at).backgroundColor);
      if (rgb.length < 4 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("main *")) {
    if (![...node.childNodes].some(c => c.nodeType === 3 && c.data.trim()) || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const colour = node.closest("svg") ? style.fill : style.color;
    const a = light(numbers(colour)), b = light(behind(node));
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.tagName + " " + node.textContent.slice(0, 30)]);
  }
  return found;
})()"""


class Page:
    """A tab; ``said`` collects what it logs and every exception."""

    def __init__(self, out: int, back: int) -> None:
        self._out, self._back = out, back
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.said: list[str] = []
        self.happened: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reported = self._next()
            if reported.get("id") == self._number:
                assert "error" not in reported, reported
                result: dict[str, Any] = reported["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._back, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        reported: dict[str, Any] = json.loads(message)
        if reported.get("method") in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}:
            self.said.append(json.dumps(reported["params"]))
        self.happened.append(reported.get("method", ""))
        return reported

    def open(self, place: Path | str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file or an address in a window of this size, in CSS pixels, and wait until it has loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.happened.clear()
        self.send("Page.navigate", url=place.as_uri() if isinstance(place, Path) else place)
        self.loaded()

    def loaded(self) -> None:
        """Wait until a page has loaded; clear `happened` before what leads to it."""
        while "Page.loadEventFired" not in self.happened:
            self._next()

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page; a promise's once it is there."""
        reported = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reported, reported
        return reported["result"].get("value")

    def accessibility_faults(self) -> list[str]:
        """Return the faults that axe-core finds: its rules for WCAG 2.2 AA and its best practices."""
        self.value(AXE.read_text(encoding="utf-8") + ";0")
        found: list[str] = self.value(
            "axe.run().then(result => result.violations.map("
            "each => each.id + ': ' + each.nodes.map(node => node.html).join(' | ').slice(0, 400)))"
        )
        return found

    def sign_in(self, url: str, password: str) -> None:
        """Sign in to a studio."""
        self.open(url, width=360)
        self.value(f"document.getElementById('secret').value = {json.dumps(password)}")
        self.happened.clear()
        self.value("document.getElementById('sign-in').submit()")
        self.loaded()

    def press_tab(self) -> None:
        """The Tab key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def press(self, key: str, *, control: bool = False) -> None:
        """A key, down and up; a character is typed."""
        text = {"text": key} if len(key) == 1 else {"windowsVirtualKeyCode": 13} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=2 if control else 0, **text)

    def picture(self, file: Path, *, top: float = 0, height: float | None = None) -> None:
        """A PNG of the page from ``top`` on (None: down to its end)."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"] - top, "scale": 1}
        data = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


# The pipe has to be descriptors 3 and 4 of the browser.
_WIRED = (
    "import os, sys; down, up, *command = sys.argv[1:]\n"
    "os.dup2(int(down), 3); os.dup2(int(up), 4); os.execv(command[0], command)"
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)


@contextmanager
def chromium() -> Iterator[Page]:
    """A fresh browser with one tab, gone afterwards."""
    assert EXECUTABLE is not None
    (down, out), (back, up) = _pipe(), _pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [sys.executable, "-c", _WIRED, str(down), str(up), EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(down, up),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down)
        os.close(up)
        try:
            yield Page(out, back)
        finally:
            os.close(out)
            os.close(back)
            browser.terminate()
            browser.wait(20)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are neither descriptor 3 nor 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
