"""A studio process that is killed in the middle of a review: nothing is lost but the keystroke."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import httpx
import psutil
import pytest

import tunewright as library
from making.command_line import pairs, tunewright, write_jsonl
from making.studio_client import PASSWORD, Browser, opened, wait_until
from tunewright.data.review.reviews import read_reviews


@contextmanager
def _process(project: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A real ``tunewright studio``, and its address."""
    password = project.parent / "password"
    password.write_text(PASSWORD)
    command = [sys.executable, "-m", "tunewright", "studio", "--project", str(project), "--reviewer", "ada"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--password-file", str(password), "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = None
        said = ""
        while found is None:
            line = process.stdout.readline()
            assert line, said
            said += line
            found = re.search(r"(http://\S+)/sign-in", line)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _row(browser: Browser) -> str | None:
    found = re.search('name="key" value="([0-9a-f]+)"', browser.get("/review"))
    return None if found is None else found[1]


@pytest.mark.slow
def test_killed_studio_loses_only_the_keystroke_and_the_review_is_finished_after_it(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "tunewright.yaml").write_text("name: crash\n")
    write_jsonl(project / "pairs.jsonl", pairs(40))
    assert tunewright("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    said: dict[str, str] = {}
    with _process(project) as (process, url), opened(url) as browser:
        for action in ("right", "edit", "right", "undo", "right", "skip", "undo", "right", "right"):
            key = _row(browser)
            assert key is not None
            browser.judge(
                action, **({"output": "a better answer", "new_label": "a better answer"} if action == "edit" else {})
            )
            if action == "undo":
                said.popitem()
            else:
                said[key] = action
        browser.judge("note", note="looks odd")
        noted = pressed_on = _row(browser)
        assert noted is not None and pressed_on is not None

        def press() -> None:
            with suppress(httpx.HTTPError):
                browser.judge("right")

        pressing = Thread(target=press)
        pressing.start()
        process.send_signal(signal.SIGKILL)
        pressing.join()
        process.wait()
    found = read_reviews(project / "dataset")
    kept = {key: names["ada"].verdict for key in found.stacks if (names := found.current_verdicts(key))}
    assert kept == said or kept == said | {pressed_on: "right"}
    assert found.notes[noted] == {"ada": "looks odd"}
    with _process(project) as (_, url), opened(url) as browser:
        resumed = _row(browser)
        assert resumed == pressed_on or pressed_on in kept
        while _row(browser) is not None:
            browser.judge("right")
        assert "Version accepted" in browser.get("/review") or "Version rejected" in browser.get("/review")
    status = library.open(project).data.review_status()
    assert status.outcome is not None and status.outcome.decision in ("accepted", "rejected")
    after = read_reviews(project / "dataset")
    assert {key: after.current_verdicts(key)["ada"].verdict for key in said} == said


def _reads_torch(process: psutil.Process) -> bool:
    return any("libtorch" in part.path for part in process.memory_maps())


@pytest.mark.slow
def test_torch_is_read_by_a_child_after_the_first_page_can_be_asked_for(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "tunewright.yaml").write_text("name: warm\n")
    with _process(project) as (process, url), opened(url) as browser:
        studio = psutil.Process(process.pid)
        wait_until(lambda: any(_reads_torch(child) for child in studio.children()))
        assert "No rows yet" in browser.get("/")
        assert not _reads_torch(studio)
