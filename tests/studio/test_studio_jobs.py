"""A job's page while it runs: one bar, the newest message, the log as text; and the replicas of a server."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from making.studio_client import Browser
from tunewright.cli.live import json_line
from tunewright.serving.gateway.metrics import Metrics, ServerState, exposed
from tunewright.studio.jobs import read_entry

pytest_plugins = ["studio_fixtures"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tunewright.yaml").write_text("name: tiny\n")
    return tmp_path


@contextmanager
def _running(project: Path, command: str, log: str) -> Iterator[Path]:
    """A job's folder whose process, a shell, runs until the block ends."""
    folder = project / ".tunewright" / "jobs" / f"{7:016x}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"command": [command], "started": "2026-01-01T00:00:00+00:00"}))
    (folder / "log").write_text(log)
    with subprocess.Popen(["/bin/sh", "-c", "read line", str(folder)], stdin=subprocess.PIPE) as shell:
        (folder / "pid").write_text(str(shell.pid))
        yield folder
        shell.terminate()


def test_running_job_shows_one_bar_its_newest_message_and_a_folded_log(browser: Browser, project: Path) -> None:
    lines = [
        json_line("info", "Loading the base\nfrom a folder", at=0),
        json_line("info", "Training <b>: 42/66 steps, 3 min left", at=1, task="Training <b>", done=42, total=66),
        json_line("info", "Training <b>: 45/66 steps, 2 min left", at=2, task="Training <b>", done=45, total=66),
        "Result of the command",
    ]
    with _running(project, "train", "".join(f"{line}\n" for line in lines)) as folder:
        page = browser.get(f"/jobs/{folder.name}")
        assert 'value="45" max="66"' in page and "Training &lt;b&gt;: 45/66 steps, 2 min left" in page
        assert '<span id="said">Loading the base</span>' in page and "<details>\n  <summary>Log" in page
        assert "Ray cluster" not in page
        assert 'id="live"><a href="/jobs/' in browser.get("/train"), "the part that its script reads again"
        config = project / "tunewright.yaml"
        config.write_text(config.read_text() + "compute:\n  cluster: auto\n")
        assert "The machines of the Ray cluster share the work" in browser.get(f"/jobs/{folder.name}")
    assert "is running" not in browser.get("/train")
    with browser.client.stream("GET", f"/jobs/{folder.name}/events") as events:
        sent = list(events.iter_lines())
    assert [line for line in sent if line.startswith("data: ") and "{" not in line] == [
        "data: Loading the base",
        "data: from a folder",
        "data: Loading the base",
        "data: Training <b>: 42/66 steps, 3 min left",
        "data: Training <b>: 45/66 steps, 2 min left",
        "data: Result of the command",
        "data: ended",
    ]
    progress = [json.loads(sent[n + 1][6:]) for n, line in enumerate(sent) if line == "event: progress"]
    assert progress[-1] == {"done": 45, "total": 66, "text": "Training <b>: 45/66 steps, 2 min left"}
    ended = browser.get(f"/jobs/{folder.name}")
    assert "<details open>\n  <summary>Log" in ended and "<progress" not in ended


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("plain, of an earlier release", ["plain, of an earlier release"]),
        ("{not JSON", ["{not JSON"]),
        ('{"adapters": []}', ['{"adapters": []}']),
        (json_line("warning", "few rows", at=0), ["Warning: few rows"]),
        (json_line("warning", "old", at=0, logger="peft"), ["Warning of peft: old"]),
        (
            json_line("error", "No base", at=0, where="base_model", fix="Name one."),
            ["Error: base_model: No base", "Name one."],
        ),
        (
            json_line("critical", "KeyError: 'a'", at=0, exception="Traceback\nKeyError"),
            ["KeyError: 'a'", "Traceback", "KeyError"],
        ),
        (json_line("info", "a\x1b[31m", at=0), ["a\\u001b[31m"]),
    ],
)
def test_line_of_a_jobs_log_is_shown_as_text(line: str, expected: list[str]) -> None:
    assert read_entry(line).lines == expected


def test_engines_of_a_running_server_are_shown(browser: Browser, project: Path) -> None:
    of: Any = SimpleNamespace
    states = [
        of(url="http://gpu-1:8100", up=True, running=3, adapters=range(20), restarts=0),
        of(url="http://gpu-2:8100", up=False, running=0, adapters=range(4), restarts=2),
    ]
    now = ServerState(ready=True, waiting=(), running=(), released=(), resident=(), engines=states)
    with exposed(Metrics(lambda: now), "127.0.0.1", 0) as address:
        log = f"Serving at http://127.0.0.1:1/v1\n  courts\nPrometheus metrics: {address}\nCtrl-C stops the server.\n"
        with _running(project, "serve", log) as folder:
            page = re.sub(r">\s+<", "><", browser.get("/deploy"))
            first = '<th scope="row">http://gpu-1:8100</th><td class="words">up</td><td>3</td><td>20</td><td>0</td>'
            second = '<th scope="row">http://gpu-2:8100</th><td class="words">takes no requests</td>'
            assert first in page and second in page
            assert 'value="http://127.0.0.1:1/v1"' in page and 'value="courts"' in page
            now = ServerState(ready=True, waiting=(), running=(), released=(), resident=())
            assert "Engines" not in browser.get("/deploy"), "one engine"
            (folder / "log").write_text(log.replace(address, "http://127.0.0.1:1/metrics"))
            assert "the state of its engines is unknown" in browser.get("/deploy")
