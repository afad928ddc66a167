"""The studio's demo: everybody may look, and nobody can change anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import tunewright as library
from making.command_line import pairs, tunewright, write_jsonl
from making.human_evaluations import evaluation
from tunewright.core.errors import UserError
from tunewright.demo import DEMO_FOLDER, copied_demo, find_demo
from tunewright.examples import config_text
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio
from tunewright.studio.pages import HANDLERS

EVALUATION = f"{7:012x}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `tunewright demo` has run, with rows of its own and no adapter."""
    folder = tmp_path_factory.mktemp("demo") / DEMO_FOLDER
    folder.mkdir()
    (folder / "tunewright.yaml").write_text(config_text(quick=True))
    write_jsonl(folder / "pairs.jsonl", pairs(120))
    library.open(folder).data.add([folder / "pairs.jsonl"])
    evaluation(folder / "evaluations" / EVALUATION, count=12)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def client(finished: Path) -> Iterator[httpx.Client]:
    with (
        copied_demo(finished.parent) as copy,
        serving(Studio(copy, "visitor", demo=True).app()) as url,
        httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client,
    ):
        yield client


def test_visitor_reads_every_page_without_sign_in_and_changes_no_file(client: httpx.Client, finished: Path) -> None:
    before = _contents(finished)
    # Every page that needs neither a name nor a file, also those that do not exist yet.
    paths = [path for (method, path), _ in HANDLERS if method == "GET" and "{" not in path]
    named = {f"/compare/{EVALUATION}", "/rows/change?split=test&change=leave-out"}
    for path in {*paths, *named} - {"/new", "/data/check", "/data/diff", "/rows/change", "/train/compare"}:
        page = client.get(path)
        assert page.status_code == 200 and "A read-only demo" in page.text, path
        forms = re.findall('<form method="post".*?</form>', page.text, re.DOTALL)
        buttons = [button for form in forms for button in re.findall("<button[^>]*>", form)]
        assert buttons and all(" disabled" in button for button in buttons), path
    assert client.get(f"/report/{EVALUATION}").status_code == 200
    assert client.get("/sign-in").url.path == "/"
    assert ">Show</button>" in client.get("/rows").text, "a search changes nothing"
    # The review's sample was drawn in the copy.
    assert _contents(finished) == before


@pytest.mark.parametrize(
    "path",
    [
        "/review",
        "/jobs",
        "/data/add",
        "/data/upload",
        "/reviewer",
        "/sign-in",
        "/review/find-suspects",
        "/deploy",
        "/playground",
        "/new",
        "/x",
    ],
)
def test_every_request_that_could_change_something_is_refused(client: httpx.Client, path: str) -> None:
    refused = client.post(path, data={"action": "right", "secret": "None"})
    assert refused.status_code == 403 and "This demo is read-only; nothing was changed" in refused.text
    assert "set-cookie" not in refused.headers
    assert client.request("DELETE", path).status_code == 403


def test_demo_needs_the_finished_demo_project(finished: Path, tmp_path: Path) -> None:
    assert find_demo(finished.parent) == find_demo(finished) == finished
    refused = tunewright("studio", "--demo", "-p", tmp_path, "--no-browser")
    assert refused.code == 2 and "tunewright demo" in refused.stderr
    (tmp_path / "tunewright.yaml").write_text("name: legal-citations\n")
    evaluation(tmp_path / "evaluations" / EVALUATION, count=12)
    with pytest.raises(UserError, match="no finished demo project"):
        find_demo(tmp_path)  # somebody's own project of that name is not shown to everybody
    refused = tunewright("studio", "--demo", "-p", finished, "--reviewer", "ann")
    assert refused.code == 2 and "mutually exclusive" in refused.stderr
