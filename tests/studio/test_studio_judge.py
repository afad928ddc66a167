"""The judge's pages: its cost before it is started, its findings, and each judged item."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from test_studio import HOSTILE

from making.command_line import tunewright
from making.evidence import make_items
from making.human_evaluations import begin
from making.scripted_judge import Asked, Server, honest, scripted, verdict, write_project
from making.studio_client import restarted, wait_until
from tunewright.evaluation.judge.questions import JudgedItem, load_judged
from tunewright.evidence.files import load_evidence, load_items
from tunewright.evidence.schema import Item
from tunewright.studio.jobs import Jobs

EVALUATION = "0123456789ab"
PAGE = f"/judge/{EVALUATION}"
PRICES = {"price_input": 10.0, "price_output": 100.0}


@pytest.fixture
def server() -> Iterator[Server]:
    with scripted(honest) as server:
        yield server


@pytest.fixture
def project(server: Server, tmp_path: Path) -> Path:
    return _project(tmp_path / "project", server)


def _project(folder: Path, server: Server) -> Path:
    items = make_items(60, tuned=0.7, retrieved=0.3)
    items[0] = items[0].model_copy(update={"input": HOSTILE})
    write_project(folder, {"base_url": server.url, "model": "scripted", **PRICES}, items)
    return folder


def _judged(project: Path) -> list[tuple[Item, JudgedItem]]:
    folder = project / "evaluations" / EVALUATION
    rows = {row.key: row for row in load_judged(folder)}
    return [(item, rows[item.key]) for item in load_items(folder)]


@pytest.mark.slow
def test_judge_shows_its_cost_then_runs_and_its_findings_are_shown(project: Path, server: Server) -> None:
    with restarted(project) as browser:
        assert f'href="{PAGE}"' in browser.get(f"/evidence/{EVALUATION}")
        estimate = tunewright("judge", "--estimate", "-p", project, "--json").document
        page = browser.get(PAGE)
        calls = estimate["controls"] + estimate["questions"]
        assert f"<dd>{calls:,}</dd>" in page and f"<dd>{estimate['most_cost']:.2f}</dd>" in page
        assert server.url in page and server.bodies == []

        started = browser.send(PAGE, PAGE, action="judge")
        (job,) = Jobs(project / ".tunewright" / "jobs", project).all()
        assert started.url.path == f"/jobs/{job.id}" and job.command[:2] == ("judge", EVALUATION)
        wait_until(lambda: job.state != "running")
        assert job.state == "done", job.log.read_text()
        assert f'href="{PAGE}">The judge' in browser.get(f"/jobs/{job.id}")
        assert len(server.bodies) == calls

        page = unescape(browser.get(PAGE))
    judgement = load_evidence(project / "evaluations" / EVALUATION).judge
    assert judgement is not None and not judgement.vetoed
    rate = judgement.preferences[0].rate
    assert f"<td>{100 * rate.value:.1f}</td><td>{rate.interval.percents}</td>" in re.sub(r">\s+<", "><", page)
    assert "gold against other" in page and "60 of 60 items" in page
    assert "Estimate calls and cost" in page


def test_judged_items_have_both_answers_and_the_replies(project: Path) -> None:
    assert tunewright("judge", "-p", project).code == 0
    judged = _judged(project)
    with restarted(project) as browser:
        for outcome in ("win", "tie", "loss"):
            expected = [n for n, (_, row) in enumerate(judged, start=1) if _outcome(row) == outcome]
            page = browser.get(f"{PAGE}?outcome={outcome}")
            assert f"{len(expected)} of 60 items" in page and expected
            assert [int(n) for n in re.findall(f'href="{PAGE}/([0-9]+)[?]', page)] == expected[:50]
        wins = [n for n, (_, row) in enumerate(judged, start=1) if _outcome(row) == "win"]
        item, row = judged[wins[1] - 1]
        page = unescape(browser.get(f"{PAGE}/{wins[1]}?outcome=win"))
        assert item.answers["tuned"] in page and item.answers["retrieved-4"] in page
        first, second = row.pairs["retrieved-4"].plain.replies
        assert first != second and first in page and second in page
        assert "tuned against retrieved-4: win" in page
        assert f"{PAGE}/{wins[0]}?" in page and f"{PAGE}/{wins[2]}?" in page
        hostile = browser.get(f"{PAGE}/1") + browser.get(PAGE)
        assert "<script>alert" not in hostile and "<svg onload" not in hostile and "\u202e" not in hostile
        assert browser.client.get(f"{PAGE}?outcome=best").status_code == 400
        for number in ("0", "61", "x"):
            assert browser.client.get(f"{PAGE}/{number}").status_code == 400


def _outcome(row: JudgedItem) -> str | None:
    return row.pairs["retrieved-4"].plain.outcome


def test_agreement_with_people_is_shown_and_computed_again(project: Path) -> None:
    folder = project / "evaluations" / EVALUATION
    blind = begin(folder, items=10)
    for key in blind.sample.order:
        blind.answer(blind.item(key), "A")
    assert tunewright("human-eval", "-p", project, "--results").code in (0, 3, 4)
    assert tunewright("judge", "-p", project).code == 0
    with restarted(project) as browser:
        assert "People compared these answers before the judge did" in browser.get(PAGE)
        page = unescape(browser.send(PAGE, PAGE, action="people").text)
        review = load_evidence(folder).human_eval
        assert review is not None
        (found,) = review.agreements
        cells = f"ada and judge scripted</th><td>{found.items}</td><td>{found.agreed}</td>"
        assert cells in re.sub(r">\s+<", "><", page)
        kept = browser.send(PAGE, PAGE, action="keep")
        assert kept.status_code == 400 and "tunewright data add FILE" in kept.text, "the project has no dataset"
        assert browser.send(PAGE, PAGE, action="bribe").status_code == 400


def test_vetoed_judge_shows_its_controls_and_no_items(tmp_path: Path) -> None:
    def first(asked: Asked) -> str:
        return verdict("CORRECT" if len(asked.answers) == 1 else "A")

    with scripted(first) as server:
        project = _project(tmp_path / "project", server)
        assert tunewright("judge", "-p", project).code == 3
        with restarted(project) as browser:
            page = browser.get(PAGE)
            assert "vetoed" in page and "FAILS" in page and "Judged items" not in page
            assert browser.client.get(f"{PAGE}/1").status_code == 400
