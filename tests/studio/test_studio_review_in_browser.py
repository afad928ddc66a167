"""The studio's review in a real browser: each key, two reviewers at once, and rows that attack the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunewright as library
from browser import AXE, CONTRASTS, EXECUTABLE, Page, chromium
from command_line import pairs, tunewright, write_jsonl
from factories import make_items
from people_helpers import save
from tunewright.data.review.reviews import ReviewLog, read_reviews
from tunewright.data.review.session import ReviewItem
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")

RUN = "document.title='attacked'"
PATHS = ("/review/conflicts", "/review/agreement", "/review/edits", "/review", "/review/suspects", "/compare")
ATTACKS = (
    f"<script>{RUN}</script></textarea><script>{RUN}</script>",
    f'"><svg onload="{RUN}"></svg><img src=x onerror="{RUN}">',
    f'<a href="javascript:{RUN}">link</a> [link](javascript:{RUN}) {{{{7*7}}}} <style>*{{display:none}}</style>',
    "\u05e9\u05dc\u05d5\u05dd" * 300 + " \u202eabc " + "\u0645\u0631\u062d\u0628\u0627 " * 200,
)


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


@pytest.fixture(scope="module")
def url(project: Path) -> Iterator[str]:
    studio = Studio(project, "ada")
    with serving(studio.app()) as url:
        yield studio.address(url)


def _signed_in(page: Page, url: str) -> Page:
    page.open(url, width=1100)
    while page.value("document.title") == "Sign in: tunewright":
        page.happened.clear()
        page.loaded()
    return page


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Page]:
    with chromium() as page:
        yield _signed_in(page, url)


def _place(url: str, path: str) -> str:
    return url.partition("/sign-in")[0] + path


def _key(page: Page) -> str:
    return str(page.value("document.querySelector('[name=key]').value"))


def _press(page: Page, key: str, *, control: bool = False) -> None:
    """Press a key that leads to the next page."""
    page.happened.clear()
    page.press(key, control=control)
    page.loaded()


def _type(page: Page, text: str) -> None:
    page.value(f"document.activeElement.value = {json.dumps(text)}")


def _reviews(project: Path) -> ReviewLog:
    return read_reviews(project / "dataset")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_attacks_in_rows_notes_edits_and_names_are_text(page: Page, url: str, width: int, dark: bool) -> None:
    page.said.clear()
    seen = set[str]()
    for path in PATHS:
        page.open(_place(url, path), width=width, dark=dark)
        while True:
            assert page.value("document.title").startswith(("Review", "Compare")), path
            assert page.value("document.documentElement.scrollWidth") == width, path
            planted = "document.querySelectorAll('main :is(script, svg, img, style, a[href^=\"javascript\" i])').length"
            assert page.value(planted) == 0
            text = page.value("document.body.innerText")
            assert "\u202e" not in text
            assert "{{7*7}}" in text or path != "/review/edits"
            dim = [text for contrast, text in page.value(CONTRASTS) if contrast < 4.5]
            assert dim == [], path
            if path != "/review/conflicts" or not page.value("!!document.querySelector('[name=key]')"):
                break
            assert "The model's own answer" in text
            seen.add(_key(page))
            _press(page, "s")
        if path == "/review/conflicts":
            assert len(seen) == len(ATTACKS)
            _press(page, "a")  # offer them again
    assert page.said == []


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: make test-clients")
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_fault_in_the_review(page: Page, url: str, dark: bool) -> None:
    for path in PATHS:
        page.open(_place(url, path), width=1100, dark=dark)
        assert page.accessibility_faults() == [], path


def test_each_key_of_a_row(page: Page, url: str, project: Path) -> None:
    page.open(_place(url, "/review"), width=1100)
    first = _key(page)
    page.press("n")
    assert page.value("document.activeElement.id") == "note"
    page.press("r")  # typed, and no verdict
    _press(page, "Enter", control=True)
    assert _reviews(project).notes[first]["ada"] == "r"
    page.press("n")
    assert page.value("document.activeElement.id") == "note", "the open note is not closed"
    page.press("Escape")
    page.press("e")
    _type(page, "another answer")
    page.press("Escape")
    _press(page, "d")
    assert page.value("document.querySelector('.changes ins').textContent") == "another answer"
    assert _key(page) == first and first not in _reviews(project).stacks
    page.press("e")
    _press(page, "Enter", control=True)
    assert _reviews(project).current_verdicts(first)["ada"].output == "another answer"
    second = _key(page)
    for key, verdict in (("r", "right"), ("w", "wrong"), ("s", "skip")):
        assert _key(page) == second
        _press(page, key)
        assert _reviews(project).current_verdicts(second)["ada"].verdict == verdict
        _press(page, "u")
        assert _reviews(project).current_verdicts(second) == {}


def test_two_reviewers_at_once_lose_nothing(page: Page, url: str, project: Path) -> None:
    with chromium() as other:
        _signed_in(other, url)
        other.open(_place(url, "/review"), width=1100)
        other.value("document.querySelector('header details').open = true")
        other.value("document.querySelector('[name=reviewer]').value = 'ben'")
        other.happened.clear()
        other.value("document.querySelector('[name=reviewer]').form.requestSubmit()")
        other.loaded()
        other.open(_place(url, "/review"), width=1100)
        page.open(_place(url, "/review"), width=1100)
        shared = _key(page)
        assert _key(other) == shared, "nobody has judged it"
        _press(page, "r")
        _press(other, "w")  # the row was settled meanwhile
        assert "Nothing was recorded" in other.value("document.body.innerText")
        mine, theirs = [], []
        for _ in range(4):
            mine.append(_key(page))
            _press(page, "r")
            other.open(_place(url, "/review"), width=1100)
            theirs.append(_key(other))
            _press(other, "r")
            page.open(_place(url, "/review"), width=1100)
        found = _reviews(project)
        assert set(found.current_verdicts(shared)) == {"ada"}
        assert [found.current_verdicts(key)["ada"].verdict for key in mine] == ["right"] * 4
        assert [found.current_verdicts(key)["ben"].verdict for key in theirs] == ["right"] * 4
        other.open(_place(url, "/review/second"), width=1100)
        blind = _key(other)
        assert "ben" not in found.current_verdicts(blind) and "ada" in found.current_verdicts(blind)
        _press(other, "w" if found.finding(blind) == "right" else "r")
        page.open(_place(url, "/review/agreement"), width=1100)
        assert "ada and ben agree on 0 of 1 rows" in page.value("document.body.innerText")
