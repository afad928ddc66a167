"""Releases, tenants and keys in the studio: the command line's checks, and secrets that are shown once."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

import httpx
import pytest
from states import reservation

import tunewright as library
from making.browser import AXE, EXECUTABLE, axe_faults, chromium, faults, show, signed_in, wait_for
from making.command_line import store_evidence, trained_project, tunewright
from making.evidence import make_evidence, make_items, with_contrast
from making.studio_client import PASSWORD, Browser, wait_until
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.core.text import visible
from tunewright.serving.gateway.server import serving
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import RequestUsage
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.records import NewRecord
from tunewright.serving.tenants.releases import Candidate, Grounds
from tunewright.studio import Studio
from tunewright.studio.jobs import Job, Jobs
from tunewright.studio.pages import HANDLERS

SHIPS = make_evidence(make_items())
FAILS = with_contrast(SHIPS, difference=-0.2, low=-0.3, high=-0.1, p_value=0.001)
GROUNDS = Grounds("ship", "0123456789ab")


class Visitor(Browser):
    """A browser that sends the forms of the pages it reads."""

    seen = ""
    """Headers and texts of all pages so far."""

    def get(self, path: str) -> str:
        """Return a page's text."""
        return self._text(self.client.get(path))

    def fill(self, page: str, action: str, /, **fields: str) -> httpx.Response:
        """Fill in a form of a page, and send it."""
        return self.client.post(action, data=self.hidden(page, action) | fields)

    def sent(self, page: str, action: str, /, **fields: str) -> str:
        """Send a form that is accepted, and return the next page's text."""
        return self._text(self.fill(page, action, **fields))

    def hidden(self, page: str, action: str) -> dict[str, str]:
        """Return the hidden fields of a page's form."""
        forms = re.findall('<form method="post" action="([^"]*)"(.*?)</form>', self.get(page), re.DOTALL)
        form = next(text for place, text in forms if unescape(place) == action)
        found = re.findall('<input type="hidden" name="([^"]*)" value="([^"]*)"', form)
        return {name: unescape(value) for name, value in found}

    def _text(self, answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        self.seen += f"{answer.headers} {answer.text}"
        return unescape(answer.text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter whose verdict is to ship, and a copy under another digest that failed."""
    folder = trained_project(tmp_path_factory.mktemp("studio-deploy") / "project", tiny_base_folder)
    (good,) = list_adapters(folder / "adapters")
    bad = Adapter(folder / "adapters" / "tiny-000000000bad")
    shutil.copytree(good.folder, bad.folder)
    lineage = json.loads((bad.folder / "lineage.json").read_text()) | {"digest": "bad0" * 16}
    (bad.folder / "lineage.json").write_text(json.dumps(lineage))
    store_evidence(folder, good, SHIPS, 1)
    store_evidence(folder, bad, FAILS, 2)
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("tunewright.yaml", "adapters", "dataset", "evaluations"):
        (folder / name).symlink_to(trained / name)
    return folder


@pytest.fixture
def browser(project: Path) -> Iterator[Visitor]:
    with (
        serving(Studio(project, "ada", password=PASSWORD).app()) as url,
        httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client,
    ):
        yield Visitor(client)


def _good(project: Path) -> Adapter:
    return next(each for each in list_adapters(project / "adapters") if not each.name.endswith("bad"))


def _state(project: Path, clock: Callable[[], float] | None = None) -> State:
    return State(f"sqlite:///{project}/serving/state.sqlite", "ann", clock)


def _jobs(project: Path) -> Jobs:
    return Jobs(project / ".tunewright" / "jobs", project)


def _ended(project: Path, page: httpx.Response) -> Job:
    """Wait for the job whose page this is."""
    assert page.status_code == 200, page.text
    job = _jobs(project).find(page.url.path.rpartition("/")[2])
    wait_until(lambda: job.state != "running")
    return job


def test_every_form_needs_its_sessions_token(browser: Visitor, project: Path) -> None:
    for (method, path), _handler in HANDLERS:
        if method == "POST":
            answer = browser.client.post(re.sub(r"\{\w+\}", "x", path), data={"alias": "x", "name": "x"})
            assert (answer.status_code, "earlier session" in answer.text) == (400, True), path
    assert not (project / "serving").exists()
    assert _jobs(project).all() == []


def test_reading_pages_creates_no_serving_state(browser: Visitor, project: Path) -> None:
    for path in ("/deploy", "/tenants", "/audit", "/audit?verify=1"):
        browser.get(path)
    for path in ("/deploy/courts", "/tenants/acme"):
        answer = browser.client.get(path)
        assert (answer.status_code, "no aliases and tenants yet" in answer.text) == (400, True), path
    assert not (project / "serving").exists()


def test_only_adapters_to_ship_are_offered_and_others_have_their_reason(browser: Visitor, project: Path) -> None:
    page = browser.get("/deploy")
    offered = re.findall(r'<option value="(tiny-\w+)"', page)
    assert offered == [_good(project).name]
    assert 'name="alias" value="tiny"' in page
    assert 'tunewright deploy ALIAS tiny-000000000bad --force --because "why"' in page
    assert "don't ship" in page


def test_changed_evidence_is_named_and_the_rest_of_the_page_is_there(browser: Visitor, project: Path) -> None:
    evaluations = project / "evaluations"
    real = evaluations.resolve()
    evaluations.unlink()
    shutil.copytree(real, evaluations)
    file = evaluations / f"{1:012x}" / "evidence.json"
    file.write_text(file.read_text() + " ")
    page = browser.get("/deploy")
    assert "No adapter can be released" in page and "evidence.json" in page
    assert "Start the server" in page and "<option" not in page


@pytest.mark.slow
def test_adapter_goes_live_by_a_form_and_its_release_is_the_command_lines(browser: Visitor, project: Path) -> None:
    good = _good(project)
    assert "No alias is live yet." in browser.get("/")
    job = _ended(project, browser.fill("/deploy", "/deploy", alias="courts", adapter=good.name, trial="all"))
    assert (job.state, job.exit_code) == ("done", 0), job.log.read_text()
    (release,) = library.open(project).releases("courts")
    assert (release.adapter, release.digest, release.grounds.verdict) == (good.name, good.digest, "ship")
    assert release.author == "ada", "the job records the name at the top right"
    assert release.grounds.isolation is not None and release.grounds.serving is not None
    page = browser.get("/deploy/courts")
    assert good.digest[:12] in page and "isolated on peft" in page and "passed on peft" in page
    assert f"/jobs/{job.id}" in browser.get("/deploy")
    assert '<a href="/deploy/courts">' in browser.get(f"/jobs/{job.id}")
    assert "Live: courts" in browser.get("/")


@pytest.mark.parametrize(
    "fields",
    [
        {"alias": "--force"},
        {"alias": "courts --untested x"},
        {"adapter": "--because"},
        {"adapter": "tiny"},
        {"trial": "canary", "share": "--force"},
        {"trial": "canary", "share": "200%"},
        {"trial": "forced"},
    ],
)
def test_texts_of_the_form_cannot_become_options(browser: Visitor, project: Path, fields: dict[str, str]) -> None:
    whole = {"alias": "courts", "adapter": _good(project).name, "trial": "all", "share": "10%"} | fields
    assert browser.fill("/deploy", "/deploy", **whole).status_code == 400
    port = browser.fill("/deploy", "/server", port="-1")
    assert port.status_code == 400 and 'id="wrong-port">Invalid port' in port.text and 'aria-label="Pages"' in port.text
    assert _jobs(project).all() == []


def test_trials_end_by_rollback_and_undeploy_needs_the_current_page(browser: Visitor, project: Path) -> None:
    good = _good(project)
    with _state(project) as state:
        state.releases.deploy("courts", good.name, good.digest, GROUNDS)
        state.releases.start_candidate("courts", Candidate("tiny-000000000bad", "bad0" * 16, 0.1), GROUNDS)
    page = browser.get("/deploy/courts")
    assert "on 10% of the traffic" in page and "Check and promote" in page
    old = browser.hidden("/deploy/courts", "/deploy/courts/undeploy")
    assert "release 3" in browser.sent("/deploy/courts", "/deploy/courts/rollback", to="")
    refused = browser.client.post("/deploy/courts/undeploy", data=old)
    assert refused.status_code == 400 and "has changed meanwhile" in refused.text
    untyped = browser.fill("/deploy/courts", "/deploy/courts/undeploy", because="mistyped")
    assert untyped.status_code == 400 and "Type courts to undeploy it" in untyped.text
    tried = {"alias": "courts", "adapter": good.name, "trial": "canary", "share": "25%"}
    same = browser.fill("/deploy", "/deploy", **tried)
    assert same.status_code == 400 and "is live on courts already" in same.text
    assert 'name="share" value="25%"' in same.text and 'value="canary" selected' in same.text
    ended = browser.sent("/deploy/courts", "/deploy/courts/undeploy", alias="courts", because="mistyped <b>")
    assert "answers nothing from release 4" in ended and "courts 4 was undeployed: mistyped <b>" in ended
    releases = library.open(project).releases()
    assert [each.action for each in releases] == ["deploy", "canary", "rollback", "undeploy"]
    assert [each.author for each in releases] == ["ann", "ann", "ada", "ada"]
    assert browser.fill("/deploy/courts", "/deploy/courts/rollback", to="--x").status_code == 400
    assert "answers with" in browser.sent("/deploy/courts", "/deploy/courts/rollback", to="1")
    assert "/rollback" not in browser.get("/deploy/courts"), "no earlier release answers otherwise"


def test_go_back_offers_only_adapters_that_can_answer_and_names_each(browser: Visitor, project: Path) -> None:
    good, bad = _good(project), "tiny-000000000bad"
    offered = '<option value="([^"]*)">([^<]*)</option>'
    with _state(project) as state:
        state.releases.deploy("laws", "gone", "90e" * 21 + "0", GROUNDS)
        state.releases.deploy("laws", good.name, good.digest, GROUNDS)
        state.releases.deploy("courts", good.name, good.digest, GROUNDS)
        state.releases.start_candidate("courts", Candidate(bad, "bad0" * 16, 0.1), GROUNDS)
    assert re.findall(offered, browser.get("/deploy/laws")) == [], "its earlier adapter is not in the project"
    assert re.findall(offered, browser.get("/deploy/courts")) == [("", f"only the live adapter: {good.name}")]
    with _state(project) as state:
        state.releases.promote("courts", GROUNDS)
    assert re.findall(offered, browser.get("/deploy/courts")) == [("", f"the previous adapter: {good.name}")]
    browser.sent("/deploy/courts", "/deploy/courts/rollback", to="")
    assert re.findall(offered, browser.get("/deploy/courts")) == [("3", f"release 3: {bad}")], "no adapter is before it"


def test_trial_needs_a_live_adapter_and_its_job_says_what_it_answers(browser: Visitor, project: Path) -> None:
    tried = {"alias": "courts", "adapter": _good(project).name, "no_system_prompt": "on"}
    for trial in ({"trial": "canary", "share": "25%"}, {"trial": "shadow"}):
        refused = browser.fill("/deploy", "/deploy", **tried, **trial)
        assert refused.status_code == 400 and 'id="wrong-trial">No adapter is live on courts yet' in refused.text
        assert (
            f'value="{trial["trial"]}" selected' in refused.text and 'name="no_system_prompt" checked' in refused.text
        )
    assert _jobs(project).all() == []
    said = {}
    for number, word in enumerate(("--canary=50%", "--shadow", "--constrain")):
        folder = project / ".tunewright" / "jobs" / f"{number:016x}"
        folder.mkdir(parents=True)
        command = ["deploy", "courts", "tiny", word]
        (folder / "job.json").write_text(json.dumps({"command": command, "started": "2026-01-01T00:00:00+00:00"}))
        (folder / "log").touch()
        (folder / "exit_code").write_text("0")
        said[word] = browser.get(f"/jobs/{folder.name}")
    assert "tiny on trial: it answers 50% of the requests, the live adapter the rest." in said["--canary=50%"]
    assert "tiny on trial: it gets a copy of each request" in said["--shadow"]
    assert "has the release." in said["--constrain"] and "on trial" not in said["--constrain"]


def test_port_in_use_is_refused_on_the_page(browser: Visitor, project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = browser.fill("/deploy", "/server", port=str(port))
    assert refused.status_code == 400
    assert f'id="wrong-port">Cannot listen on 127.0.0.1 port {port}: Address already in use</span>' in refused.text
    assert f'value="{port}"' in refused.text and "Choose another address or port" in refused.text
    assert _jobs(project).all() == []


def test_key_is_shown_once_and_in_no_later_page_log_or_cookie(browser: Visitor, project: Path) -> None:
    assert "Every request needs an API key now" in browser.sent(
        "/tenants", "/tenants", name="acme", aliases="courts, recipes"
    )
    before = browser.hidden("/tenants/acme", "/tenants/acme/keys")
    shown = browser.fill("/tenants/acme", "/tenants/acme/keys", aliases="courts", expires="90d")
    (secret,) = re.findall(r"tw_[0-9a-f]{10}_[\w-]{49}", shown.text)
    assert shown.headers["cache-control"] == "no-store"
    assert secret not in str(shown.url) and secret not in str(shown.headers) and not shown.history
    with _state(project) as state:
        assert state.keys.caller(secret).aliases == {"courts"}
    # The same form again, as a reload of the page sends it.
    again = browser.client.post("/tenants/acme/keys", data=before | {"aliases": "courts", "expires": "90d"})
    assert again.status_code == 400 and "No key was made" in again.text
    browser.seen = ""
    for path in ("/", "/deploy", "/tenants", "/tenants/acme", "/audit?verify=1", "/tenants/acme"):
        browser.get(path)
    assert secret[14:] not in browser.seen + str(dict(browser.client.cookies)) + again.text
    assert secret[:13] in browser.seen, "its prefix is listed"
    kept = [file for file in project.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
    assert kept == []


def test_tenant_forms_do_what_the_command_line_does(browser: Visitor, project: Path) -> None:
    browser.sent("/tenants", "/tenants", name="acme", aliases="courts", requests="60")
    before = browser.hidden("/tenants/acme", "/tenants/acme/aliases")
    changed = browser.sent("/tenants/acme", "/tenants/acme/aliases", aliases="recipes laws")
    assert "acme may call recipes, laws and no longer calls courts" in changed
    second_tab = browser.client.post("/tenants/acme/aliases", data=before | {"alias courts": "on"})
    assert second_tab.status_code == 400 and "changed meanwhile" in second_tab.text
    # A refusal stands in the form, with what was typed, and says what holds now.
    assert "changed meanwhile, to laws, recipes." in second_tab.text and "<h1>Tenant acme</h1>" in second_tab.text
    refused = browser.fill("/tenants/acme", "/tenants/acme/aliases", aliases="no/name", **{"alias laws": "on"})
    assert refused.status_code == 400 and 'name="aliases" autocomplete="off" value="no/name"' in refused.text
    assert re.findall('name="alias ([^"]*)" checked', refused.text) == ["laws"]
    stale = browser.hidden("/tenants/acme", "/tenants/acme/limits")
    browser.sent("/tenants/acme", "/tenants/acme/limits", requests="none", tokens="10000", concurrency="4")
    late = browser.client.post("/tenants/acme/limits", data=stale | {"requests": "1"})
    assert late.status_code == 400 and "changed meanwhile" in late.text
    assert "to requests none, tokens 10000, concurrency 4." in late.text
    refused = browser.fill("/tenants/acme", "/tenants/acme/limits", requests="-5", tokens="70")
    assert refused.status_code == 400 and 'id="wrong-requests">Invalid limit &#39;-5&#39;</span>' in refused.text
    assert (
        'name="requests" value="-5" aria-invalid="true"' in refused.text and 'name="tokens" value="70"' in refused.text
    )
    (acme,) = tunewright("tenant", "list", "-p", project, "--json").document["tenants"]
    assert (acme["aliases"], acme["limits"]) == (
        ["laws", "recipes"],
        {"requests_per_minute": None, "tokens_per_minute": 10000, "concurrency": 4},
    )
    refused = browser.fill("/tenants/acme", "/tenants/acme/keys", expires="soon")
    assert refused.status_code == 400 and "Invalid duration &#39;soon&#39;" in refused.text
    assert 'name="expires" autocomplete="off" value="soon"' in refused.text
    first = browser.fill("/tenants/acme", "/tenants/acme/keys")
    (prefix,) = set(re.findall(r"tw_[0-9a-f]{10}", first.text))
    second = browser.fill("/tenants/acme", f"/tenants/acme/keys/{prefix}/rotate", overlap="2h")
    (newer,) = set(re.findall(r"tw_[0-9a-f]{10}", second.text))
    refused = browser.fill("/tenants/acme", f"/tenants/acme/keys/{newer}/rotate", overlap="2 moons")
    assert refused.status_code == 400 and sorted(re.findall('name="overlap" value="([^"]*)"', refused.text)) == [
        "2 moons",
        "24h",
    ]
    assert refused.text.count('id="wrong-overlap"') == 1
    assert "is revoked" in browser.sent("/tenants/acme", f"/tenants/acme/keys/{newer}/revoke")
    keys = tunewright("tenant", "key", "list", "-p", project, "--json").document["keys"]
    assert {key["prefix"]: key["state"] for key in keys} == {prefix: "valid", newer: "revoked"}
    assert browser.fill("/tenants/acme", "/tenants/acme/disable", name="acm").status_code == 400
    browser.sent("/tenants/acme", "/tenants/acme/disable", name="acme")
    (acme,) = tunewright("tenant", "list", "-p", project, "--json").document["tenants"]
    assert (acme["aliases"], acme["keys"]) == ([], 0)
    audit = browser.get("/audit?verify=1")
    assert "all as written" in audit and "tenant.limit" in audit


def test_refused_tenant_keeps_the_form(browser: Visitor, project: Path) -> None:
    with _state(project) as state:
        state.releases.deploy("courts", _good(project).name, _good(project).digest, GROUNDS)
    typed = {"name": "acme", "aliases": "laws", "requests": "ten", "alias courts": "on"}
    refused = browser.fill("/tenants", "/tenants", **typed)
    assert refused.status_code == 400 and "<h1>Tenants</h1>" in refused.text
    for name in ("name", "aliases", "requests"):
        assert re.search(f'<input id="{name}"[^>]* value="{typed[name]}"', refused.text), name
    assert 'name="alias courts" checked' in refused.text
    assert 'id="wrong-requests">Invalid limit &#39;ten&#39;' in refused.text
    assert tunewright("tenant", "list", "-p", project, "--json").document["tenants"] == []


def test_live_aliases_are_ticked_for_tenants_and_keys(browser: Visitor, project: Path) -> None:
    good = _good(project)
    with _state(project) as state:
        for alias in ("courts", "laws", "old"):
            state.releases.deploy(alias, good.name, good.digest, GROUNDS)
        state.releases.undeploy("old")
    page = browser.get("/tenants")
    assert re.findall('name="alias ([^"]*)"', page) == ["courts", "laws"]
    browser.sent("/tenants", "/tenants", name="acme", **{"alias courts": "on", "aliases": "recipes"})
    page = browser.get("/tenants/acme")
    assert re.findall('name="alias ([^"]*)" checked', page) == ["courts", "recipes"]
    assert "recipes <span" in page and "nothing answers it now" in page and "laws <span" not in page
    ticked = {"alias courts": "on", "alias laws": "on"}
    browser.sent("/tenants/acme", "/tenants/acme/aliases", **ticked)
    with library.open(project).state() as state:
        assert state.tenants.get("acme").aliases == ("courts", "laws")
    shown = browser.fill("/tenants/acme", "/tenants/acme/keys", **{"alias laws": "on"})
    assert 'readonly autocomplete="off" value="laws"' in shown.text and 'value="courts"' not in shown.text
    with library.open(project).state() as state:
        (key,) = state.keys.list("acme")
    assert key.aliases == ("laws",)
    assert "Nothing was changed" in browser.sent("/tenants/acme", "/tenants/acme/aliases", **ticked)


def test_server_without_a_live_alias_says_that_it_refuses_every_request(browser: Visitor, project: Path) -> None:
    # Such a server prints no model below its address; the shell stands for its process.
    folder = project / ".tunewright" / "jobs" / f"{5:016x}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"command": ["serve"], "started": "2026-01-01T00:00:00+00:00"}))
    (folder / "log").write_text("Serving at http://127.0.0.1:1/v1\n\nCtrl-C stops the server.\n")
    with subprocess.Popen(["/bin/sh", "-c", "read line", str(folder)], stdin=subprocess.PIPE) as shell:
        (folder / "pid").write_text(str(shell.pid))
        assert "refuses every request" in browser.get(f"/jobs/{folder.name}")
        page = browser.get("/deploy")
        assert "refuses every request" in page and "curl" not in page
        shell.terminate()


def test_server_without_tenants_says_that_it_does_not_answer_aliases(browser: Visitor, project: Path) -> None:
    good, base = _good(project), library.open(project).folder.config.base_model
    with _state(project) as state:
        state.releases.deploy("courts", good.name, good.digest, GROUNDS)
    jobs = project / ".tunewright" / "jobs"
    for number, command in ((5, "serve"), (6, "deploy")):
        folder = jobs / f"{number:016x}"
        folder.mkdir(parents=True)
        record = {"command": [command, "courts"], "started": "2026-01-01T00:00:00+00:00"}
        (folder / "job.json").write_text(json.dumps(record))
        (folder / "log").write_text(
            f"Serving at http://127.0.0.1:1/v1\n  {base}\n  {good.name}\nCtrl-C stops the server.\n"
        )
    (folder / "exit_code").write_text("0")
    assert 'href="/tenants">Add a tenant</a>' in browser.get(f"/jobs/{6:016x}")
    server = jobs / f"{5:016x}"
    with subprocess.Popen(["/bin/sh", "-c", "read line", str(server)], stdin=subprocess.PIPE) as shell:
        (server / "pid").write_text(str(shell.pid))
        with _state(project) as state:
            state.tenants.add("acme", ["courts"])
        for path in ("/deploy", f"/jobs/{5:016x}", f"/jobs/{6:016x}"):
            page = browser.get(path)
            assert "without tenants, so a request names an adapter" in page and "API key from" not in page, path
        made = browser.sent("/tenants/acme", "/tenants/acme/keys")
        assert "127.0.0.1:1" not in made and "Base URL" not in made, "it takes no key"
        log = (server / "log").read_text().replace(f"  {base}\n  {good.name}", "  courts")
        (server / "log").write_text(log)
        assert "New releases apply within a second" in browser.get("/deploy")
        assert "The running server answers with it" in browser.get(f"/jobs/{6:016x}")
        shell.terminate()


@pytest.mark.slow
def test_server_runs_next_to_another_job_and_shows_how_to_ask_it(browser: Visitor, project: Path) -> None:
    sent = browser.fill("/deploy", "/server", port="0")
    server = _jobs(project).find(sent.url.path.rpartition("/")[2])
    wait_until(lambda: server.state != "running" or "Serving at" in server.log.read_text())
    page = browser.get(f"/jobs/{server.id}")
    (address,) = set(re.findall(r'value="(http://127\.0\.0\.1:\d+/v1)"', page))
    models = [each["id"] for each in httpx.get(f"{address}/models").json()["data"]]
    assert f'"model": "{models[-1]}"' in page and "Authorization" not in page
    other = _jobs(project).start("verdict", "0" * 11 + "1")
    wait_until(lambda: other.state != "running")
    assert other.state == "done", other.log.read_text()
    again = browser.client.post("/server", data=browser.hidden("/deploy", f"/jobs/{server.id}/stop") | {"port": "0"})
    assert again.status_code == 400 and "serve is running" in again.text
    browser.sent("/deploy", f"/jobs/{server.id}/stop")
    wait_until(lambda: server.state != "running")
    assert "Start the server" in browser.get("/deploy")


@pytest.mark.slow
def test_live_alias_answers_in_the_playground_and_its_thumb_is_the_tenants_feedback(
    browser: Visitor, project: Path
) -> None:
    good = _good(project)
    with _state(project) as state:
        state.releases.deploy("courts", good.name, good.digest, GROUNDS)
        state.tenants.add("acme", ["courts"])
        key = state.keys.create("acme").secret
    assert "courts" not in browser.get("/playground"), "no server answers for it"
    sent = browser.fill("/deploy", "/server", port="0")
    server = _jobs(project).find(sent.url.path.rpartition("/")[2])
    wait_until(lambda: server.state != "running" or "Ctrl-C stops the server" in server.log.read_text())
    question = {"question": "amber violet 2", "limit": "4", "temperature": "0", "model alias courts": "on"}
    refused = browser.fill("/playground", "/playground", **question)
    assert refused.status_code == 400 and 'id="wrong-api_key"' in refused.text and "amber violet 2" in refused.text
    wrong = browser.fill("/playground", "/playground", **question, api_key="tw_wrong")
    assert "Invalid API key" in browser.get(f"{wrong.url.path}/answers")

    asked = browser.fill("/playground", "/playground", **question, api_key=key)
    page = browser.get(f"{asked.url.path}/answers")
    with _state(project) as state:
        (request,) = state.usage.lines()
        assert (request.tenant, request.alias, request.end_user) == ("acme", "courts", "studio")
    (address,) = set(re.findall(r'value="(http://127\.0\.0\.1:\d+/v1)"', browser.get(f"/jobs/{server.id}")))
    body = {"model": "courts", "messages": [{"role": "user", "content": "amber violet 2"}], "max_tokens": 4}
    same = httpx.post(
        f"{address}/chat/completions", json=body | {"temperature": 0}, headers={"Authorization": f"Bearer {key}"}
    ).json()
    shown = re.search(r'aria-label="Answer"[^>]*>\n(.*?)</pre>', page, re.DOTALL)
    assert shown is not None and shown[1] == visible(same["choices"][0]["message"]["content"])
    used = same["usage"]
    assert used["completion_tokens"] == 1, "the adapter stops after a letter"
    assert f"{used['prompt_tokens']} prompt tokens, 1 answer token." in page
    assert good.digest[:12] in page

    action = f"{asked.url.path}/feedback"
    opinion = {"thumb": "down", "correction": "violet", "reason": "Mail me at ann.lee@courts-ohio.us"}
    said = browser.sent(asked.url.path, action, **opinion)
    assert "Recorded thumb down on the answer of courts" in said and ">\nviolet</textarea>" in said
    assert "Recorded thumb up" in browser.sent(asked.url.path, action, thumb="up", correction="", reason="")
    browser.sent(asked.url.path, action, **opinion)
    with _state(project) as state:
        (line,) = state.feedback.lines("acme")
    assert (line.thumb, line.correction, line.reason) == ("down", "violet", "Mail me at <EMAIL_1>")
    assert "Recorded: thumb down" in browser.get(asked.url.path)
    # The next turn needs no key, and the dataset takes the answer as any other.
    after = {"question": "and then", "after": asked.url.path.rpartition("/")[2], "limit": "4", "temperature": "0"}
    second = browser.fill(asked.url.path, "/playground", **after)
    assert "1 answer token." in browser.get(f"{second.url.path}/answers")
    assert "amber violet 2" in browser.get(f"{asked.url.path}/row?model=alias+courts")
    assert key not in browser.seen and key not in server.log.read_text()

    with _state(project) as state:
        state.records.forget("acme", KeyFile(project / "key"), response_id=line.response_id)
    gone = browser.fill(asked.url.path, action, **opinion | {"reason": "typed again"})
    assert gone.status_code == 400 and "does not exist" in gone.text and 'value="typed again"' in gone.text
    browser.sent("/deploy", f"/jobs/{server.id}/stop")
    wait_until(lambda: server.state != "running")
    assert "The server does not answer" in browser.fill(asked.url.path, action, **opinion).text
    assert "The live alias" not in browser.get("/playground")


@pytest.mark.slow
@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")
def test_pages_of_releases_and_tenants_fit_and_can_be_read(browser: Visitor, project: Path) -> None:
    good = _good(project)
    with _state(project) as state:
        made = state.releases.deploy("courts", good.name, good.digest, GROUNDS)
        made = state.releases.start_candidate("courts", Candidate("next" * 20, "c" * 64, None), GROUNDS)
        state.tenants.add("acme", ["courts"])
        caller = state.keys.caller(state.keys.create("acme")[0])
        number = state.quota.reserve(replace(reservation(caller, made), response_id="chatcmpl-1"), "g")
        state.quota.record_shadow(number, made.id, "verylongword" * 40, "another", None)
        state.quota.settle(number, RequestUsage(7, 3, 0.1, 0.2, 1.0, "stop"))
    with chromium() as chrome:
        page = signed_in(chrome, str(browser.client.base_url.join("/sign-in")), PASSWORD)
        for path in ("/deploy", "/deploy/courts", "/tenants", "/tenants/acme", "/audit?verify=1"):
            for width, dark in ((360, True), (1100, False)):
                show(page, path, width=width, dark=dark)
                page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
                assert faults(page) == [], path
                assert not AXE.exists() or axe_faults(page) == [], path
        show(page, "/tenants/acme", width=360)
        page.click("form[action$='/keys'] button")
        assert page.input_value("#secret").startswith("tw_")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click("[data-copy=secret]")
        wait_for(page.locator("[data-copy=secret]")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == page.input_value("#secret")
        assert faults(page) == []


def test_differing_answers_of_a_shadow_are_judged_blind_and_the_alias_shows_the_sequence(
    browser: Visitor, project: Path
) -> None:
    good, file = _good(project), KeyFile(project / "serving" / "record.key")
    with _state(project) as state:
        state.tenants.add("acme", ["courts"])
        state.records.start("acme", "DPA-17", 30, 1.0, file)
        key, _ = state.keys.create("acme")
        state.releases.deploy("courts", good.name, good.digest, GROUNDS)
        shadow = state.releases.start_candidate("courts", Candidate("tiny-000000000bad", "bad0" * 16, None), GROUNDS)
        caller = state.keys.caller(key)
        for place, answer in enumerate(("the same", "from the shadow", "from the shadow too")):
            number = state.quota.reserve(replace(reservation(caller, shadow), response_id=f"chatcmpl-{place}"), "g")
            state.quota.settle(number, RequestUsage(3, 4, 0.0, 0.1, 0.2, "stop"))
            request = {"messages": [{"role": "user", "content": f"case <{place}>"}]}
            body = file.keys("acme").encrypt({"path": "/v1/chat/completions", "request": request}, number)
            record = NewRecord(number, f"{place}" * 64, "request", None, 1.0, body)
            state.records.write([record], {})
            state.quota.record_shadow(number, shadow.id, "the same", answer, None)
    alias = browser.get("/deploy/courts")
    assert "2 wait for a verdict" in alias and "1 unit with 1 request" in alias
    page = browser.get("/deploy/courts/review")
    assert "0 of 2 pairs judged" in page and "case <1>" in page
    assert "tiny-000000000bad" not in page and good.name not in page and "write a note" not in page
    next_page = browser.sent("/deploy/courts/review", "/deploy/courts/review", action="both")
    assert "1 of 2 pairs judged" in next_page and "case <2>" in next_page
    waiting = browser.hidden("/deploy/courts/review", "/deploy/courts/review") | {"action": "A"}
    with _state(project) as state:
        state.records.forget("acme", file, response_id="chatcmpl-2")
    gone = browser.client.post("/deploy/courts/review", data=waiting, follow_redirects=True)
    assert "judged or deleted meanwhile" in gone.text and "No pair waits for your verdict" in gone.text
    assert "2 units with 2 requests" in browser.get("/deploy/courts")
