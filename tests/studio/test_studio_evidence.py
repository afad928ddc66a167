"""The studio's pages on evaluations: verdict, items by a filter, and one item with its answers and prompts."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from test_studio import HOSTILE

import tunewright as library
from making.command_line import tiny_project
from making.evidence import make_evidence, make_items
from making.human_evaluations import save
from making.studio_client import Browser, restarted
from tunewright.evidence.files import EVIDENCE_FILE, ITEMS_FILE, PROMPTS_FILE
from tunewright.evidence.schema import Item
from tunewright.evidence.verdict import verdict
from tunewright.report.page import summary

pytest_plugins = ["studio_fixtures"]

EVALUATION = "0123456789ab"


@pytest.fixture(scope="module")
def items() -> list[Item]:
    made = make_items(120, tuned=0.7, retrieved=0.3)
    nearest = [number / 120 for number in range(120)]
    made = [item.model_copy(update={"nearest": value}) for item, value in zip(made, nearest, strict=True)]
    made[7] = made[7].model_copy(update={"input": HOSTILE})
    return made


@pytest.fixture
def project(tmp_path: Path, items: list[Item]) -> Path:
    (tmp_path / "tunewright.yaml").write_text("name: tiny\n")
    save(tmp_path / "evaluations" / EVALUATION, items, make_evidence(items))
    return tmp_path


def _numbers(html: str) -> list[int]:
    return [int(n) for n in re.findall(f'href="/evidence/{EVALUATION}/([0-9]+)[?]', html)]


def test_evaluation_is_shown_with_its_verdict_and_contrasts(browser: Browser, items: list[Item]) -> None:
    assert f"/evidence/{EVALUATION}" in browser.get("/evidence")
    page = unescape(browser.get(f"/evidence/{EVALUATION}"))
    found = verdict(make_evidence(items))
    for reason in found.reasons:
        assert reason in page
    for path in ("/", "/evidence", f"/evidence/{EVALUATION}"):
        shown = unescape(browser.get(path))
        # The plain words first; the test's name is folded behind them and explained.
        assert shown.index(found.summary) < shown.index("<summary>Interval and test") < shown.index("(exact McNemar")
        assert "<dt>McNemar</dt>" in shown
    answer = summary(make_evidence(items))
    home = unescape(browser.get("/"))
    assert answer.answer == "Ship: 80 of 120 right; the best prompt gets 36"
    assert home.index(answer.answer) < home.index(found.summary) < home.index(answer.made)
    assert "tuned − retrieved-4" in page and f"/report/{EVALUATION}" in page


def test_report_leads_back_and_its_file_has_no_link_to_the_studio(browser: Browser, project: Path) -> None:
    answer = browser.client.get(f"/report/{EVALUATION}")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in ("/", "/evidence", f"/evidence/{EVALUATION}"):
        assert f'<a href="{path}">' in answer.text
    file = (project / "evaluations" / EVALUATION / "report.html").read_text()
    assert not re.search('(href|src)="[^#]', file) and "Studio" not in file
    start = answer.text.index('<nav aria-label="Studio"')
    end = answer.text.index("</nav>") + len("</nav>\n")
    assert answer.text[:start] + answer.text[end:].lstrip("\n") == file


def test_items_are_filtered_by_effect_and_arms_and_paged(browser: Browser, items: list[Item]) -> None:
    def right(item: Item, arm: str) -> bool:
        return item.scores["exact_match"][arm] == 1

    for change, tuned, other in [
        ("fixed", True, False),
        ("broken", False, True),
        ("both right", True, True),
        ("both wrong", False, False),
    ]:
        expected = [
            number
            for number, item in enumerate(items, start=1)
            if (right(item, "tuned"), right(item, "retrieved-4")) == (tuned, other)
        ]
        page = browser.get(f"/evidence/{EVALUATION}?change={change}")
        assert f"{len(expected)} of 120 items" in page and expected
        assert _numbers(page) == expected[:50]
    assert _numbers(browser.get(f"/evidence/{EVALUATION}?page=3")) == list(range(101, 121))
    against = browser.get(f"/evidence/{EVALUATION}?control=zero-shot&change=fixed")
    assert f"{sum(right(item, 'tuned') for item in items)} of 120 items" in against
    for query in ("change=mended", "control=nobody", "nearest=9"):
        assert browser.client.get(f"/evidence/{EVALUATION}?{query}").status_code == 400


def test_item_shows_every_answer_and_leads_through_the_filter(browser: Browser, items: list[Item]) -> None:
    numbers = _numbers(browser.get(f"/evidence/{EVALUATION}?change=fixed"))
    page = unescape(browser.get(f"/evidence/{EVALUATION}/{numbers[1]}?change=fixed"))
    item = items[numbers[1] - 1]
    shown = re.sub("<[^>]+>", "", page)
    assert item.reference in shown and item.answers["zero-shot"] in shown and "✓ right" in shown
    assert f"{EVALUATION}/{numbers[0]}?" in page and f"{EVALUATION}/{numbers[2]}?" in page
    hostile = browser.get(f"/evidence/{EVALUATION}/8") + browser.get(f"/evidence/{EVALUATION}")
    assert "<script>alert" not in hostile and "<svg onload" not in hostile and "\u202e" not in hostile
    for number in ("0", "121", "x"):
        assert browser.client.get(f"/evidence/{EVALUATION}/{number}").status_code == 400


@pytest.mark.parametrize("file", [EVIDENCE_FILE, ITEMS_FILE])
def test_changed_evidence_is_one_message(browser: Browser, project: Path, file: str) -> None:
    path = project / "evaluations" / EVALUATION / file
    path.write_text(path.read_text() + "\n")
    for page in ("", "/1", "/1/prompts"):
        refused = browser.client.get(f"/evidence/{EVALUATION}{page}")
        assert refused.status_code == 400 and file in refused.text and "Traceback" not in refused.text
    listed = browser.get("/evidence")
    assert "unreadable" in listed and f'href="/evidence/{EVALUATION}"' not in listed
    path.unlink()
    assert browser.client.get(f"/evidence/{EVALUATION}").status_code == 400


@pytest.mark.slow
def test_prompts_page_shows_what_the_models_were_given(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder, 240)
    project = library.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    evidence = project.evaluate().evidence
    key = project.evidence(evidence.id)[1][0].key
    prompts = {each.arm: each for each in library.open(folder).item_prompts(evidence.id, key)}
    assert set(prompts) == {arm.name for arm in evidence.arms if arm.kind != "free"}
    assert all(each.tokens and each.missing is None for each in prompts.values())
    best = evidence.arm(evidence.best_prompting)
    assert len(prompts[best.name].demonstrations) == best.shots
    text = "".join(token.text for token in prompts[best.name].tokens)
    train = {member.key for member in project.data.version().examples("train")}
    for row_key, row in prompts[best.name].demonstrations:
        assert row is not None and row.output in text and row_key in train
    asked = [message["content"] for message in prompts[best.name].messages]
    assert len(asked) >= 2 * best.shots + 1 and all(content in text for content in asked)
    with restarted(folder) as browser:
        page = unescape(browser.get_whole(f"/evidence/{evidence.id}/1/prompts"))
        assert page.count("exactly those that the model was given") == len(prompts)
        more = folder / "more.jsonl"
        more.write_text('{"prompt": "something new", "completion": "something"}\n')
        library.open(folder).data.add([more])
        shutil.rmtree(folder / ".tunewright")  # as in a copy of the project
        assert unescape(browser.get_whole(f"/evidence/{evidence.id}/1/prompts")) == page
        config = folder / "tunewright.yaml"
        config.write_text(config.read_text().replace("train:\n", "chat:\n  template: plain\ntrain:\n", 1))
    with restarted(folder) as browser:
        page = unescape(browser.get_whole(f"/evidence/{evidence.id}/1/prompts"))
        assert page.count("The base or the chat template has changed") == len(prompts)
        assert all(content in page for content in asked)
        (folder / "evaluations" / evidence.id / PROMPTS_FILE).unlink()  # as after a purge of rows
        page = unescape(browser.get_whole(f"/evidence/{evidence.id}/1/prompts"))
        assert page.count("The prompts were deleted") == 1
        assert library.open(folder).verdict(evidence.id).reasons


def test_evidence_of_schema_2_says_that_it_has_no_prompts(project: Path, items: list[Item]) -> None:
    older = make_evidence(items).model_copy(update={"schema_version": 2, "id": "ba9876543210"})
    save(project / "evaluations" / older.id, items, older)
    found = library.open(project).item_prompts(older.id, items[0].key)
    assert [each.arm for each in found] == [arm.name for arm in older.arms]
    with restarted(project) as browser:
        page = unescape(browser.get_whole(f"/evidence/{older.id}/1/prompts"))
        assert page.count("stored no prompts") == 1
    assert library.open(project).verdict(older.id) == verdict(older)
