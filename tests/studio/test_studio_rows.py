"""The rows in the studio: filters, flags, and the history of one row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

import tunewright as library
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.evidence import make_items
from making.human_evaluations import save
from making.studio_client import Browser, restarted
from tunewright.data.options import ReviewOptions
from tunewright.data.review.reviews import Verdict
from tunewright.data.versions import Member

EVALUATION = f"{7:012x}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Two files, an edited row, two answers to one input, a model's answer, and a generic mix-in."""
    folder = tiny_project(tmp_path_factory.mktemp("studio-rows") / "project", tiny_base_folder)
    add = ("data", "add", "-p", folder)
    assert tunewright(*add, folder / "pairs.jsonl").code == 0
    data = library.open(folder).data
    review = data.review("ada")
    card = review.next()
    assert card is not None
    review.edit(card, "an edited answer")
    data.apply_reviews()
    rows = pairs(12, seed=5)
    rows.append({"prompt": rows[0]["prompt"], "completion": "another answer"})
    write_jsonl(folder / "more.jsonl", rows)
    config = folder / "tunewright.yaml"
    changed = "chat: {reasoning: strip}\ndata:\n  mix: {source: generic.jsonl, fraction: 0.1}\n"
    config.write_text(config.read_text().replace("data:\n", changed))
    write_jsonl(folder / "generic.jsonl", [{"prompt": f"generic {n} {'x' * n}", "completion": "y"} for n in range(40)])
    assert tunewright(*add, folder / "more.jsonl", "--accept-conflicts").code == 0
    answer = {"role": "assistant", "content": "a model", "reasoning_content": "nobody <signed> it"}
    chat = [{"role": "user", "content": "who wrote this"}, answer]
    write_jsonl(folder / "generated.jsonl", [{"messages": chat, "generated": {"teacher": "big"}}])
    assert tunewright(*add, folder / "generated.jsonl", "--accept-conflicts").code == 0
    return folder


@pytest.fixture(scope="module")
def browser(project: Path) -> Iterator[Browser]:
    with restarted(project) as browser:
        yield browser


def _keys(html: str) -> set[str]:
    return set(re.findall('href="/rows/([0-9a-f]{64})"', html))


@pytest.mark.parametrize("flag", ["conflict", "generated", "edited", "mixed"])
def test_flag_filters_the_rows_that_have_it(browser: Browser, project: Path, flag: str) -> None:
    members = library.open(project).data.version().members
    inputs = [m.example.input_text for m in members]
    wanted = {
        "conflict": {m.key for m in members if inputs.count(m.example.input_text) > 1},
        "generated": {m.key for m in members if m.example.output == "a model"},
        "edited": {m.key for m in members if m.example.output == "an edited answer"},
        "mixed": {m.key for m in members if m.example.input_text.startswith("generic ")},
    }[flag]
    page = browser.get(f"/rows?flag={flag}")
    assert _keys(page) == wanted != set()
    assert page.count(f'<td class="words">{flag}</td>') == len(wanted)


def test_next_page_keeps_the_filters(browser: Browser) -> None:
    page = browser.get("/rows?split=train&q=a")
    (address,) = re.findall('href="([^"]*)" rel="next"', page)
    second = browser.get(unescape(address))
    assert "page 2 of" in second and not _keys(second) & _keys(page)
    assert '<option value="train" selected>' in second


def test_filtered_rows_are_sent_whole_for_a_spreadsheet_or_as_conversations(
    browser: Browser, project: Path, tmp_path: Path
) -> None:
    page = browser.get("/rows?split=train&sort=answer")
    assert "page 1 of 1" not in page
    sheet, lines = (unescape(address) for address in re.findall('href="(/rows[.][^"]*)" download', page))
    data = library.open(project).data
    wanted = {m.key: m for m in data.version().members if m.split == "train"}
    answer = browser.client.get(sheet)
    name = f"rows-{data.version().digest[:12]}.csv"
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"))))
    assert {row["key"]: (row["input"], row["answer"]) for row in rows} == {
        key: (member.example.input_text, member.example.output) for key, member in wanted.items()
    }
    assert [row["answer"].casefold() for row in rows] == sorted(row["answer"].casefold() for row in rows)
    assert {int(row["number"]) for row in rows} == {data.numbers()[key] for key in wanted}
    assert {row["flags"] for row in rows if row["answer"] == "an edited answer"} <= {"edited"}
    sent = [json.loads(line) for line in browser.client.get(lines).text.splitlines()]
    assert sent == [wanted[row["key"]].example.as_row() for row in rows]
    # The file names its rows in a terminal.
    (tmp_path / name).write_bytes(browser.client.get("/rows.csv?flag=edited&split=train").content)
    listed = tunewright("data", "remove", "-p", project, "--keys", tmp_path / name, "--dry-run", "--json")
    assert [row["key"] for row in listed.document["rows"]] == [
        k for k in wanted if wanted[k].example.output == "an edited answer"
    ]
    refused = browser.client.get("/rows.xlsx?split=train")
    assert refused.status_code == 400 and "Choose from csv, jsonl." in refused.text


def test_row_page_shows_the_versions_reviews_adapters_and_evaluations_that_saw_it(
    browser: Browser, project: Path
) -> None:
    data = library.open(project).data
    versions = data.log()
    row = next(m for m in data.version().members if m.example.output == "an edited answer")
    lineage = {"dataset": {"digest": versions[1].digest}, "rendering": {"train": {"left_out": []}}}
    for name, digest in (("seen-1", versions[1].digest), ("unseen-2", versions[0].digest)):
        (project / "adapters" / name).mkdir(parents=True)
        (project / "adapters" / name / "lineage.json").write_text(
            json.dumps(lineage | {"dataset": {"digest": digest}}), encoding="utf-8"
        )
    items = make_items(12)
    numbers = data.numbers()
    (before,) = (key for key, number in numbers.items() if number == numbers[row.key] and key != row.key)
    keys = (row.key, before, *(item.key for item in items[2:]))
    save(
        project / "evaluations" / EVALUATION,
        [item.model_copy(update={"key": key}) for item, key in zip(items, keys, strict=True)],
    )
    page = browser.get(f"/rows/{row.key}")
    history = unescape(page.partition('id="history"')[2].partition('id="nearest"')[0])
    for version in versions:
        assert version.numbers is not None
        assert (f"version {version.numbers.version}" in history) == (version != versions[0])
    assert f"seen-1: {'trained' if row.split == 'train' else row.split}" in history
    assert "unseen-2" not in history
    assert f'href="/report/{EVALUATION}"' in history
    assert "Replaces, with the same input" in history
    other = browser.get(f"/rows/{next(m.key for m in data.version().members if m.example.output == 'a model')}")
    assert "generated.jsonl, line 1 " in other and "No evaluation has measured on the row." in other
    # An item leads to the row whose reference it has, to correct it there.
    now, edited, gone = (browser.get(f"/evidence/{EVALUATION}/{number}") for number in (1, 2, 3))
    for page in (now, edited):
        assert f'Is the reference wrong? <a href="/rows/{row.key}#judge">' in page
    assert "edited since" in edited and "edited since" not in now
    assert "no longer in the dataset" in gone and "/rows/" not in gone.partition("<main")[2]


def test_row_shows_the_thinking_before_its_answer(browser: Browser, project: Path) -> None:
    (key,) = [m.key for m in library.open(project).data.version().members if m.example.has_reasoning]
    html = browser.get(f"/rows/{key}")
    shown = html[html.index('<dl class="conversation">') :]
    assert shown.index("<em>nobody &lt;signed&gt; it</em>") < shown.index("a model")


def test_rows_are_filtered_by_answer_verdict_and_flag_and_sorted_by_the_address(
    browser: Browser, project: Path
) -> None:
    data = library.open(project).data
    version, numbers = data.version(), data.numbers()
    judged, disputed = [m for m in version.domain if m.split == "train" and m.example.output != "an edited answer"][:2]
    said: list[tuple[str, Member, Verdict]] = [
        ("ada", judged, "wrong"),
        ("ada", disputed, "wrong"),
        ("ben", disputed, "right"),
    ]
    for name, member, verdict in said:
        review = data.review(name, options=ReviewOptions(conflicts=True))
        review.judge(review.item(member.key), verdict)
    try:
        wrong = browser.get("/rows?verdict=wrong&sort=newest")
        newest = sorted((judged, disputed), key=lambda m: -numbers[m.key])
        assert re.findall('href="/rows/([0-9a-f]{64})"', wrong) == [m.key for m in newest]
        assert (
            _keys(browser.get("/rows?verdict=disputed")) == _keys(browser.get("/rows?verdict=right")) == {disputed.key}
        )
        flagged = browser.get("/rows?flag=wrong")
        assert _keys(flagged) == {judged.key} and '<td class="words">wrong</td>' in flagged
        assert judged.key not in _keys(browser.get(f"/rows?verdict=none&q={judged.key}"))
        assert ", wrong." in browser.get(f"/rows/{judged.key}")
    finally:
        for name, member, _ in said:
            data.review(name, options=ReviewOptions(conflicts=True)).undo(member.key)
    assert _keys(browser.get("/rows?answer=a+model")) == {
        m.key for m in version.members if m.example.output == "a model"
    }
    by_answer = browser.get("/rows?sort=answer&split=test")
    shown = [
        next(m for m in version.members if m.key == key) for key in re.findall('href="/rows/([0-9a-f]{64})"', by_answer)
    ]
    assert shown == sorted(shown, key=lambda m: (m.example.output.casefold(), numbers[m.key]))


def test_search_finds_a_number_first(browser: Browser, project: Path) -> None:
    numbers = library.open(project).data.numbers()
    key = next(m.key for m in library.open(project).data.version().members if m.example.output == "a model")
    for typed in (str(numbers[key]), f"Row+{numbers[key]}", f"%23{numbers[key]}"):
        page = browser.get(f"/rows?q={typed}")
        assert re.findall('<a href="/rows/([0-9a-f]{64})">(.*?)</a> <small>(.*?)</small>', page)[0] == (
            key,
            f"Row {numbers[key]}",
            key[:12],
        )


def test_empty_result_says_which_filter_to_take_back(browser: Browser) -> None:
    page = browser.get("/rows?q=nothing-like-it&flag=generated&split=train&sort=newest")
    assert "No row matches all of these filters." in page
    (rest,) = re.findall('<a href="/rows\\?([^"]*)">Without Search “nothing-like-it”: 1 row</a>', page)
    assert len(_keys(browser.get(f"/rows?{unescape(rest)}"))) == 1
    assert "Without Flag" not in page
    assert "Unknown verdict &#39;good&#39;" in browser.client.get("/rows?verdict=good").text
