"""The page that starts an evaluation: its answers before anything is pressed."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

import tunewright as library
from making.command_line import trained_project, tunewright
from making.studio_client import Browser, restarted, wait_until
from tunewright.studio.jobs import Jobs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "project"
    return trained_project(folder, tiny_base_folder, ("epochs: 2", "epochs: 1"), count=80)


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "project"))


def _adapter(project: Path) -> str:
    (adapter,) = library.open(project).adapters.list()
    return str(adapter.name)


def _send(browser: Browser, **fields: str) -> tuple[int, str]:
    answer = browser.send("/evaluate", "/evaluate", **fields)
    return answer.status_code, unescape(answer.text)


def test_evaluation_counts_its_answers_before_it_is_started(project: Path) -> None:
    with restarted(project) as browser:
        assert 'href="/evaluate"' in browser.get("/")
        page = unescape(browser.get_whole("/evaluate"))
        assert not list((project / ".tunewright").glob("generations/*")), "the page computed answers"
        for split in ("test", "dev"):
            expected = library.open(project).estimate_evaluation(dev=split == "dev", embed=False)
            assert expected.missing == expected.answers > 0
            assert f"<td>{expected.answers:,} of {expected.answers:,}</td>" in page

        ran = tunewright("evaluate", "--estimate", "-p", project, "--json")
        answers = ran.document["answers"]
        assert set(answers) == {"text", "answers", "kept", "seconds"}
        assert answers["kept"] == 0 and answers["text"].startswith("To answer: "), ran.stderr
        assert not list((project / ".tunewright").glob("generations/*")), "the estimate computed answers"
        assert not (project / "evaluations" / "access_log.jsonl").exists(), "the test split was opened"
        assert answers["text"] in page
        assert answers["seconds"] is None and "The time is not known before the first answers" in page

        assert _send(browser, action="evaluate", adapter="nobody")[0] == 400
        code, text = _send(browser, action="evaluate", adapter=_adapter(project), minutes="0")
        assert code == 400 and "id=\"wrong-minutes\">Not a positive number: '0'" in text
        assert 'inputmode="decimal" value="0"' in text and 'aria-label="Pages"' in text
        assert _send(browser, action="guess", adapter=_adapter(project))[0] == 400
        # The project's page asks for the command; it is started where its answers are shown.
        assert browser.send("/jobs", "/", command="evaluate").url.path == "/evaluate"
        assert Jobs(project / ".tunewright" / "jobs", project).all() == []


def test_plan_of_the_next_training_stands_above_its_button(project: Path) -> None:
    version = library.open(project).data.version()
    with restarted(project) as browser:
        page = unescape(browser.get_whole("/train"))
        plan = page[: page.index('value="train"')]
        count = len(version.examples("train"))
        assert f"{count:,} train rows of version {version.digest[:12]}" in plan
        assert f"{-(-count // 8):,}: 1 epoch with 8 rows a step" in plan
        assert "preset all-linear, learning rate 0.003" in plan and "Fits: micro-batch 8" in plan
        assert "by an earlier training on this base" in plan


@pytest.mark.slow
def test_evaluation_is_started_and_limited_by_buttons(project: Path) -> None:
    jobs = Jobs(project / ".tunewright" / "jobs", project)
    name = _adapter(project)
    with restarted(project) as browser:
        _send(browser, action="evaluate", adapter=name, split="dev", minutes="5")
        wait_until(lambda: jobs.running() is None)
        job = jobs.all()[0]
        assert job.command[:5] == ("evaluate", name, "--dev", "--minutes", "5")
        assert job.state == "done", job.log.read_text()
        page = browser.get_whole("/evaluate")
        assert "nothing left to compute" in page
        # The answers on dev were timed, so the time on test is known.
        assert re.search("<td>about [0-9.]+ (second|minute)s?</td>", page) and "earlier answers of this project" in page


def test_finished_training_leads_to_its_curves_and_to_the_evaluation(project: Path) -> None:
    name = _adapter(project)
    job = project / ".tunewright" / "jobs" / f"{7:016x}"
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps({"command": ["train"], "started": "2026-01-01T00:00:00+00:00"}))
    (job / "log").write_text(f"Stored {name}\n")
    (job / "exit_code").write_text("0")
    with restarted(project) as browser:
        assert f'href="/train/runs/{name}">The run' in browser.get(f"/jobs/{job.name}")
        page = browser.get(f"/train/runs/{name}")
    assert f'href="/evaluate?adapter={name}">Evaluate the adapter' in page
    assert "Hardly trained: " in page and 'href="/settings#train.epochs"' in page
