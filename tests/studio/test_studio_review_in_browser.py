"""The studio's review in a real browser: each key, two reviewers at once, and rows that attack the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attacks import ATTACKS, PLANTED

import tunewright as library
from making.browser import (
    AXE,
    EXECUTABLE,
    awake,
    axe_faults,
    click_to_next,
    faults,
    press_to_next,
    row_key,
    show,
    signed_in,
)
from making.command_line import pairs, tunewright, write_jsonl
from making.evidence import make_items
from making.human_evaluations import begin, save
from tunewright.data.review.reviews import ReviewLog, read_reviews
from tunewright.data.review.session import ReviewItem
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["studio_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

PATHS = ("/review/conflicts", "/review/agreement", "/review/edits", "/review", "/review/suspects", "/compare")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose reviewers, notes, edits and stored answers attack the pages too."""
    folder = tmp_path_factory.mktemp("studio-review-browser") / "project"
    folder.mkdir()
    (folder / "tunewright.yaml").write_text("name: review\n")
    rows = [{"prompt": f"{n} {text}", "completion": text} for n, text in enumerate(ATTACKS)]
    write_jsonl(folder / "pairs.jsonl", [*pairs(60), *rows])
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    data = library.open(folder).data
    members = [m for m in data.version().members if m.example.output in ATTACKS]
    for name, edited in (("ada", False), ("mallory <script>", True)):
        session = data.review(name)
        for member in members:
            card = ReviewItem(member, 1)
            session.note(card, f"note {member.example.output}")
            if edited:
                assert session.edit(card, f"edit {member.example.output}") == ""
            else:
                session.judge(card, "right")
    items = make_items(len(members), tuned=0.7, retrieved=0.3)
    save(
        folder / "evaluations" / f"{7:012x}",
        [
            item.model_copy(update={"key": m.key, "answers": {**item.answers, "tuned": f"{m.example.output} too"}})
            for item, m in zip(items, members, strict=True)
        ],
    )
    return folder


def _reviews(project: Path) -> ReviewLog:
    return read_reviews(project / "dataset")


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1100, False)])
def test_attacks_in_rows_notes_edits_and_names_are_text(page: Page, width: int, dark: bool) -> None:
    seen = set[str]()
    for path in PATHS:
        show(page, path, width=width, dark=dark)
        while True:
            assert page.title().startswith(("Review", "Compare")), path
            assert faults(page) == [], path
            assert width == 360 or not AXE.exists() or axe_faults(page) == [], path
            assert page.locator(PLANTED).count() == 0
            text = page.inner_text("body")
            assert "\u202e" not in text
            assert "{{7*7}}" in text or path != "/review/edits"
            if path != "/review/conflicts" or page.locator("[name=key]").count() == 0:
                break
            assert "The model's own answer" in text
            seen.add(row_key(page))
            click_to_next(page, "skip")
        if path == "/review/conflicts":
            assert len(seen) == len(ATTACKS)
            press_to_next(page, "o")  # offer them again


def test_each_key_of_a_row(page: Page, project: Path) -> None:
    page.goto("/review")
    first = row_key(page)
    page.keyboard.press("n")
    assert page.evaluate("document.activeElement.id") == "note"
    page.keyboard.press("r")  # typed, and no verdict
    press_to_next(page, "Control+Enter")
    assert _reviews(project).notes[first]["ada"] == "r"
    page.keyboard.press("n")
    assert page.evaluate("document.activeElement.id") == "note", "the open note is not closed"
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    page.fill("#output", "another answer")
    page.keyboard.press("Escape")
    press_to_next(page, "d")
    assert page.text_content(".changes ins") == "another answer"
    assert row_key(page) == first and first not in _reviews(project).stacks
    page.keyboard.press("e")
    press_to_next(page, "Control+Enter")
    assert _reviews(project).current_verdicts(first)["ada"].output == "another answer"
    second = row_key(page)
    for key, verdict in (("r", "right"), ("w", "wrong"), ("s", "skip")):
        assert row_key(page) == second
        press_to_next(page, key)
        assert _reviews(project).current_verdicts(second)["ada"].verdict == verdict
        press_to_next(page, "u")
        assert _reviews(project).current_verdicts(second) == {}


def test_question_mark_lists_the_keys_of_a_page(page: Page) -> None:
    for path, width, dark in (("/review", 360, True), (f"/compare/{7:012x}", 1100, False)):
        show(page, path, width=width, dark=dark)
        awake(page)
        page.keyboard.press("?")
        listed = page.locator("#keys dl").inner_text().split("\n")
        assert page.is_visible("#keys") and {"n", "write a note", "s", "skip", "u", "undo"} <= set(listed)
        assert faults(page) == [] and (not AXE.exists() or axe_faults(page) == [])
        row = row_key(page)
        page.keyboard.press("s")
        assert not page.evaluate("sent"), "keys press nothing behind the list"
        page.keyboard.press("Escape")
        assert page.is_hidden("#keys")
        press_to_next(page, "s")
        assert row_key(page) != row
        press_to_next(page, "u")
    page.goto("/data")
    page.keyboard.press("?")
    assert page.is_hidden("#keys") and page.is_hidden("#show-keys"), "no keys"


def test_keys_judge_no_row_for_a_second_after_a_page_change(page: Page, address: str, project: Path) -> None:
    assert page.context.browser is not None
    tab = signed_in(page.context.browser, address)
    tab.clock.install()
    tab.clock.pause_at(time.time() + 3600)
    tab.goto("/review")
    row, before = row_key(tab), _reviews(project)
    tab.keyboard.press("r")
    tab.keyboard.press("n")
    tab.keyboard.type("right")
    assert not tab.evaluate("sent") and tab.input_value("#note") == "right", "a note can be begun at once"
    tab.keyboard.press("Escape")
    tab.clock.run_for(999)
    tab.keyboard.press("r")
    assert "r pressed nothing" in tab.inner_text(".verdicts output")
    assert not tab.evaluate("sent") and _reviews(project).stacks == before.stacks
    tab.clock.run_for(1)
    press_to_next(tab, "s")
    assert row_key(tab) != row and _reviews(project).notes[row]["ada"] == "right"
    tab.context.close()


def test_enter_takes_the_suggested_answer_and_a_number_another_one(page: Page, tmp_path: Path) -> None:
    (tmp_path / "tunewright.yaml").write_text("name: labels\n")
    rows = pairs(120)
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert tunewright("data", "add", tmp_path / "pairs.jsonl", "-p", tmp_path).code == 0
    suspects = {suspect.key: suspect for suspect in library.open(tmp_path).data.suspects().suspects}
    studio = Studio(tmp_path, "ada")
    assert page.context.browser is not None
    with serving(studio.app()) as url:
        page = signed_in(page.context.browser, studio.address(url))
        page.goto("/review/suspects")
        first = row_key(page)
        press_to_next(page, "Enter")
        assert _reviews(tmp_path).current_verdicts(first)["ada"].output == suspects[first].suggested
        second = row_key(page)
        page.keyboard.press("?")
        listed = page.locator("#keys dl").inner_text()
        assert listed.count("the answer with this number") == 1 and "edit the answer" in listed
        page.keyboard.press("Escape")
        button = page.locator("#labels button").last
        number, label = button.get_attribute("data-key"), button.get_attribute("value")
        assert number is not None and len(number) == len(str(len({row["completion"] for row in rows})))
        for digit in number[:-1]:
            page.keyboard.press(digit)
            assert "type the next digit" in page.inner_text(".verdicts output")
        press_to_next(page, number[-1])
        assert _reviews(tmp_path).current_verdicts(second)["ada"].output == label


def test_typed_note_goes_with_any_verdict(page: Page, project: Path) -> None:
    page.goto("/review")
    row = row_key(page)
    for key, verdict in (("w", "wrong"), ("s", "skip"), ("r", "right")):
        page.keyboard.press("n")
        page.fill("#note", f"why {verdict}")
        page.keyboard.press("Escape")
        press_to_next(page, key)
        found = _reviews(project)
        assert (found.current_verdicts(row)["ada"].verdict, found.notes[row]["ada"]) == (verdict, f"why {verdict}")
        if key != "r":
            press_to_next(page, "u")
            assert row_key(page) == row and page.input_value("#note") == f"why {verdict}"
    assert "with your note" in page.inner_text("main")
    second = row_key(page)
    page.click("text=write a note")
    page.fill("#note", "by mouse")
    with page.expect_navigation():
        page.click(".verdicts >> text=right")
    assert _reviews(project).notes[second]["ada"] == "by mouse"
    here = row_key(page)
    page.keyboard.press("n")
    page.keyboard.type("before an undo")
    page.keyboard.press("Escape")
    press_to_next(page, "u")
    assert row_key(page) == second and _reviews(project).notes[here]["ada"] == "before an undo"
    page.goto(f"/compare/{7:012x}")
    pair = row_key(page)
    page.keyboard.press("n")
    page.keyboard.type("neither says why")
    page.keyboard.press("Escape")
    press_to_next(page, "x")
    journal = begin(project / "evaluations" / f"{7:012x}").log
    assert (journal.standing[pair].verdict, journal.notes[pair]) == ("neither", {"ada": "neither says why"})


def test_typed_edit_is_saved_with_wrong_and_asked_for_with_other_verdicts(page: Page, project: Path) -> None:
    page.goto("/review")
    row, before = row_key(page), page.input_value("#output")
    page.keyboard.press("e")
    page.fill("#output", "edited\nin two lines")
    page.keyboard.press("Escape")
    press_to_next(page, "w")
    edited = _reviews(project).current_verdicts(row)["ada"]
    assert (edited.verdict, edited.output) == ("edit", "edited\nin two lines")
    press_to_next(page, "u")
    assert row_key(page) == row
    page.keyboard.press("e")
    assert page.input_value("#output") == "edited\nin two lines", "the edit, not the old answer"
    page.fill("#output", "edited again")
    for key in ("r", "s", "u"):
        page.keyboard.press("Escape")
        press_to_next(page, key)
        assert row_key(page) == row and page.input_value("#output") == "edited again"
        assert "No verdict was recorded" in page.inner_text("main")
        assert _reviews(project).current_verdicts(row) == {}
        page.keyboard.press("e")
    page.keyboard.press("Escape")
    press_to_next(page, "c")
    assert row_key(page) == row and page.input_value("#output") == "edited\nin two lines"
    page.keyboard.press("e")
    page.fill("#output", before)
    page.keyboard.press("Escape")
    press_to_next(page, "r")
    assert _reviews(project).current_verdicts(row)["ada"].verdict == "right"
    row = row_key(page)
    page.keyboard.press("e")
    page.fill("#output", "")
    page.keyboard.press("Escape")
    press_to_next(page, "w")
    assert _reviews(project).current_verdicts(row)["ada"].verdict == "wrong", "no answer is the right one"
    press_to_next(page, "u")


def test_typed_text_comes_back_until_its_verdict_is_recorded(page: Page, tmp_path: Path) -> None:
    (tmp_path / "tunewright.yaml").write_text("name: drafts\n")
    write_jsonl(tmp_path / "pairs.jsonl", [row | {"completion": f"answer {n}"} for n, row in enumerate(pairs(60))])
    assert tunewright("data", "add", tmp_path / "pairs.jsonl", "-p", tmp_path).code == 0
    assert page.context.browser is not None
    first = Studio(tmp_path, "ada")
    with serving(first.app()) as url:
        tab = signed_in(page.context.browser, first.address(url))
        tab.goto("/review")
        row, stored = row_key(tab), tab.input_value("#output")
        assert not tab.is_visible("#typed-before")
        tab.keyboard.press("n")
        tab.keyboard.type("why it is odd")
        tab.keyboard.press("Escape")
        tab.keyboard.press("e")
        tab.fill("#output", "typed\nand not sent")
        tab.reload()
        assert (tab.input_value("#note"), tab.input_value("#output")) == ("why it is odd", "typed\nand not sent")
        assert tab.is_visible("#typed-before") and tab.is_visible("#output")
    for lease in (tmp_path / ".tunewright/leases").glob("tmp*"):
        lease.unlink()  # it would end with the process of the first studio
    second = Studio(tmp_path, "ada")  # signs everybody out
    with serving(second.app(), port=int(url.rpartition(":")[2])):
        tab.reload()
        tab.goto(second.address(url))
        tab.wait_for_url(f"{url}/review")
        assert row_key(tab) == row and tab.input_value("#output") == "typed\nand not sent"
        tab.keyboard.press("Escape")
        press_to_next(tab, "w")
        assert row_key(tab) != row
        assert _reviews(tmp_path).notes[row]["ada"] == "why it is odd"
        assert tab.evaluate("localStorage.length") == 0, "a recorded text is in the project"
        tab.keyboard.press("n")
        tab.keyboard.type("left by an undo")
        tab.keyboard.press("Escape")
        press_to_next(tab, "u")
        assert row_key(tab) == row and tab.input_value("#output") == "typed\nand not sent"
        tab.keyboard.press("e")
        tab.fill("#output", "another one")
        tab.reload()
        assert tab.input_value("#output") == "another one"
        with tab.expect_navigation():
            tab.click("#typed-before >> text=Discard")
        assert tab.input_value("#output") == "typed\nand not sent" != stored and not tab.is_visible("#typed-before")
        assert faults(tab) == []
        tab.context.close()


def test_typed_text_of_any_form_comes_back_until_it_is_sent(page: Page, tmp_path: Path) -> None:
    (tmp_path / "tunewright.yaml").write_text("name: drafts\n")
    assert page.context.browser is not None
    studio = Studio(tmp_path, "ada")
    with serving(studio.app()) as url:
        tab = signed_in(page.context.browser, studio.address(url))
        tab.goto("/tenants")
        tab.fill("#name", "front-desk")
        tab.fill("#requests", "many")
        tab.goto("/settings")
        field = "[name='data.system_prompt']"
        tab.fill(field, "Name the\ncolour.")
        tab.fill("[name='judge.api_key_env']", "sk-pasted-by-mistake")
        tab.reload()
        assert tab.input_value(field) == "Name the\ncolour." and tab.is_visible("#typed-before")
        assert tab.input_value("[name='judge.api_key_env']") == "" and faults(tab) == []
        tab.context.set_offline(True)
        with tab.expect_event("requestfailed"):
            tab.click(".settings .verdicts button")
        tab.context.set_offline(False)
        tab.goto("/settings")
        assert tab.input_value(field) == "Name the\ncolour.", "a lost connection has saved nothing"
        with tab.expect_navigation():
            tab.click(".settings .verdicts button")
        assert "Name the" in (tmp_path / "tunewright.yaml").read_text()
        assert "front-desk" in tab.evaluate("JSON.stringify(localStorage)")
        assert "Name the" not in tab.evaluate("JSON.stringify(localStorage)"), "a saved text is in the project"
        tab.goto("/tenants")
        assert (tab.input_value("#name"), tab.input_value("#requests")) == ("front-desk", "many")
        with tab.expect_navigation():
            tab.click("form[action='/tenants'] button")
        tab.goto("/tenants")
        assert tab.input_value("#requests") == "many", "a refused form is not sent"
        with tab.expect_navigation():
            tab.click("form[action='/tenants'] button")
        assert tab.evaluate("document.activeElement.name") == "requests", "a refusal leads to its field"
        tab.fill("#requests", "60")
        with tab.expect_navigation():
            tab.click("form[action='/tenants'] button")
        assert tab.evaluate("localStorage.length") == 0
        tab.fill("#expires", "30d")
        with tab.expect_navigation():
            tab.click("form[action$='/keys'] button")
        assert tab.evaluate("localStorage.length") == 0 and "Copy the API key" in tab.inner_text("main")
        tab.goto("/tenants/front-desk")
        tab.fill("[data-confirms]", "front-desk")
        tab.reload()
        assert tab.input_value("[data-confirms]") == "", "a confirmation is typed each time"
        tab.context.close()


def test_two_reviewers_at_once_lose_nothing(page: Page, address: str, project: Path) -> None:
    assert page.context.browser is not None
    other = signed_in(page.context.browser, address)
    other.goto("/review")
    other.click("header summary")
    other.fill("[name=reviewer]", "ben")
    with other.expect_navigation():
        other.keyboard.press("Enter")
    other.goto("/review")
    page.goto("/review")
    mine, theirs = [], []
    for _ in range(10):
        mine.append(row_key(page))
        theirs.append(row_key(other))
        click_to_next(page, "right")
        click_to_next(other, "right")
    found = _reviews(project)
    assert [found.current_verdicts(key)["ada"].verdict for key in mine] == ["right"] * 10
    assert [found.current_verdicts(key)["ben"].verdict for key in theirs] == ["right"] * 10
    assert not set(mine) & set(theirs)
    other.goto("/review/second")
    blind = row_key(other)
    assert "ben" not in found.current_verdicts(blind) and "ada" in found.current_verdicts(blind)
    press_to_next(other, "w" if found.finding(blind) == "right" else "r")
    assert _reviews(project).disputed(blind)
    page.goto("/review/agreement")
    assert "ada and ben agree on" in page.inner_text("body")
    other.context.close()


def test_keys_judge_a_row_on_its_page_and_a_recorded_text_is_no_draft(page: Page, project: Path) -> None:
    domain, judged = library.open(project).data.version().domain, _reviews(project).stacks
    key = next(member.key for member in domain if member.key not in judged)
    page.goto(f"/rows/{key}")
    page.keyboard.press("n")
    page.fill("#note", "why")
    page.keyboard.press("Escape")
    press_to_next(page, "l")
    assert _reviews(project).current_verdicts(key)["ada"].verdict == "leave-out"
    page.keyboard.press("e")
    page.fill("#output", "an answer from its page")
    press_to_next(page, "Control+Enter")
    assert _reviews(project).current_verdicts(key)["ada"].output == "an answer from its page"
    assert page.is_hidden("#typed-before") and page.input_value("#output") == "an answer from its page"
    assert faults(page) == [] and (not AXE.exists() or axe_faults(page) == [])
    press_to_next(page, "u")
    press_to_next(page, "u")
    assert "ada" not in _reviews(project).current_verdicts(key) and _reviews(project).notes[key]["ada"] == "why"
