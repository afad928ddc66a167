"""Input that the review cannot take, in a real browser: one clear message, and nothing that was typed is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from making.browser import AXE, EXECUTABLE, awake, axe_faults, chromium, faults, press_to_next, row_key, show, signed_in
from making.command_line import pairs, tunewright, write_jsonl
from making.evidence import make_items
from making.human_evaluations import save
from tunewright.data.review.reviews import ReviewLog, read_reviews
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tunewright.yaml").write_text("name: refused\n")
    write_jsonl(tmp_path / "pairs.jsonl", pairs(120))
    assert tunewright("data", "add", tmp_path / "pairs.jsonl", "-p", tmp_path).code == 0
    return tmp_path


@pytest.fixture
def ada(chrome: Browser, project: Path) -> Iterator[Page]:
    studio = Studio(project, "ada")
    with serving(studio.app()) as url:
        page = signed_in(chrome, studio.address(url))
        yield page
        page.context.close()


def _reviews(project: Path) -> ReviewLog:
    return read_reviews(project / "dataset")


def _type(page: Page, *, note: str = "", output: str = "") -> None:
    for key, field, text in (("n", "#note", note), ("e", "#output", output)):
        if text:
            page.keyboard.press(key)
            page.fill(field, text)
            page.keyboard.press("Escape")


def _wrong(page: Page, field: str) -> str:
    """Return the message that describes a field, which is also announced."""
    described = page.locator(field).get_attribute("aria-describedby")
    assert described is not None and page.locator(field).get_attribute("aria-invalid") == "true"
    assert page.locator("[role=alert]").count() == 1
    text = page.locator(f"#{described}")
    # Chromium logs refused forms, and that the keys' closed dialog does not take the focus from the refused field.
    found = [each for each in faults(page) if "status of 400" not in each and "Autofocus processing" not in each]
    assert text.is_visible() and found == [] and (not AXE.exists() or axe_faults(page) == [])
    return text.inner_text()


def _save_refused_text(page: Page, project: Path, row: str, *, by: str) -> None:
    """Follow the message of a refused text to its row, where the text is in its fields again, and save it there."""
    said = page.locator("[data-refused]")
    assert "That row was judged meanwhile. Nothing was recorded for it now." in said.inner_text()
    assert "teal" in said.inner_text() and "the note" in said.inner_text() and row_key(page) != row
    with page.expect_navigation():
        said.get_by_role("link").click()
    assert (page.input_value("#output"), page.input_value("#note")) == ("teal", "the note")
    assert page.is_visible("#typed-before")
    page.focus("#output")
    press_to_next(page, "Control+Enter")
    found = _reviews(project)
    assert (found.current_verdicts(row)[by].output, found.notes[row][by]) == ("teal", "the note")


def test_second_tab_of_a_reviewer_loses_neither_note_nor_edit(ada: Page, project: Path) -> None:
    ada.goto("/review")
    while ada.input_value("#output") == "teal":
        press_to_next(ada, "s")
    row = row_key(ada)
    second = ada.context.new_page()
    second.goto("/review")
    assert row_key(second) == row, "one session has one row"
    _type(second, note="the note", output="teal")
    press_to_next(ada, "w")
    press_to_next(second, "w")
    assert _reviews(project).current_verdicts(row)["ada"].verdict == "wrong" and row not in _reviews(project).notes
    _save_refused_text(second, project, row, by="ada")


def test_edit_sent_by_keys_in_a_second_tab_records_nothing_and_is_shown(ada: Page, project: Path) -> None:
    second = ada.context.new_page()
    ada.goto("/review")
    second.goto("/review")
    row = row_key(ada)
    second.keyboard.press("e")
    second.fill("#output", "typed in the second tab")
    press_to_next(ada, "w")
    with second.expect_navigation():
        second.keyboard.press("Control+Enter")
    assert _reviews(project).current_verdicts(row)["ada"].verdict == "wrong"
    assert "Nothing was recorded" in second.inner_text("main")
    assert "typed in the second tab" in second.content() and row_key(second) != row


def test_text_typed_under_a_lease_that_ran_out_is_not_lost(chrome: Browser, ada: Page, project: Path) -> None:
    ada.goto("/review")
    while ada.input_value("#output") == "teal":
        press_to_next(ada, "s")
    row = row_key(ada)
    _type(ada, note="the note", output="teal")
    studio = Studio(project, "ben")
    with serving(studio.app()) as url:
        ben = signed_in(chrome, studio.address(url))
        ben.goto("/review")
        assert row_key(ben) != row
        leased = next(p for p in (project / ".tunewright/leases").glob("tmp*") if row in p.read_text())
        leased.write_text(f"{row} {time.monotonic() - 1}\n")
        ben.goto("/review")
        while row_key(ben) != row:
            press_to_next(ben, "s")
        press_to_next(ben, "r")
        press_to_next(ada, "w")
        assert set(_reviews(project).current_verdicts(row)) == {"ben"}
        _save_refused_text(ada, project, row, by="ada")
        ben.context.close()


def test_edit_of_another_reviewer_can_be_applied_after_the_next_answer(
    chrome: Browser, ada: Page, project: Path
) -> None:
    studio, link = Studio(project, "ben"), "See and apply the edits"
    with serving(studio.app()) as url:
        ben = signed_in(chrome, studio.address(url))
        ben.goto("/review")
        ada.goto("/review")
        _type(ada, output="navy" if ada.input_value("#output") == "teal" else "teal")
        press_to_next(ada, "w")
        assert ada.get_by_text(link).count() == 1 and ben.get_by_text(link).count() == 0
        press_to_next(ben, "r")
        assert ben.get_by_text(link).count() == 1
        ben.context.close()


@pytest.mark.parametrize(("name", "reason"), [("   ", "empty"), ("x" * 300, "too long")])
def test_refused_name_stays_in_its_field_and_the_typed_note_on_its_row(
    ada: Page, project: Path, name: str, reason: str
) -> None:
    show(ada, "/review", width=360, dark=True)
    row = row_key(ada)
    _type(ada, note="typed before")
    ada.click("header summary")
    ada.fill("[name=reviewer]", name)
    press_to_next(ada, "Enter")
    assert _wrong(ada, "[name=reviewer]").startswith(f"The reviewer's name is {reason}. Type at most 200 letters.")
    assert ada.input_value("[name=reviewer]") == name and ada.input_value("#note") == "typed before"
    assert row_key(ada) == row and "Reviewer: ada" in ada.inner_text("header")
    ada.fill("[name=reviewer]", "Zoë")
    ada.focus("[name=reviewer]")
    press_to_next(ada, "Enter")
    assert "Reviewer: Zoë" in ada.inner_text("header") and ada.locator("[aria-invalid]").count() == 0
    assert _reviews(project).stacks == {}


def test_refused_edit_or_note_stays_with_the_reason_next_to_its_field(ada: Page, project: Path) -> None:
    show(ada, "/review", width=1100)
    row, long = row_key(ada), "label " * 49 + "label!"
    assert len(long) == 300
    _type(ada, output=long)
    ada.focus("#output")
    press_to_next(ada, "Control+Enter")
    assert "No row has the answer" in _wrong(ada, "#output") and ada.input_value("#output") == long
    _type(ada, output=" ")
    ada.focus("#output")
    press_to_next(ada, "Control+Enter")
    assert _wrong(ada, "#output") == "The answer is empty: no verdict"
    assert row_key(ada) == row and _reviews(project).stacks == {}
    _type(ada, output=long)
    for _ in range(2):
        ada.focus("#output")
        press_to_next(ada, "Control+Enter")
    assert _reviews(project).current_verdicts(row)["ada"].output == long
    row = row_key(ada)
    secret = "his key is AKIAIOSFODNN7EXAMPLZ"
    _type(ada, note=secret)
    press_to_next(ada, "r")
    assert "The note contains a secret" in _wrong(ada, "#note") and ada.input_value("#note") == secret
    assert row_key(ada) == row and row not in _reviews(project).stacks
    awake(ada)
    ada.keyboard.press("n")
    ada.fill("#note", "he sent his key")
    ada.keyboard.press("Escape")
    press_to_next(ada, "r")
    assert _reviews(project).notes[row] == {"ada": "he sent his key"}


def test_note_on_a_pair_that_another_tab_judged_is_not_lost(ada: Page, project: Path) -> None:
    save(project / "evaluations" / f"{7:012x}", make_items(12))
    ada.goto(f"/compare/{7:012x}")
    pair = row_key(ada)
    second = ada.context.new_page()
    second.goto(f"/compare/{7:012x}")
    _type(second, note="the note")
    press_to_next(ada, "a")
    press_to_next(second, "b")
    said = second.locator("[data-refused]").inner_text()
    assert "That pair was judged meanwhile." in said and "the note" in said and row_key(second) != pair
    press_to_next(ada, "u")
    assert row_key(ada) == pair and ada.input_value("#note") == "the note"
