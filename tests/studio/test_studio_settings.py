"""The page Settings: what it writes, what it leaves alone, and what it asks about."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path

import httpx
import pytest

from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.studio_client import Browser
from tunewright.config import Config
from tunewright.config.io import load_config, with_keys
from tunewright.core.errors import UserError
from tunewright.studio.words import SETTINGS

pytest_plugins = ["studio_fixtures"]


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("settings") / "project", tiny_base_folder)
    write_jsonl(folder / "pairs.jsonl", pairs(120))
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


@pytest.fixture
def project(added: Path, tmp_path: Path) -> Path:
    """A project with rows, whose config has comments and a key that the form does not know."""
    shutil.copytree(added, tmp_path / "project")
    file = tmp_path / "project" / "tunewright.yaml"
    text = file.read_text()
    assert "gateway:" not in text
    file.write_text(text + "\n# of the team\ngateway:\n  max_n: 7  # no more\n")
    return tmp_path / "project"


def shown(html: str) -> dict[str, str]:
    """Return the fields of the form as a browser would send them unchanged."""
    hidden = re.findall('<input type="hidden" name="([^"]*)" value="([^"]*)"', html)
    inputs = re.findall('<input id="([^"]*)" name="[^"]*"[^>]* value="([^"]*)"', html)
    areas = re.findall(r'<textarea id="([^"]*)"[^>]*>\n(.*?)</textarea>', html, re.DOTALL)
    selects = re.findall(r'<select id="([^"]*)".*?</select>', html, re.DOTALL)
    fields = {name: unescape(value) for name, value in (*hidden, *inputs, *areas)}
    for name in selects:
        part = html.partition(f'<select id="{name}"')[2].partition("</select>")[0]
        chosen = re.search("<option selected>([^<]*)</option>", part)
        if chosen:
            fields[name] = unescape(chosen[1])
    return fields


def saved(browser: Browser, page: str | None = None, **typed: str) -> httpx.Response:
    """Change fields of the page, with _ for the dots of keys, and save."""
    fields = shown(page or browser.get("/settings"))
    keys = {key.replace(".", "_"): key for key in (*SETTINGS, "choices")}
    return browser.client.post("/settings", data=fields | {keys[name]: text for name, text in typed.items()})


def test_saved_settings_leave_comments_and_other_keys_byte_for_byte(browser: Browser, project: Path) -> None:
    file = project / "tunewright.yaml"
    before = file.read_text()
    answer = saved(browser, train_epochs="5", evaluate_margin="0.05", data_system_prompt="Say only:\nthe word")
    assert answer.status_code == 200 and "Set in tunewright.yaml:" in answer.text
    config = load_config(file)
    assert (config.train.epochs, config.evaluate.margin) == (5, 0.05)
    assert config.data.system_prompt == "Say only:\nthe word"
    left = [line for line in before.splitlines() if not re.search("epochs|margin|system_prompt", line)]
    after = file.read_text().splitlines()
    assert [line for line in after if line in left] == left
    assert "  max_n: 7  # no more" in after
    assert "No setting was changed" in saved(browser).text


def test_form_shows_each_key_with_its_documentation(browser: Browser) -> None:
    page = unescape(browser.get("/settings"))
    for key in SETTINGS:
        section, _, name = key.rpartition(".")
        model = Config.model_fields[section].annotation if section else Config
        about = model.model_fields[name].description  # type: ignore[union-attr]
        assert " ".join((about or "").split()).partition("`")[0] in page, key
        assert f'id="{key}"' in page


def test_allowed_answers_become_the_metric_choices(browser: Browser, project: Path) -> None:
    assert saved(browser, choices="granted\ndenied\n").status_code == 200
    assert load_config(project / "tunewright.yaml").evaluate.model_dump()["metric"] == {
        "choices": ("granted", "denied")
    }
    assert shown(browser.get("/settings"))["evaluate.metric"] == "choices"
    saved(browser, evaluate_metric="{exact_match: {ignore_case: true}}")
    metric = load_config(project / "tunewright.yaml").evaluate.model_dump()["metric"]
    assert metric["exact_match"]["ignore_case"] is True


def test_task_proposes_its_metric_and_saves_nothing(browser: Browser, project: Path) -> None:
    before = (project / "tunewright.yaml").read_bytes()
    fields = shown(browser.get("/settings")) | {"task": "calls", "action": "propose", "train.epochs": "9"}
    page = browser.client.post("/settings", data=fields)
    assert "The metric call_ast_match is filled in" in page.text
    kept = shown(page.text)
    assert (kept["evaluate.metric"], kept["train.epochs"]) == ("call_ast_match", "9")
    assert (project / "tunewright.yaml").read_bytes() == before
    assert saved(browser, page.text).status_code == 200
    assert load_config(project / "tunewright.yaml").evaluate.metric == "call_ast_match"


def test_wrong_values_are_named_beside_their_fields_and_what_was_typed_stays(browser: Browser, project: Path) -> None:
    before = (project / "tunewright.yaml").read_bytes()
    wrong = {"train_epochs": "many", "evaluate_margin": "3", "evaluate_metric": "{oops", "base_model": "/no/such/base"}
    answer = saved(browser, judge_model="a-model", **wrong)
    assert answer.status_code == 400
    html = unescape(answer.text)
    assert html.count('class="wrong"') == 4
    assert (
        "'/no/such/base' is neither a folder nor a hub id" in html.partition('for="base_model"')[2].partition("for=")[0]
    )
    assert "Not a name, nor options in braces" in html.partition('for="evaluate.metric"')[2].partition("for=")[0]
    marked = ["base_model", "train.epochs", "evaluate.metric", "evaluate.margin"]
    assert re.findall('<a href="#([^"]*)">', html.partition('role="alert"')[2].partition("</p>")[0]) == marked
    assert "got 'many'" in html.partition('for="train.epochs"')[2].partition("for=")[0]
    fields = shown(answer.text)
    assert (fields["train.epochs"], fields["judge.model"], fields["evaluate.metric"]) == ("many", "a-model", "{oops")
    assert (project / "tunewright.yaml").read_bytes() == before


def test_setting_that_an_editor_changed_meanwhile_is_a_question(browser: Browser, project: Path) -> None:
    file, page = project / "tunewright.yaml", browser.get("/settings")
    tunewright_before = load_config(file)
    file.write_text(with_keys(file.read_text(), file, {"train.epochs": 7, "evaluate.margin": 0.04}))
    asked = saved(browser, page, train_epochs="5")
    assert asked.status_code == 400 and "changed meanwhile" in asked.text
    assert 'In the file now: <span class="changes">7</span>' in asked.text
    assert shown(asked.text)["train.epochs"] == "5"
    assert load_config(file).train.epochs == 7 != tunewright_before.train.epochs
    saved(browser, asked.text)
    config = load_config(file)
    assert (config.train.epochs, config.evaluate.margin) == (5, 0.04)


def test_file_with_a_fault_is_one_message_with_its_line(browser: Browser, project: Path) -> None:
    file, page = project / "tunewright.yaml", browser.get("/settings")
    broken = file.read_text() + "serve: port: 5\n"
    file.write_text(broken)
    line = len(broken.splitlines())
    read = browser.client.get("/settings")
    assert read.status_code == 400 and f"tunewright.yaml:{line}" in read.text
    assert 'aria-label="Pages"' in read.text
    sent = saved(browser, page, train_epochs="5")
    assert sent.status_code == 400 and "Nothing was saved" in sent.text
    assert shown(sent.text)["train.epochs"] == "5"
    assert file.read_text() == broken


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("data:\n  system_prompt: |\n    a\n    b\n\ntrain: {epochs: 2}\n", {"data.system_prompt": "c"}, '"c'),
        ("{base_model: a, train: {epochs: 2}}\n", {"base_model": "b", "train.epochs": 4}, "{base_model: b"),
        ("name: x\r\n", {"base_model": "b"}, "name: x\r\nbase_model: b\r\n"),
        ("data: # none yet\n", {"data.sources": ["a.csv", {"path": "b.csv", "split": "test"}]}, "data: # none yet\n"),
    ],
)
def test_keys_are_set_in_every_spelling(text: str, values: dict[str, object], expected: str, tmp_path: Path) -> None:
    edited = with_keys(text, tmp_path / "tunewright.yaml", values)
    assert expected.strip('"') in edited
    assert with_keys(edited, tmp_path / "tunewright.yaml", values) == edited


def test_value_with_a_comment_inside_is_not_changed_in_place(tmp_path: Path) -> None:
    text = "data:\n  sources:\n    - a.csv  # from Ann\n    - b.csv\n"
    with pytest.raises(UserError, match=r"data\.sources is written in a way"):
        with_keys(text, tmp_path / "tunewright.yaml", {"data.sources": ["c.csv"]})
