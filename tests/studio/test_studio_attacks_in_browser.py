"""Rows that attack every page that shows rows: they are text there. The review's pages have a test of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attacks import ATTACKS, PLANTED
from states import reservation

import tunewright as library
from making.browser import EXECUTABLE, faults, show, wait_for
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.evidence import make_history, make_items
from making.human_evaluations import save
from tunewright.adapters.registry import HISTORY
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import RequestUsage
from tunewright.serving.tenants.releases import Candidate, Grounds
from tunewright.studio.pages.data import UPLOADS
from tunewright.training.history import append_dev_answers

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["studio_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

EVALUATION = f"{7:012x}"
RUN = "0123456789ab"
JOB = "0123456789abcdef"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project whose inputs, answers, uploads, log and shadow answers are attacks."""
    folder = tiny_project(tmp_path_factory.mktemp("studio-attacks") / "project", tiny_base_folder)
    rows = [{"prompt": f"{n} {text}", "completion": text} for n, text in enumerate(ATTACKS)]
    write_jsonl(folder / "pairs.jsonl", [*pairs(60), *rows])
    write_jsonl(folder / "more.jsonl", [row | {"completion": f"{row['completion']} too"} for row in rows])
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert tunewright("data", "add", folder / "more.jsonl", "--replace", "-p", folder).code == 0
    (folder / UPLOADS).mkdir()
    write_jsonl(folder / UPLOADS / "attacks.jsonl", [*rows, {text: text for text in ATTACKS}])
    members = [m for m in library.open(folder).data.version().members if m.example.output.endswith(" too")]
    answered = zip(make_items(len(ATTACKS), tuned=0.7, retrieved=0.3), members, ATTACKS, strict=True)
    texts = [
        item.model_copy(
            update={"key": m.key, "input": text, "reference": text, "answers": dict.fromkeys(item.answers, f"{text}!")}
        )
        for item, m, text in answered
    ]
    save(folder / "evaluations" / EVALUATION, texts)
    run = folder / ".tunewright" / "training" / RUN
    run.mkdir(parents=True)
    (run / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in make_history(12)))
    append_dev_answers(run, 10, {m.key: text for m, text in zip(members, ATTACKS, strict=True)})
    job = folder / ".tunewright" / "jobs" / JOB
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps({"command": ["data", ATTACKS[0]], "started": "2026-11-28T10:00:00+00:00"}))
    (job / "log").write_text("\n".join(ATTACKS), encoding="utf-8")
    (job / "exit_code").write_text("0")
    _shadow_answers(folder)
    return folder


def _shadow_answers(project: Path) -> None:
    grounds = Grounds("ship", "0123456789ab")
    with State(f"sqlite:///{project}/serving/state.sqlite", "ann", None) as state:
        state.releases.deploy("courts", "good", "a" * 64, grounds)
        made = state.releases.start_candidate("courts", Candidate("next", "c" * 64, None), grounds)
        state.tenants.add("acme", ["courts"])
        caller = state.keys.caller(state.keys.create("acme")[0])
        for place, text in enumerate(ATTACKS):
            named = replace(reservation(caller, made), response_id=f"chatcmpl-{place}")
            number = state.quota.reserve(named, "g")
            state.quota.record_shadow(number, made.id, text, f"{text} too", None)
            state.quota.settle(number, RequestUsage(7, 3, 0.1, 0.2, 1.0, "stop"))


def _paths(project: Path) -> list[str]:
    rows = [m.key for m in library.open(project).data.version().members if m.example.output.endswith(" too")]
    return [
        *("/data/check?file=attacks.jsonl", "/data/diff", "/data/leakage", "/rows?flag=edited", "/rows?q=<svg"),
        *(f"/rows/{row}" for row in rows),
        *(f"/evidence/{EVALUATION}{place}" for place in ("", "/1", "/2", "/3", "/4")),
        *(f"/train/runs/{RUN}", f"/jobs/{JOB}", "/deploy/courts", "/"),
    ]


def _require_text(page: Page, path: str) -> None:
    assert page.title() not in ("", "attacked"), path
    assert faults(page) == [], path
    assert page.locator(PLANTED).count() == 0, path
    assert "\u202e" not in page.inner_text("body"), path


def test_attacks_are_text_on_every_page_with_rows(page: Page, project: Path) -> None:
    seen = ""
    for path in _paths(project):
        show(page, path, width=360, dark=True)
        if path.startswith("/jobs"):
            wait_for(page.locator("#log")).to_contain_text("{{7*7}}")
        _require_text(page, path)
        seen += page.inner_text("main")
    for part in ("onload=", "</textarea><script>", "(javascript:", "{{7*7}}", "\u05e9\u05dc\u05d5\u05dd"):
        assert seen.count(part) >= 10, part


def test_attacks_are_text_in_the_report(page: Page) -> None:
    show(page, f"/report/{EVALUATION}", width=360)
    assert page.title() not in ("", "attacked")
    assert page.locator(":is(script, img, iframe, [onload], [onerror], a[href^='javascript' i])").count() == 0
    assert "{{7*7}}" in page.inner_text("body") and "\u202e" not in page.inner_text("body")
    assert faults(page) == []


def test_attacks_are_text_in_the_playground(page: Page) -> None:
    page.goto("/playground")
    page.click("text=Load the base")
    for text in (each[:300] for each in ATTACKS):  # the base reads 2,048 bytes
        page.goto("/playground")
        page.fill("#question", text)
        page.fill("#limit", "4")
        page.get_by_label("The best prompting arm").uncheck()
        with page.expect_navigation():
            page.get_by_role("button", name="Ask").click()
        wait_for(page.get_by_text("Add to the dataset")).to_be_visible()
        _require_text(page, "question")
        with page.expect_navigation():
            page.click("text=Add to the dataset")
        _require_text(page, "row")
        assert page.input_value("[name=question]").count("7*7") == text.count("7*7")
