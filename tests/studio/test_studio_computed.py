"""Parts of pages that need torch or transformers: a child process computes them, and no page waits for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import tunewright as library
from making.browser import EXECUTABLE, chromium, signed_in, wait_for
from making.command_line import trained_project, tunewright
from making.hidden_packages import ROOT
from making.studio_client import wait_until
from tunewright.api import Project
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio
from tunewright.studio.computed import Computed, Part, row_tokens

OPEN_EVERY_PAGE = """
import json, sys
from pathlib import Path
from making.studio_client import restarted
from tunewright.studio.pages import HANDLERS

root, place = Path(sys.argv[1]), json.loads(sys.argv[2])
paths = [path.format_map(place) for (method, path), _ in HANDLERS if method == "GET"]
pages = {}
with restarted(root) as browser:
    for path in paths:
        answer = browser.client.get(path)
        assert answer.status_code in (200, 400), (path, answer.status_code)
        if answer.status_code == 200 and "data-computing" in answer.text:
            pages[path] = [answer.text, browser.get_whole(path)]
heavy = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
print(json.dumps({"heavy": heavy, "pages": pages}))
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "project"
    project = trained_project(folder, tiny_base_folder, ("epochs: 2", "epochs: 1"), count=80)
    assert tunewright("evaluate", "--dev", "-p", project).code == 0
    return project


@pytest.fixture
def project(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "project"))


def test_no_page_imports_torch_and_each_shows_its_parts_once_they_are_computed(project: Path) -> None:
    opened = library.open(project)
    row = opened.data.version().members[0].key
    (evaluation,) = (path.parent.name for path in project.glob("evaluations/[!.]*/evidence.json"))
    # A page with a part of its address that is not listed here fails by KeyError: add it.
    absent = ("against", "alias", "curve", "job", "queue", "question", "sweep", "tenant")
    place = {
        **dict.fromkeys(absent, "absent"),
        "ending": "csv",
        "evaluation": evaluation,
        "number": "1",
        "queue": "suspects",
        "row": row,
        "run": opened.adapters.list()[0].name,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    command = [sys.executable, "-c", OPEN_EVERY_PAGE, str(project), json.dumps(place)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["heavy"] == []
    prompts = f"/evidence/{evaluation}/1/prompts"
    shown = {f"/rows/{row}": 'class="trained', prompts: 'class="tokens"', "/train": "Steps", "/evaluate": "<th scope"}
    assert set(shown) <= set(found["pages"])
    for path, text in shown.items():
        first, last = found["pages"][path]
        assert 'role="status">Computing ' in first and "Reload the page" in first
        assert 'role="status">Computing ' not in last and text in last[last.index("<h1>") :], path


def _wait_for(computed: Computed, part: Part) -> None:
    assert not part.done
    computed.wait_for(part)


def _child() -> psutil.Process:
    (found,) = (each for each in psutil.Process().children() if "tunewright.studio.computed" in each.cmdline())
    return found


def test_process_is_started_again_after_it_ended_and_ends_with_the_studio(project: Path) -> None:
    computed = Computed(project)
    member = library.open(project).data.version().members[0]
    try:
        _wait_for(computed, computed.part(row_tokens, [member.key]))
        tokens = computed.part(row_tokens, [member.key])
        text = "".join(token.text for token in tokens.value[0])
        assert tokens.done and member.example.output in text
        assert any(token.trained for row in tokens.value for token in row)
        child = _child()
        # A function that does not know a project ends the process with a traceback.
        _wait_for(computed, computed.part(os.fspath, []))
        refusal = computed.part(os.fspath, []).refusal
        assert refusal == "The process that computes this ended with code 1. Reload the page in a moment."
        assert not child.is_running()

        _wait_for(computed, computed.part(Project.item_prompts, [None, "absent"]))
        refused = computed.part(Project.item_prompts, [None, "absent"])
        assert refused.done and "The evaluation has no item 'absent'" in refused.refusal
        child = _child()
        computed.part(row_tokens, [member.key], deciding=[1])
    finally:
        computed.close()
    assert not child.is_running()
    assert "shutting down" in computed.part(row_tokens, [member.key], deciding=[2]).refusal


def test_process_ends_with_a_killed_studio(project: Path) -> None:
    program = (
        "import sys, os, signal, psutil\nfrom pathlib import Path\nfrom tunewright.studio.computed import Computed\n"
        "computed = Computed(Path(sys.argv[1]))\ncomputed.warm()\n"
        "while not psutil.Process().children(): pass\n"
        "print(psutil.Process().children()[0].pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(project)], stdout=subprocess.PIPE, check=False)
    wait_until(lambda: not psutil.pid_exists(int(ran.stdout)))


@pytest.mark.slow
@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")
def test_part_appears_on_the_open_page(project: Path) -> None:
    studio = Studio(project, "ada")
    row = library.open(project).data.version().members[0].key
    with serving(studio.app()) as url, chromium() as browser:
        page = signed_in(browser, studio.address(url))
        page.goto(f"/rows/{row}")
        page.get_by_text("Reviewer: ada").click()
        page.get_by_label("Your name").fill("ben")
        wait_for(page.locator(".tokens .trained").first).to_be_visible()
        assert page.get_by_label("Your name").input_value() == "ben", "the page was loaded again"
        page.goto("/evaluate")
        wait_for(page.get_by_role("rowheader", name="test")).to_be_visible()
