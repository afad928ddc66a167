"""The studio's pages over HTTP, without JavaScript: what they record, and whom they refuse."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest

import tunewright as library
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.human_evaluations import begin, evaluation
from making.studio_client import PASSWORD, Browser, opened, restarted, row_key, wait_until
from tunewright.core.errors import UserError
from tunewright.data.review.reviews import read_reviews
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio
from tunewright.studio.jobs import Jobs

pytest_plugins = ["studio_fixtures"]

EVALUATION = f"{7:012x}"
HOSTILE = '<script>alert(1)</script> "><svg onload=alert(2)> \u202eright to left'


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("studio") / "project", tiny_base_folder)
    write_jsonl(folder / "pairs.jsonl", [*pairs(120), {"prompt": HOSTILE, "completion": "hostile"}])
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


@pytest.fixture
def project(added: Path, tmp_path: Path) -> Path:
    """A project with rows and an evaluation, and nothing reviewed."""
    shutil.copytree(added, tmp_path / "project")
    evaluation(tmp_path / "project" / "evaluations" / EVALUATION, count=12)
    return tmp_path / "project"


def test_every_page_needs_a_session(url: str) -> None:
    for path in ("/", "/data", "/rows", "/review", f"/compare/{EVALUATION}", f"/report/{EVALUATION}", "/jobs/x"):
        refused = httpx.get(f"{url}{path}", headers={"Cookie": "tunewright_studio=guessed"})
        assert (refused.status_code, refused.headers["location"]) == (303, f"/sign-in?{urlencode({'back': path})}"), (
            path
        )
    assert httpx.get(f"{url}/jobs/{'0' * 16}/events").status_code == 403
    assert httpx.post(f"{url}/review", data={"action": "right"}).status_code == 403
    wrong = httpx.post(f"{url}/sign-in", data={"secret": "a wrong password"})
    assert wrong.status_code == 403
    assert "set-cookie" not in wrong.headers


def test_forms_of_other_sites_and_earlier_sessions_are_refused(browser: Browser, project: Path) -> None:
    page = browser.get("/review")
    log = (project / "dataset" / "reviews.jsonl").read_text()
    form = {"action": "right", "key": row_key(page)}
    without = browser.client.post("/review", data=form)
    other = browser.client.post("/review", data={**form, "form_token": "0" * 32})
    token = re.search('name="form_token" value="([^"]*)"', page)
    assert token is not None
    foreign = browser.client.post(
        "/review", data={**form, "form_token": token[1]}, headers={"Origin": "https://attacker.example"}
    )
    assert [each.status_code for each in (without, other, foreign)] == [400, 400, 400]
    assert "earlier session" in without.text and "another site" in foreign.text
    assert (project / "dataset" / "reviews.jsonl").read_text() == log


def test_cookie_and_headers_keep_other_sites_out(url: str, browser: Browser) -> None:
    cookie = httpx.post(f"{url}/sign-in", data={"secret": PASSWORD}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    answer = browser.client.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    # A name of somebody else that was made to point at this address.
    assert browser.client.get("/", headers={"Host": "attacker.example"}).status_code == 400


def test_studio_on_an_open_address_needs_a_password(project: Path) -> None:
    with pytest.raises(UserError, match="without a password"):
        Studio(project, "ada").run("0.0.0.0", 0, print)
    refused = tunewright("studio", "-p", project, "--host", "0.0.0.0", "--no-browser")
    assert refused.code == 2 and "--password-file" in refused.stderr
    (project / "short").write_text("short\n")
    refused = tunewright("studio", "-p", project, "--password-file", project / "short")
    assert refused.code == 2 and "5 characters (at least 12)" in refused.stderr


def test_verdicts_are_those_of_the_command_line(browser: Browser, project: Path) -> None:
    first = row_key(browser.get("/review"))
    assert "0 of 1 wrong" in browser.judge("right")
    second = row_key(browser.get("/review"))
    assert second != first
    assert "1 of 2 wrong" in browser.judge("edit", output="another answer", new_label="another answer")
    assert "The answer is empty" in browser.judge("edit", output=" ")
    review = library.open(project).data.review("ada")
    current = {key: review.log.current_verdicts(key)["ada"] for key in (first, second)}
    assert [current[key].verdict for key in (first, second)] == ["right", "edit"]
    assert current[second].output == "another answer"
    ahead = review.next()
    assert ahead is not None and ahead.member.key == row_key(browser.get("/review"))
    status = tunewright("data", "review", "--status", "-p", project, "--json").document
    assert status["outcome"]["checked"] == 2


def test_name_lasts_over_a_restart_and_signs_every_write(project: Path) -> None:
    with restarted(project) as browser:
        browser.send("/reviewer", "/review", reviewer="Zoë  Łuk")
        browser.judge("right")
        kept = browser.client.cookies
    studio = Studio(project, "root", password=PASSWORD)
    with (
        serving(studio.app()) as url,
        httpx.Client(base_url=url, cookies=kept, follow_redirects=True, timeout=60) as client,
    ):
        again = Browser(client)
        assert "Reviewer: Zoë Łuk" in again.get("/review")
        again.judge("edit", output="another answer", new_label="another answer")
        again.send("/review/apply", "/review")
        again.send("/tenants", "/tenants", name="acme", alias="courts")
        opened_now = library.open(project)
        assert {name for row in read_reviews(project / "dataset").stacks.values() for name in row} == {"Zoë Łuk"}
        assert opened_now.data.log()[-1].author == "Zoë Łuk"
        with opened_now.state() as state:
            assert {line.actor for line in state.audit.lines()} == {"Zoë Łuk"}
        with opened(url) as other:
            assert "Reviewer: root" in other.get("/review"), "the name is the browser's"


def test_sign_in_asks_for_the_name_and_leads_back_to_the_page(url: str) -> None:
    with httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client:
        page = client.get("/rows?split=dev&q=a%2Fb")
        assert page.url.path == "/sign-in" and re.search('name="reviewer" [^>]* required', page.text)
        back = re.search('name="back" value="([^"]*)"', page.text)
        assert back is not None
        form = {"secret": "wrong", "reviewer": "bo", "back": unescape(back[1])}
        assert back[0] in client.post("/sign-in", data=form).text, "also after a wrong password"
        there = client.post("/sign-in", data=form | {"secret": PASSWORD})
        assert str(there.url) == f"{url}/rows?split=dev&q=a%2Fb" and "Reviewer: bo" in there.text
    for back_to in ("//evil.example/x", "https://evil.example", "/\\evil.example", "\t//evil.example"):
        answer = httpx.post(f"{url}/sign-in", data={"secret": PASSWORD, "back": back_to})
        assert answer.headers["location"].startswith("/") and "//evil" not in answer.headers["location"][:3]
    for name, why in (("\u202e", "not printable"), ("x" * 300, "too long"), ("a\x00b", "not printable")):
        refused = httpx.post(f"{url}/sign-in", data={"secret": PASSWORD, "reviewer": name, "back": "/rows"})
        assert refused.status_code == 400 and "set-cookie" not in refused.headers
        assert (
            f"name is {why}. Type at most 200 letters." in refused.text and 'name="back" value="/rows"' in refused.text
        )
        assert "x" * 300 in refused.text or why != "too long"
    forged = httpx.post(f"{url}/sign-in", data={"secret": PASSWORD}, headers={"Cookie": "tunewright_reviewer=%0A%00"})
    assert forged.status_code == 303, "a cookie of another program"
    ended = httpx.post(f"{url}/review", data={"note": "x"}, headers={"Referer": f"{url}/review/suspects?adapter=base"})
    assert 'name="back" value="/review/suspects?adapter=base"' in ended.text


def test_edits_become_a_version(browser: Browser, project: Path) -> None:
    before = library.open(project).data.version().digest
    browser.judge("right")
    browser.judge("edit", output="another answer", new_label="another answer")
    needed = library.open(project).data.review("ada").needed
    assert "2 judgements of the random sample carry over to the new version" in browser.get("/review/edits")
    made = browser.send("/review/apply", "/review", message="from the studio")
    now = library.open(project).data.version()
    assert now.manifest.numbers is not None and now.digest != before
    assert f"Made version {now.manifest.numbers.version}: " in unescape(made.text)
    assert "another answer" in {member.example.output for member in now.members}
    assert f"At least {needed} rows of the sample need a look" in made.text
    assert "2 judgements of the sample carry over" in made.text and "1 row edited after that still counts" in made.text
    assert f"At least {needed} more until the verdict" in browser.get("/review")
    assert now.manifest.message == "1 answer edited in review (ada): from the studio"


def test_blind_comparison_hides_the_arms_and_the_estimate_until_it_is_complete(browser: Browser, project: Path) -> None:
    path = f"/compare/{EVALUATION}"
    asked = 0
    while 'name="key"' in (html := browser.get(path)):
        assert not re.search("retrieved|zero-shot|tuned|Win rate|prefer", html)
        if asked == 0:
            assert "Reference</h2>" not in html
            assert "Reference</h2>" in browser.send(path, path, action="reference").text
            assert "why not" in browser.send(path, path, action="note", note="why not").text
            browser.send(path, path, action="A")
            assert "Taken back: " in browser.send(path, path, action="undo").text
        browser.send(path, path, action="A")
        asked += 1
    assert "prefer" in html
    journal = begin(project / "evaluations" / EVALUATION).log
    assert len(journal.standing) == asked > 3
    assert {said.verdict for said in journal.standing.values()} == {"A"}
    assert list(journal.notes.values()) == [{"ada": "why not"}]
    shown = tunewright("human-eval", EVALUATION, "--results", "-p", project, "--json")
    assert shown.document["answered"] == asked


def test_hostile_row_is_text_on_every_page(browser: Browser) -> None:
    rows = browser.get("/rows?q=svg")
    (key,) = set(re.findall('href="/rows/([0-9a-f]{64})"', rows))
    for html in (rows, browser.get(f"/rows/{key}"), browser.get("/rows?q=%3Cscript%3Ealert(1)")):
        assert "<script>alert" not in html and "<svg onload" not in html
        assert "\u202e" not in html, "a control character turns the rest of the line around"
        assert "&lt;script&gt;alert(1)" in html


def test_rows_are_searched_filtered_and_paged(browser: Browser, project: Path) -> None:
    version = library.open(project).data.version()
    assert "121 rows, page 1 of 3" in browser.get("/rows")
    assert "page 3 of 3" in browser.get("/rows?page=99")
    assert f"{len(version.examples('dev'))} rows, page 1 of 1" in browser.get("/rows?split=dev")
    wanted = [m for m in version.members if "teal" in m.example.input_text and "navy" in m.example.input_text]
    found = browser.get("/rows?q=Navy+teal")
    assert set(re.findall('href="/rows/([0-9a-f]{64})"', found)) == {m.key for m in wanted}


def test_uploaded_file_is_checked_and_added(browser: Browser, project: Path) -> None:
    rows = [*pairs(20, seed=5), {"prompt": "no answer"}]
    checked = browser.upload("more.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert "cannot be added like this" in checked.text and '<th scope="row">21</th>' in checked.text
    assert 'tick "Leave faulty rows out" below' in unescape(checked.text) and "--skip-bad" not in checked.text
    assert "Add the file" in browser.get("/data/check?file=more.jsonl&skip_bad=on")
    before = len(library.open(project).data.version().members)
    done = browser.send("/data/add", "/data/check?file=more.jsonl&skip_bad=on", skip_bad="on", message="20 more")
    assert "is new" in done.text
    now = library.open(project).data.version()
    assert (len(now.members), now.manifest.message) == (before + 20, "20 more")
    assert browser.upload("more.jsonl", b"{}\n").status_code == 400, "another file of this name is not replaced"
    assert browser.upload("../escape.jsonl", b"{}\n").url.params["file"] == "escape.jsonl"
    assert browser.upload("binary.xlsx", bytes(range(256))).status_code == 200
    assert "binary.xlsx" in browser.get("/data/check?file=binary.xlsx")
    assert browser.client.get("/data/check?file=../tunewright.yaml").status_code == 400


def test_project_page_names_the_next_step(browser: Browser, project: Path) -> None:
    page = browser.get("/")
    assert "Not reviewed" in page and "tunewright train" in page
    assert "Compare blind" in page
    assert page.count('class="tag">next') == 1
    assert "Can’t tell: " in page and "Measure on all rows" in page
    (project / "tunewright.yaml").write_text("name: [")
    refused = browser.client.get("/")
    assert refused.status_code == 400 and "tunewright.yaml" in refused.text and "Traceback" not in refused.text


def test_large_form_is_refused(browser: Browser) -> None:
    refused = browser.client.post("/review", data={"output": "x" * 1_100_000})
    assert refused.status_code == 400 and "larger than 1,000,000 bytes" in refused.text


@pytest.mark.slow
def test_job_runs_and_its_log_is_kept(browser: Browser, project: Path) -> None:
    """`advise` fails at once without a base; its message is in the log, and its state survives the studio."""
    config = project / "tunewright.yaml"
    config.write_text(re.sub("base_model: .*", f"base_model: {project}/nowhere", config.read_text()))
    page = browser.send("/jobs", "/", command="advise")
    (job,) = Jobs(project / ".tunewright" / "jobs", project).all()
    assert page.url.path == f"/jobs/{job.id}"
    with browser.client.stream("GET", f"/jobs/{job.id}/events") as events:
        text = "".join(events.iter_text())
    assert "nowhere" in text and text.rstrip().endswith("data: failed")
    assert "data: Error: " in text and '"level"' not in text, "the page has the log as text"
    assert (job.state, job.exit_code) == ("failed", 2)
    assert "failed" in browser.get("/")
    assert browser.send("/jobs", "/", command="rm -rf").status_code == 400


@pytest.mark.slow
def test_stopped_training_is_resumed_by_the_same_button_after_a_restart(project: Path) -> None:
    """The studio is gone when the job is stopped in the second one: jobs are processes of their own."""
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 60"))
    jobs = Jobs(project / ".tunewright" / "jobs", project)
    with restarted(project) as browser:
        browser.send("/jobs", "/", command="train")
        assert "train is running" in unescape(browser.send("/jobs", "/", command="train").text)
    (job,) = jobs.all()
    wait_until(lambda: "step" in job.log.read_text())
    assert job.state == "running"
    with restarted(project) as browser:
        (run,) = library.open(project).runs.list()
        wait_until(lambda: library.open(project).runs.find(run.name).history)
        assert 'id="live"' in browser.get(f"/train/runs/{run.name}")
        browser.send(f"/jobs/{job.id}/stop", f"/jobs/{job.id}")
        wait_until(lambda: job.state != "running")
        assert (job.state, job.exit_code) == ("stopped", 130)
        assert "Start it again, which resumes" in browser.get(f"/jobs/{job.id}")
        assert not list(library.open(project).folder.adapters.glob("tiny-*"))
        stopped = library.open(project).runs.find(run.name)
        assert stopped.state == "stopped" and stopped.history
        page = browser.get(f"/train/runs/{run.name}")
        assert "resumes from its last checkpoint" in page and "Memory, GiB by step" in page
        assert not stopped.evaluations or page.count("<dt>Reference</dt>") == 5
        browser.send("/train", f"/train/runs/{run.name}", kind="train")
        again = jobs.all()[0]
        wait_until(lambda: again.state != "running")
        assert 'href="/evaluate">Evaluate the adapter</a>' in browser.get(f"/jobs/{again.id}")
        adapter = library.open(project).runs.find(run.name)
        assert adapter.state == "finished"
        assert adapter.history[: len(stopped.history)] == stopped.history
        steps = [row["step"] for row in adapter.history if "loss" in row]
        assert steps == list(range(1, len(steps) + 1)) and len(adapter.history) > len(stopped.history)
        assert browser.client.get(f"/train/runs/{run.name}").url.path == f"/train/runs/{adapter.name}"
    assert again.state == "done", again.log.read_text()
    assert "Resuming from step" in again.log.read_text()
    assert len(list(library.open(project).folder.adapters.glob("tiny-*"))) == 1
