"""The studio's review: queues kept apart, differences, notes, second reviews, conflicts, and stored answers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

import tunewright as library
from making.command_line import pairs, tunewright, write_jsonl
from making.evidence import make_items
from making.human_evaluations import begin, evaluation, save
from making.studio_client import Browser, opened, restarted, row_key
from tunewright.cli.data_review import KEYS as REVIEW_KEYS
from tunewright.cli.preferences import KEYS as COMPARE_KEYS
from tunewright.data.review.reviews import read_reviews

pytest_plugins = ["studio_fixtures"]

EVALUATION = f"{7:012x}"


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studio-review") / "project"
    folder.mkdir()
    (folder / "tunewright.yaml").write_text("name: review\n")
    rows = pairs(120)
    # The input of one row has the answer of another: a conflict, which is a suspect.
    write_jsonl(folder / "pairs.jsonl", [*rows, {"prompt": rows[0]["prompt"], "completion": "mauve"}])
    added = tunewright("data", "add", folder / "pairs.jsonl", "-p", folder, "--accept-conflicts")
    assert added.code == 0, added.stderr
    return folder


@pytest.fixture
def project(added: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(added, tmp_path / "project"))


@pytest.fixture
def ben(url: str) -> Iterator[Browser]:
    """Another reviewer's browser."""
    with opened(url) as browser:
        browser.send("/reviewer", "/review", reviewer="ben", back="/review")
        yield browser


def test_suspects_are_searched_as_a_job_and_reviewed_apart_from_the_sample(browser: Browser, project: Path) -> None:
    assert "have not been searched yet" in browser.get("/review/suspects")
    data = library.open(project).data
    assert data.stored_suspects(data.version()) is None
    # The button starts this command, which another test runs as a job.
    suspects = data.suspects().suspects
    assert data.stored_suspects(data.version()) == suspects
    html = browser.get("/review/suspects")
    assert row_key(html) == suspects[0].key
    assert f"{len(suspects):,} left" in html and suspects[0].reason in html
    browser.judge("wrong", page="/review/suspects")
    assert f"{len(suspects) - 1:,} left" in browser.get("/review/suspects")
    verdict = read_reviews(project / "dataset").current_verdicts(suspects[0].key)["ada"]
    assert (verdict.verdict, verdict.draw) == ("wrong", None)
    outcome = data.review_status().outcome
    assert outcome is None or outcome.checked == 0


def test_answers_that_rows_have_are_buttons_and_enter_takes_the_suggested_one(browser: Browser, project: Path) -> None:
    data = library.open(project).data
    suspect = data.suspects().suspects[0]
    stored = {member.key: member.example.output for member in data.version().domain}
    html = browser.get("/review/suspects")
    assert row_key(html) == suspect.key and suspect.suggested
    assert f'name="label" value="{suspect.suggested}" data-key="enter"' in html
    offered = re.findall(r'name="label" value="([^"]+)" form="judge" data-key="(\d+)"', html)
    assert {label for label, _ in offered} == set(stored.values()) - {stored[suspect.key]}
    browser.send("/review/suspects", "/review/suspects", label=suspect.suggested)
    judged = read_reviews(project / "dataset").current_verdicts(suspect.key)["ada"]
    assert (judged.verdict, judged.output) == ("edit", suspect.suggested)
    key = row_key(browser.get("/review"))
    typed = browser.send("/review", "/review", label="mauve", output="typed before").text
    assert "No verdict was recorded: you changed the answer." in typed and "typed before</textarea>" in typed
    assert read_reviews(project / "dataset").current_verdicts(key) == {}


def test_row_is_left_out_by_its_verdict_and_gone_in_the_next_version(browser: Browser, project: Path) -> None:
    key = row_key(browser.get("/review"))
    assert "l</kbd> leave out" in browser.judge("leave-out")
    edits = browser.get("/review/edits")
    assert f'href="/rows/{key}"' in edits and "leave out: " in edits and "Such a version gets a new sample" in edits
    assert "1 row left out in review (ada)" in browser.send("/review/apply", "/review/edits").text
    assert key not in {member.key for member in library.open(project).data.version().members}
    assert "The row was removed: left out in review (ada)" in browser.client.get(f"/rows/{key}").text


@pytest.mark.slow
def test_find_suspects_starts_the_command(browser: Browser, project: Path) -> None:
    refused = browser.send("/review/find-suspects", "/review/suspects", adapter="--help")
    assert refused.status_code == 400
    page = browser.send("/review/find-suspects", "/review/suspects")
    with browser.client.stream("GET", f"{page.url.path}/events") as events:
        text = "".join(events.iter_text())
    assert text.rstrip().endswith("data: done"), text
    done = browser.get(page.url.path)
    assert "Job: data suspects" in done and '<a class="primary" href="/review/suspects">Review the suspects</a>' in done
    assert 'name="key"' in browser.get("/review/suspects")


def test_row_is_judged_edited_and_taken_back_on_its_page(browser: Browser, project: Path) -> None:
    member = next(m for m in library.open(project).data.version().domain if m.split == "test")
    page = f"/rows/{member.key}"
    shown = browser.get(page)
    assert "l</kbd> leave out" in shown and "s</kbd> skip" not in shown and "Your verdict" not in shown
    assert "Recorded: leave-out." in browser.judge("leave-out", page=page, seen="", note="why it goes")
    assert "Your verdict: leave-out." in browser.get(page)
    late = browser.judge("right", page=page, seen="")
    assert "Nothing was recorded" in late, "the page is older than the verdict"
    seen = _seen(browser.get(page))
    saved = browser.judge("edit", page=page, seen=seen, output="teal again", new_label="teal again")
    assert f"Edit saved: <del>{member.example.output}</del><ins>teal again</ins>" in saved
    assert f"Your verdict: edit: <del>{member.example.output}</del><ins>teal again</ins>" in saved
    assert "teal again</textarea>" in saved, "an edit begins with the reviewer's own"
    back = browser.judge("undo", page=page, seen=_seen(saved))
    assert "Taken back: edit on row" in back and "Your verdict: leave-out." in back
    history = unescape(back.partition("<summary>Reviews: ")[2].partition("</ul>")[0])
    said = re.findall(r"ada, version <code>\w+</code>: (.*?)</li>", history)
    edit = f"edit: <del>{member.example.output}</del><ins>teal again</ins>"
    assert said == ["note “why it goes”", "leave-out", edit, "took the verdict back"]
    found = read_reviews(project / "dataset")
    assert found.latest_draw(library.open(project).data.version().digest) is None, "no sample is drawn"
    assert found.current_verdicts(member.key)["ada"].settles is True, "other verdicts were in sight"


def test_row_on_another_screen_cannot_be_judged_on_its_page(browser: Browser, ben: Browser) -> None:
    key = row_key(browser.get("/review"))
    assert "Another reviewer has this row on the screen." in ben.get(f"/rows/{key}")
    assert "r</kbd> right" in browser.get(f"/rows/{key}"), "the same session has the lease"
    other = row_key(ben.get("/review"))
    assert "Another reviewer has this row on the screen." in browser.get(f"/rows/{other}")


def test_text_that_a_row_page_refuses_stays_in_its_form(browser: Browser, project: Path) -> None:
    page = f"/rows/{library.open(project).data.version().domain[0].key}"
    browser.get(page)
    refused = browser.judge("edit", page=page, seen="", output="key AKIAIOSFODNN7EXAMPLZ here")
    assert "contains a secret" in refused and "key AKIAIOSFODNN7EXAMPLZ here</textarea>" in refused
    assert 'name="back" value="/r' in refused, "the form's page"
    asked = browser.judge("right", page=page, seen="", output="typed before")
    assert "No verdict was recorded: you changed the answer." in asked and "typed before</textarea>" in asked


def _seen(html: str) -> str:
    """Return the verdicts that a row's page shows, from its form."""
    (seen,) = re.findall('name="seen" value="([^"]*)"', html)
    return str(seen)


def test_changes_are_shown_before_and_after_an_edit(browser: Browser, project: Path) -> None:
    key = row_key(browser.get("/review"))
    stored = next(m for m in library.open(project).data.version().members if m.key == key).example.output
    shown = browser.judge("preview", output=f"{stored} <i>now</i>")
    assert f"{stored}<ins> &lt;i&gt;now&lt;/i&gt;</ins>" in shown
    assert read_reviews(project / "dataset").current_verdicts(key) == {}, "a look records nothing"
    asked = browser.judge("edit", output="teal again")
    assert "No row has the answer &#34;teal again&#34;. To add it, save the edit again." in asked
    assert read_reviews(project / "dataset").current_verdicts(key) == {}
    saved = browser.judge("edit", output="teal again", new_label="teal again")
    assert f"Edit saved: <del>{stored}</del><ins>teal again</ins>" in saved and "[-" not in saved
    edits = browser.get("/review/edits")
    assert f"<del>{stored}</del><ins>teal again</ins>" in edits and "1 to apply" in edits
    assert "1 judgement of the random sample carries over" in edits
    assert "1 row has pending edits" in saved


def test_refused_and_late_edits_keep_the_typed_text(browser: Browser) -> None:
    stale = row_key(browser.get("/review"))
    refused = browser.judge("edit", output="key AKIAIOSFODNN7EXAMPLZ here")
    assert "contains a secret" in refused and "key AKIAIOSFODNN7EXAMPLZ here</textarea>" in refused
    assert 'name="back" value="/r' in refused, "the form's page"
    browser.judge("right")
    late = browser.send("/review", "/review", action="edit", output="a long text", key=stale)
    assert "Nothing was recorded" in late.text and "You typed: " in late.text and "a long text" in late.text


def test_row_of_a_lease_that_ended_is_offered_and_the_first_verdict_counts(
    browser: Browser, ben: Browser, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = row_key(browser.get("/review"))
    assert row_key(ben.get("/review")) != key == row_key(browser.get("/review"))
    monkeypatch.setattr("tunewright.annotation.LEASE_S", 0)
    ben.judge("right")
    assert key == row_key(browser.get("/review")) == row_key(ben.get("/review"))
    late = browser.get("/review").partition('name="form_token" value="')[2].partition('"')[0]
    ben.judge("right")
    form = {"form_token": late, "key": key, "action": "wrong", "output": "my <b>text</b>", "note": "and why"}
    refused = browser.client.post("/review", data=form).text
    assert "Nothing was recorded" in refused and f'href="/rows/{key}"' in refused
    assert "my &lt;b&gt;text&lt;/b&gt;" in refused and "and why" in refused
    found = read_reviews(project / "dataset")
    assert set(found.current_verdicts(key)) == {"ben"} and key not in found.notes
    assert row_key(refused) != key


def test_row_on_another_screen_is_not_called_reviewed(browser: Browser, ben: Browser, project: Path) -> None:
    suspects = library.open(project).data.suspects().suspects
    for _ in suspects[1:]:
        ben.judge("right", page="/review/suspects")
    assert row_key(ben.get("/review/suspects")) == suspects[-1].key
    assert "Other reviewers have the last rows" in browser.get("/review/suspects")
    ben.judge("right", page="/review/suspects")
    assert "Other reviewers have the last rows" not in browser.get("/review/suspects")


@pytest.mark.parametrize("answer", ["two\r\nlines", "old\rMac", "\nfirst", " spaces "])
def test_unchanged_answer_with_odd_line_ends_is_no_edit(tmp_path: Path, answer: str) -> None:
    (tmp_path / "tunewright.yaml").write_text("name: ends\n")
    write_jsonl(tmp_path / "pairs.jsonl", [*pairs(20), {"prompt": "a question", "completion": answer}])
    assert tunewright("data", "add", tmp_path / "pairs.jsonl", "-p", tmp_path).code == 0
    with restarted(tmp_path) as browser:
        key = next(m.key for m in library.open(tmp_path).data.version().members if m.example.output == answer)
        sent = answer.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")
        browser.judge("right", key=key, output=sent)
    assert read_reviews(tmp_path / "dataset").current_verdicts(key)["ada"].verdict == "right"


def test_key_means_the_same_on_every_page_and_in_a_terminal(browser: Browser, project: Path) -> None:
    evaluation(project / "evaluations" / EVALUATION, count=12)
    pages = [browser.get("/review"), browser.judge("preview", output="x"), browser.get(f"/compare/{EVALUATION}")]
    pages.append(browser.get("/review/conflicts"))
    keys = [dict(re.findall(r"<kbd>(.)</kbd> ([^<:]+)<", page)) for page in pages]
    keys += [dict(re.findall(r"(\S)  ?(.+?)(?:   |$)", line)) for line in (REVIEW_KEYS, "   ".join(COMPARE_KEYS))]
    meanings: dict[str, set[str]] = {}
    for table in keys:
        assert len(table) > 1
        for key, text in table.items():
            meanings.setdefault(key, set()).add(" ".join(text.split()))
    assert {"r", "w", "e", "s", "n", "u", "a", "b", "g", "x", "v", "c", "o"} <= meanings.keys()
    for key, texts in meanings.items():
        words = [set(text.split()) for text in texts]
        assert set.intersection(*words), f"{key}: {texts}"


def test_note_is_kept_with_the_row_and_shown_to_its_author_alone(browser: Browser, ben: Browser, project: Path) -> None:
    key = row_key(browser.get("/review"))
    assert "Noted." in browser.judge("note", note="why <b>red</b>?")
    assert "why &lt;b&gt;red&lt;/b&gt;?</textarea>" in browser.get("/review")
    assert "why &lt;b&gt;" not in ben.get("/review")
    assert read_reviews(project / "dataset").notes[key] == {"ada": "why <b>red</b>?"}
    assert "secret" in browser.judge("note", note="AKIAIOSFODNN7EXAMPLZ")
    assert "was removed" in browser.judge("note", note="")
    assert read_reviews(project / "dataset").notes[key] == {}
    assert library.open(project).data.verify().ok


def test_second_review_is_blind_and_its_conflict_is_settled_with_both_in_sight(
    browser: Browser, ben: Browser, project: Path
) -> None:
    assert "0 left" in ben.get("/review/second")
    key = row_key(browser.get("/review"))
    browser.judge("note", note="looks odd")
    browser.judge("wrong")
    html = ben.get("/review/second")
    assert row_key(html) == key and "1 left" in html and "looks odd" not in html and "<td>wrong" not in html
    ben.judge("right", page="/review/second")
    page = unescape(browser.get("/review/agreement"))
    assert "ada and ben agree on 0 of 1 rows" in page and "Settle yours (1)" in page
    html = ben.get("/review/conflicts")
    assert row_key(html) == key and "looks odd" in html and "<td>wrong</td>" in html
    ben.judge("wrong", page="/review/conflicts")
    page = unescape(ben.get("/review/agreement"))
    assert "There are no conflicts." in page
    # The settled verdict was given with the other one in sight: it is no agreement.
    assert "ada and ben agree on 0 of 1 rows" in page
    found = read_reviews(project / "dataset")
    assert found.finding(key) == "wrong"
    assert found.current_verdicts(key)["ben"].settles
    assert "Taken back: " in ben.judge("undo", page="/review/conflicts")
    assert read_reviews(project / "dataset").disputed(key)


def test_review_says_what_counts_as_wrong_and_what_waits_and_leads_to_the_edits_of_a_rejected_sample(
    browser: Browser, ben: Browser, project: Path
) -> None:
    page = browser.get("/review")
    assert "<em>leave out</em> all count as wrong" in page and "under 5% of all its rows are wrong" in page
    waiting = browser.judge("right")  # ben has the row before it on the screen
    assert "1 more is judged and counts once the rows before it are" in waiting
    judged = ben.judge("edit", output="another answer", new_label="another answer")
    assert "more is judged" not in judged and "1 of 2 wrong" in judged
    last = "Your last verdict, on <a [^>]*>row [0-9]+</a>: edit: <del>.*</del><ins>another answer</ins>"
    assert re.search(last, judged.replace("\n", ""))
    judged = browser.judge("leave-out")
    assert "Rejected: " in judged and "Nobody has looked at " in judged
    assert 'class="primary" href="/review/edits">see and apply the edits' in judged
    edits = browser.get("/review/edits")
    assert edits.count("gets a new sample") == 1 and "starts at 0 rows" not in edits


def test_skipped_rows_are_offered_again_on_request(browser: Browser, ben: Browser, project: Path) -> None:
    key = row_key(browser.get("/review"))
    browser.judge("right")
    ben.judge("skip", page="/review/second")
    assert "No row is left" in ben.get("/review/second")
    assert row_key(ben.judge("again", page="/review/second")) == key


def test_stored_answer_of_the_model_stands_next_to_the_row_unless_it_waits_for_a_blind_comparison(
    browser: Browser, project: Path
) -> None:
    key = row_key(browser.get("/review"))
    assert "The model's own answer" not in unescape(browser.get("/review"))
    items = make_items(12, tuned=0.7, retrieved=0.3)
    wrong = next(i for i in items if i.answers["tuned"] != i.answers["retrieved-4"])
    items[items.index(wrong)] = mine = wrong.model_copy(update={"key": key})
    folder = save(project / "evaluations" / EVALUATION, items)
    html = unescape(browser.get("/review"))
    assert "The model's own answer" in html and EVALUATION in html
    shown = re.search('The model.s own answer</h2>\n<p class="text" dir="auto">(.*?)</p>', html, re.DOTALL)
    assert shown is not None
    assert re.sub("<del>.*?</del>|</?ins>", "", shown[1], flags=re.DOTALL) == mine.answers["tuned"]
    blind = begin(folder)
    blind.keep_sample()
    assert "The model's own answer" not in unescape(browser.get("/review"))
    while (pair := blind.next()) is not None:
        blind.answer(pair, "A")
    assert "The model's own answer" in unescape(browser.get("/review"))


def _filtered(browser: Browser, project: Path, label: str) -> tuple[str, set[str]]:
    """Return the address of the rows of an answer, and their keys."""
    domain = library.open(project).data.version().domain
    keys = {member.key for member in domain if member.example.output == label}
    assert f"Leave out these {len(keys)} rows" in browser.get(f"/rows?answer={label}")
    return f"/rows/change?answer={label}&change=", keys


def test_rows_of_a_filter_are_left_out_together_after_a_question_and_come_back(
    browser: Browser, ben: Browser, project: Path
) -> None:
    address, keys = _filtered(browser, project, "navy")
    asked = browser.get(f"{address}leave-out")
    assert f"Leave out {len(keys)} rows?" in asked and "Filter: Answer “navy”." in asked
    seen = re.findall('name="(seen|count)" value="([^"]*)"', asked)
    form = {"answer": "navy", "change": "leave-out", **dict(seen)}
    one = sorted(keys)[0]
    browser.judge("leave-out", page=f"/rows/{one}", seen="")
    again = browser.send("/rows/change", f"{address}leave-out", **form)
    assert f"changed meanwhile: {len(keys)} before, {len(keys) - 1} now. Nothing was recorded" in again.text
    assert set(read_reviews(project / "dataset").stacks) == {one}
    form |= dict(re.findall('name="(seen|count)" value="([^"]*)"', again.text))
    other = sorted(keys)[1]
    ben.judge("right", page=f"/rows/{other}", seen="")
    done = browser.send("/rows/change", f"{address}leave-out", **form)
    assert f"{len(keys) - 1} rows: left out in the next version." in done.text and done.url.path == "/rows"
    assert "because other reviewers disagree: 1 row." in done.text
    assert "next version: left out" in done.text
    nothing = browser.get(f"{address}leave-out")
    assert "No row of the filter needs this change" in nothing and "Leave out 0 rows" not in nothing
    reviews = read_reviews(project / "dataset")
    assert {key for key in keys if reviews.current_verdicts(key)["ada"].verdict == "leave-out"} == keys
    assert f"You changed {len(keys) - 1} rows together" not in ben.get("/rows")
    when = re.findall('name="when" value="([^"]*)"', done.text)
    assert "There is nothing to take back" in browser.send("/rows/undo", "/rows", when="2020").text
    assert f"Taken back: {len(keys) - 1} rows." in browser.send("/rows/undo", "/rows", when=when[0]).text
    assert set(read_reviews(project / "dataset").current_verdicts(one)) == {"ada"}, "judged on its page"
    assert read_reviews(project / "dataset").current_verdicts(other).keys() == {"ben"}
    assert "Take them back" not in browser.get("/rows")


def test_answer_of_the_rows_of_a_filter_is_set_together(browser: Browser, project: Path) -> None:
    address, keys = _filtered(browser, project, "navy")
    asked = browser.get(f"{address}edit&output=mauve")
    assert f"Set the answer of {len(keys)} rows to “mauve”?" in asked
    form = {"answer": "navy", "change": "edit", "output": "mauve"}
    form |= dict(re.findall('name="(seen|count)" value="([^"]*)"', asked))
    done = browser.send("/rows/change", f"{address}edit&output=mauve", **form).text
    assert "the answer is &#34;mauve&#34;" in done and "next version: &#34;mauve&#34;" in done
    when = re.findall('name="when" value="([^"]*)"', done)
    browser.send("/rows/undo", "/rows", when=when[0])
    assert "your edit, taken back" not in browser.get(f"/rows/{min(keys)}"), "nobody typed it on this row"
    browser.send("/rows/change", f"{address}edit&output=mauve", **form)
    inputs = {m.example.input_text for m in library.open(project).data.version().domain if m.key in keys}
    edits = browser.get("/review/edits")
    assert all(f'<td dir="auto">&#34;{each}&#34;</td>' in edits for each in inputs)
    assert f"{len(keys)} answers edited in review (ada)" in browser.send("/review/apply", "/review/edits").text
    domain = library.open(project).data.version().domain
    assert "navy" not in {m.example.output for m in domain} and sum(m.example.output == "mauve" for m in domain) > 5
    assert "Take them back" not in browser.get("/rows"), "a version has them"


def test_change_of_rows_refuses_no_filter_an_unknown_answer_and_an_empty_split(browser: Browser, project: Path) -> None:
    assert "Change these" not in browser.get("/rows") and "Change these" in browser.get("/rows?split=test")
    for query, said in (
        ("change=leave-out", "No filter chooses rows"),
        ("split=test&change=purge", "Unknown change"),
        ("split=test&change=edit&output=none+has+it", "No row has the answer"),
    ):
        refused = browser.client.get(f"/rows/change?{query}")
        assert refused.status_code == 400 and said in refused.text
    asked = browser.get("/rows/change?split=test&change=leave-out&output=mauve")
    form = {"split": "test", "change": "leave-out"} | dict(re.findall('name="(seen|count)" value="([^"]*)"', asked))
    refused = browser.send("/rows/change", "/rows/change?split=test&change=leave-out", **form)
    assert refused.status_code == 400 and "No test row would be left, nothing was removed" in refused.text
    assert "Leave out" in refused.text and read_reviews(project / "dataset").stacks == {}
