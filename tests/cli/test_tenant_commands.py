"""Tenants, releases and audit through the command line."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from states import DIGESTS, raw, reservation, with_tenant
from states import SHIP as SHIPPED

from making.command_line import (
    Ran,
    document,
    interrupted,
    served,
    store_evidence,
    trained_project,
    tunewright,
    without_state,
)
from making.evidence import make_evidence, make_items, make_opening, with_contrast
from tunewright import open as open_project
from tunewright.adapters.registry import Adapter, find_adapter, list_adapters
from tunewright.evaluation.access_log import ACCESS_LOG, AccessLog
from tunewright.evidence.logged_access import LogLine
from tunewright.generation.constraints import Grammar
from tunewright.serving.options import ServeOptions
from tunewright.serving.tenants import State
from tunewright.serving.tenants.feedback import FeedbackValues
from tunewright.serving.tenants.quota import RequestUsage
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.records import NewRecord
from tunewright.serving.tenants.releases import Candidate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with two trained adapters."""
    folder = trained_project(tmp_path_factory.mktemp("tenants") / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 1"))
    assert tunewright("train", "-p", folder).code == 0
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return without_state(trained, tmp_path / "project")


def _adapters(project: Path) -> list[Adapter]:
    return list_adapters(project / "adapters")


ASKED: Any = [{"role": "user", "content": "red teal navy 7"}]
FORCE = ("--force", "--because", "it is urgent")
SHIPS = make_evidence(make_items())
FAILS = with_contrast(SHIPS, difference=-0.2, low=-0.3, high=-0.1, p_value=0.001)
OPEN = with_contrast(SHIPS, difference=0.02, low=-0.1, high=0.1, p_value=0.6)


def _run(project: Path, *arguments: str) -> Ran:
    return tunewright(*arguments, "-p", project)


def test_tenant_commands_manage_limits_and_keys(project: Path) -> None:
    made = document(project, "tenant", "add", "acme", "--alias", "courts", "--requests", "60")
    assert made["limits"] == {"requests_per_minute": 60, "tokens_per_minute": None, "concurrency": None}
    changed = document(project, "tenant", "limit", "acme", "--tokens", "10000", "--requests", "none")
    assert changed["limits"] == {"requests_per_minute": None, "tokens_per_minute": 10000, "concurrency": None}
    assert document(project, "tenant", "limit", "acme") == changed
    assert document(project, "tenant", "grant", "acme", "recipes")["aliases"] == ["courts", "recipes"]
    assert document(project, "tenant", "revoke", "acme", "recipes")["aliases"] == ["courts"]

    key = document(project, "tenant", "key", "add", "acme", "--expires", "30d", "--alias", "courts")
    assert key["key"].startswith(key["prefix"])
    listed = _run(project, "tenant", "key", "list", "acme", "--json")
    assert key["key"] not in listed.stdout
    assert listed.document["keys"][0]["aliases"] == ["courts"]
    rotated = document(project, "tenant", "key", "rotate", key["prefix"], "--overlap", "2h")
    assert rotated["aliases"] == ["courts"]
    assert document(project, "tenant", "key", "revoke", rotated["prefix"])["state"] == "revoked"
    states = {k["prefix"]: k["state"] for k in document(project, "tenant", "key", "list")["keys"]}
    assert states == {key["prefix"]: "valid", rotated["prefix"]: "revoked"}
    ended = document(project, "tenant", "disable", "acme")
    assert (ended["aliases"], ended["keys"]) == ([], 0)
    assert [t["name"] for t in document(project, "tenant", "list")["tenants"]] == ["acme"]
    assert [line["action"] for line in document(project, "audit", "show")["lines"]] == [
        "tenant.add",
        "tenant.limit",
        "tenant.grant",
        "tenant.revoke",
        "key.add",
        "key.rotate",
        "key.revoke",
        "key.revoke",
        "tenant.revoke",
    ]


def test_new_key_is_alone_on_stdout_and_nowhere_else(project: Path) -> None:
    _run(project, "tenant", "add", "acme", "--alias", "courts")
    key = _run(project, "tenant", "key", "add", "acme")
    assert re.fullmatch(r"tw_[0-9a-f]{10}_\S{49}\n", key.stdout)
    assert key.stdout.strip() not in key.stderr
    for command in (["tenant", "list"], ["tenant", "key", "list"], ["audit", "show"]):
        ran = _run(project, *command)
        assert (ran.code, "acme" in ran.stdout, key.stdout.strip() in ran.stdout, ran.stderr) == (0, True, False, "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tenant", "list", "--database-url", "mysql://x/y"], "Unsupported database"),
        (["serve", "--database-url", "sqlite:///no/such.sqlite"], "There is no serving state"),
        (["audit", "verify", "--noted", ""], "Invalid digest ''"),
        (["promote", "courts"], "no alias 'courts'"),
        (["undeploy", "courts", "--because", " "], "--because"),
        (["deploy", "courts", "nowhere"], "No adapter is named 'nowhere'"),
    ],
)
def test_tenant_commands_name_what_does_not_exist(project: Path, arguments: list[str], named: str) -> None:
    ran = _run(project, *arguments)
    assert (ran.code, named in ran.stderr + ran.stdout) == (2, True)
    assert not Path("no").exists()
    assert not list((project / "serving").glob("*.sqlite")) or not document(project, "audit", "show")["lines"]


def test_deploy_refuses_an_adapter_without_a_ship_verdict(project: Path) -> None:
    first, second = _adapters(project)
    store_evidence(project, first, SHIPS.model_copy(update={"split": "dev"}), 4)
    ran = _run(project, "deploy", "courts", first.name)
    assert (ran.code, "has no verdict on the test split" in ran.stderr) == (2, True)
    store_evidence(project, first, FAILS)
    ran = _run(project, "deploy", "courts", first.name)
    assert (ran.code, "courts is unchanged" in ran.stdout) == (3, True)
    store_evidence(project, first, OPEN, 2)  # the newest evaluation decides
    assert _run(project, "deploy", "courts", first.name).code == 4
    assert "Nothing has been released" in _run(project, "releases").stdout
    store_evidence(project, second, SHIPS, 3)
    assert _run(project, "deploy", "courts", first.name).code == 4, "evidence on another adapter"
    done = document(project, "deploy", "courts", second.name)
    assert (done["release"]["adapter"], done["verdict"]["decision"]) == (second.name, "ship")
    grounds = done["release"]["grounds"]
    assert (grounds["verdict"], grounds["evaluation"], grounds["because"]) == ("ship", f"{3:012x}", None)


@pytest.mark.slow
def test_deploy_force_stores_the_reason(project: Path) -> None:
    first, second = _adapters(project)
    store_evidence(project, first, FAILS)
    forced = document(project, "deploy", "courts", first.name, "--force", "--because", "the client insists")
    assert forced["release"]["grounds"]["verdict"] == "don't ship"
    document(project, "deploy", "courts", second.name, "--force", "--because", "never evaluated")
    history = document(project, "releases", "courts")["releases"]
    assert [release["grounds"]["because"] for release in history] == ["the client insists", "never evaluated"]
    reported = _run(project, "releases").stdout
    assert "courts 1 was forced: the client insists" in reported
    assert "courts 2 was forced: never evaluated" in reported
    assert "the client insists" in document(project, "audit", "show")["lines"][0]["details"]
    assert document(project, "audit", "verify")["ok"]


@pytest.mark.slow
def test_deploy_constrain_requires_evidence_with_the_same_constraint(project: Path) -> None:
    first, second = _adapters(project)
    config = project / "tunewright.yaml"
    text = config.read_text()
    config.unlink()
    config.write_text(text)
    store_evidence(project, first, SHIPS)
    command = ["deploy", "courts", first.name, "--constrain"]
    ran = _run(project, *command)
    assert (ran.code, "The config has no constraint" in ran.stderr) == (2, True)
    choices = 'evaluate:\n  structured_outputs: {choices: ["red", "blue"]}\n'
    config.write_text(text.replace("evaluate:\n", choices))
    ran = _run(project, *command)
    assert (ran.code, "has no evidence with constrained answers" in ran.stderr) == (2, True)
    assert f"tunewright evaluate {first.name}" in ran.stderr

    arm = next(arm for arm in SHIPS.arms if arm.name == "tuned")
    arms = [*SHIPS.arms, arm.model_copy(update={"name": "tuned+constrained", "constrained": True})]
    grammar = Grammar.choices(["red", "blue"])
    constrained = SHIPS.model_copy(update={"arms": arms, "lineage": SHIPS.lineage | {"grammar": grammar.digest}})
    store_evidence(project, first, constrained, 2)
    release = document(project, *command)["release"]
    assert (release["grammar"], release["grounds"]["evaluation"]) == (grammar.rule, f"{2:012x}")
    assert "constrained" in _run(project, "releases").stdout

    config.write_text(text.replace("evaluate:\n", choices.replace("blue", "green")))
    ran = _run(project, *command)
    assert (ran.code, "was evaluated with another constraint" in ran.stderr) == (2, True)
    forced = _run(project, "deploy", "courts", second.name, "--constrain", "--canary", "10%", *FORCE, "--json")
    assert forced.document["release"]["candidate"]["grammar"] == Grammar.choices(["red", "green"]).rule
    assert "The release constrains its answers all the same" in forced.stderr
    assert document(project, "promote", "courts")["release"]["grammar"] == Grammar.choices(["red", "green"]).rule
    assert document(project, "rollback", "courts")["grammar"] == grammar.rule
    assert document(project, "audit", "verify")["ok"]


def test_serve_constrain_constrains_adapters_and_warns_of_missing_evidence(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tunewright")
    first, second = _adapters(project)
    config = project / "tunewright.yaml"
    text = config.read_text()
    config.unlink()
    config.write_text(text.replace("evaluate:\n", 'evaluate:\n  structured_outputs: {choices: ["red", "blue"]}\n'))
    arm = next(arm for arm in SHIPS.arms if arm.name == "tuned")
    arms = [*SHIPS.arms, arm.model_copy(update={"name": "tuned+constrained", "constrained": True})]
    lineage = SHIPS.lineage | {"grammar": Grammar.choices(["red", "blue"]).digest}
    store_evidence(project, first, SHIPS.model_copy(update={"arms": arms, "lineage": lineage}))
    service = open_project(project).serve(options=ServeOptions(port=0, constrain=True))
    assert f"{second.name} has no evidence with constrained answers. Its answers are constrained all" in caplog.text
    assert f"{first.name} has no evidence" not in caplog.text
    base = open_project(project).folder.config.base_model
    answers = {}
    with service.running() as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for model in (base, first.name, second.name):
            asked = {"model": model, "messages": [{"role": "user", "content": "?"}], "max_tokens": 9}
            answers[model] = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert {answers[first.name], answers[second.name]} <= {"red", "blue"}
    assert answers[base] not in {"red", "blue"}
    for name in (first.name, second.name):
        assert f"{name}: requests that set no form get constrained answers" in caplog.text


def _evidence_file(project: Path, number: int = 1) -> Path:
    return project / "evaluations" / f"{number:012x}" / "evidence.json"


def _require_refusal(project: Path, command: list[str], file: Path, what: str) -> None:
    """The command names the file, changes nothing, and the history has no new release."""
    before = document(project, "releases")
    ran = _run(project, *command, "--json")
    error = ran.document["error"]
    assert (ran.code, error["where"]) == (2, str(file)), command
    assert what in error["what"]
    assert "Restore" in error["fix"]
    assert document(project, "releases") == before


@pytest.mark.parametrize(
    "edit",
    [
        lambda evidence: {**evidence, "contrasts": json.loads(SHIPS.model_dump_json())["contrasts"]},
        lambda evidence: {**evidence, "lineage": {**evidence["lineage"], "adapter": {"digest": "0" * 64}}},
        lambda evidence: {**evidence, "lineage": {**evidence["lineage"], "created": "2026-11-01T00:00:00+00:00"}},
        lambda evidence: {**evidence, "split": "dev"},
        lambda _evidence: {},
    ],
)
def test_deploy_refuses_evidence_that_was_edited(project: Path, edit: Any) -> None:
    """Also where the edit makes an older evaluation the newest one of the adapter."""
    first, _ = _adapters(project)
    store_evidence(project, first, SHIPS, 1)
    store_evidence(project, first, FAILS, 2)
    assert _run(project, "deploy", "courts", first.name).code == 3
    file = _evidence_file(project, 2)
    whole = file.read_text()
    file.write_text(json.dumps(edit(json.loads(whole))))
    force = ["--force", "--because", "it is urgent"]
    for command in (["deploy", "courts", first.name], ["deploy", "courts", first.name, *force], ["verdict"]):
        _require_refusal(project, command, file, "was changed after it was written")
    file.write_text(whole)
    assert _run(project, "deploy", "courts", first.name).code == 3


@pytest.mark.slow
def test_deploy_refuses_evidence_without_a_line(project: Path) -> None:
    first, _ = _adapters(project)
    store_evidence(project, first, SHIPS)
    log = project / "evaluations" / ACCESS_LOG
    whole = log.read_text()
    log.write_text("")
    _require_refusal(project, ["deploy", "courts", first.name], _evidence_file(project), "has no line in")
    log.unlink()
    _require_refusal(project, ["deploy", "courts", first.name], _evidence_file(project), "has no line in")
    log.write_text(whole)
    assert _run(project, "deploy", "courts", first.name).code == 0


@pytest.mark.slow
def test_deploy_refuses_when_newer_evidence_on_the_adapter_was_removed(project: Path) -> None:
    first, second = _adapters(project)
    access_log = AccessLog(project / "evaluations")
    for number, adapter in ((1, first), (2, first), (3, second)):
        opening = make_opening(number, evaluation=f"{number:012x}", adapter_digest=adapter.digest).model_dump()
        access_log.open(**{k: v for k, v in opening.items() if k not in LogLine.model_fields or k == "author"})
    for number, adapter in ((1, first), (2, first), (3, second)):
        store_evidence(project, adapter, SHIPS if number != 2 else FAILS, number)
    shutil.rmtree(_evidence_file(project, 2).parent)
    what = f"The evidence of evaluation {2:012x} of {first.name} is missing"
    _require_refusal(project, ["deploy", "courts", first.name], access_log.path, what)
    assert _run(project, "deploy", "courts", second.name).code == 0
    assert _run(project, "deploy", "courts", first.name, "--force", "--because", "it is urgent").code == 0


@pytest.mark.slow
def test_promote_refuses_a_candidate_whose_evidence_was_edited_or_removed(project: Path) -> None:
    first, second = _adapters(project)
    document(project, "deploy", "courts", second.name, "--force", "--because", "the first one")
    store_evidence(project, first, SHIPS)
    document(project, "deploy", "courts", first.name, "--canary", "10%")
    file = _evidence_file(project)
    whole = file.read_text()
    file.write_text(whole.replace('"margin":0.02', '"margin":0.01'))
    _require_refusal(project, ["promote", "courts"], file, "was changed after it was written")
    shutil.rmtree(file.parent)
    _require_refusal(project, ["promote", "courts"], file.parent, "on which the candidate was released, is missing")
    store_evidence(project, first, SHIPS)
    assert document(project, "promote", "courts")["release"]["adapter"] == first.name


def test_audit_verify_names_a_changed_line_with_exit_code_1(project: Path) -> None:
    for name in ("acme", "globex", "initech"):
        document(project, "tenant", "add", name)
    head = document(project, "audit", "verify")["head"]
    assert document(project, "audit", "verify", "--noted", head)["ok"]
    with raw(f"sqlite:///{project}/serving/state.sqlite") as execute:
        execute("UPDATE audit SET subject = 'nobody' WHERE number = 2")
    ran = _run(project, "audit", "verify")
    assert (ran.code, "line 2 was changed after it was written" in ran.stdout) == (1, True)


def test_audit_verify_names_a_request_with_changed_usage(project: Path) -> None:
    with State(f"sqlite:///{project}/serving/state.sqlite") as state:
        caller, release = with_tenant(state)
        number = state.quota.reserve(reservation(caller, release), "g")
        state.quota.settle(number, RequestUsage(3, 4, 0.0, 0.0, 0.0, "stop"))
    with raw(f"sqlite:///{project}/serving/state.sqlite") as execute:
        execute("UPDATE requests SET completion_tokens = 3")
    ran = _run(project, "audit", "verify")
    assert (ran.code, ran.stdout) == (1, "request 1: its tokens do not add up\n")


def test_tenant_feedback_counts_by_alias_and_adapter_and_guards_cells(project: Path) -> None:
    assert document(project, "tenant", "add", "globex")["name"] == "globex"
    assert "No feedback yet." in _run(project, "tenant", "feedback").stdout
    with State(f"sqlite:///{project}/serving/state.sqlite") as state:
        caller, release = with_tenant(state)
        values: Any = (("up", 1.0, None, None), ("down", 0.5, "=1+1", "too long"), ("up", None, None, None))
        for place, each in enumerate(values):
            named = replace(reservation(caller, release), response_id=f"chatcmpl-{place}")
            state.quota.settle(state.quota.reserve(named, "g"), RequestUsage(3, 4, 0.0, 0.0, 0.0, "stop"))
            state.feedback.record(caller.tenant_id, f"chatcmpl-{place}", FeedbackValues(*each))
        with raw(f"sqlite:///{project}/serving/state.sqlite") as execute:
            execute("UPDATE requests SET started = started - 200000, finished = finished - 200000")
    found = document(project, "tenant", "feedback", "acme", "--alias", release.alias)
    counts = {"answers": 3, "up": 2, "down": 1, "mean_score": 0.75, "corrections": 1}
    assert found["feedback"] == [{"alias": release.alias, "digest": release.digest, **counts}]
    assert [line["correction"] for line in found["lines"]] == [None, "=1+1", None]
    rows = list(csv.DictReader(io.StringIO(_run(project, "tenant", "feedback", "--csv").stdout)))
    assert [(row["response_id"], row["thumb"], row["score"], row["correction"]) for row in rows] == [
        ("chatcmpl-0", "up", "1.0", ""),
        ("chatcmpl-1", "down", "0.5", "'=1+1"),
        ("chatcmpl-2", "up", "", ""),
    ]
    for others in (("globex",), ("--alias", "recipes")):
        assert document(project, "tenant", "feedback", *others) == {"feedback": [], "lines": []}
    assert _run(project, "tenant", "feedback", "nobody").code == 2
    assert _run(project, "tenant", "feedback", "--csv", "--json").code == 2
    pruned = _run(project, "tenant", "prune-usage", "--before", time.strftime("%Y-%m-%d", time.gmtime()))
    assert "Rolled up 3 requests of 1 day. Deleted with them: feedback on 3 answers." in pruned.stdout
    assert document(project, "tenant", "feedback")["lines"] == []


def test_shadow_plan_measures_the_newest_shadow_and_the_traffic(project: Path) -> None:
    with State(f"sqlite:///{project}/serving/state.sqlite") as state:
        caller, release = with_tenant(state)
        ran = _run(project, "shadow", "plan", release.alias)
        assert (ran.code, "share of answers that differ is unknown" in ran.stderr) == (2, True)
        shadow = state.releases.start_candidate(release.alias, Candidate("courts-2", DIGESTS["b"], None), SHIPPED)
        for place in range(40):
            named = replace(reservation(caller, shadow), response_id=f"chatcmpl-{place}")
            number = state.quota.reserve(named, "g")
            state.quota.settle(number, RequestUsage(3, 4, 0.0, 0.0, 0.0, "stop"))
            state.quota.record_shadow(number, shadow.id, "a", "b" if place < 3 else "a", None)
    made = document(project, "shadow", "plan", release.alias)
    assert (made["differs"], made["shadowed"], made["units"], made["per_day"]) == (0.075, 40, 40, 40)
    three, five, ten = made["needs"]
    assert three["requests"] > five["requests"] > three["labels"] > five["labels"] > 0
    assert ten["requests"] is None
    ran = _run(project, "shadow", "plan", release.alias)
    assert "7.5% of the answers differ (40 answers in the shadow, 40 users or requests without a user)" in ran.stdout
    assert "Only 3 of 40 answers in the shadow differ" in ran.stderr
    assumed = document(project, "shadow", "plan", release.alias, "--differs", "50%")
    assert (assumed["differs"], assumed["shadowed"], assumed["per_day"]) == (0.5, 0, 40)


def test_shadow_plan_with_both_assumptions_needs_no_release(project: Path) -> None:
    ran = _run(project, "shadow", "plan", "courts", "--differs", "12%", "--per-day", "300")
    assert (ran.code, "courts: 12% of the answers differ (assumed); 300 requests a day." in ran.stdout) == (0, True)
    assert not (project / "serving").exists()
    assert _run(project, "shadow", "plan", "courts", "--differs", "12%").code == 2


def test_state_is_postgresql_by_option_or_config(project: Path, postgres: Path) -> None:
    from making.postgres import new_schema

    url = new_schema(postgres)
    made = document(project, "tenant", "add", "acme", "--database-url", url)
    assert not (project / "serving").exists()
    config = (project / "tunewright.yaml").read_text()
    (project / "tunewright.yaml").unlink()
    (project / "tunewright.yaml").write_text(f"{config}serve:\n  database_url: '{url}'\n")
    assert document(project, "tenant", "list")["tenants"] == [made]


def test_serve_without_tenants_answers_only_this_machine(project: Path) -> None:
    for host in ("0.0.0.0", "::"):
        ran = _run(project, "serve", "--host", host, "--port", "0")
        assert (ran.code, "answers all of them" in ran.stderr) == (2, True)


def test_serve_no_auth_answers_all_clients(project: Path) -> None:
    service = open_project(project).serve(options=ServeOptions(host="0.0.0.0", port=0, auth=False))
    with service.running() as url:
        port = url.rsplit(":", 1)[1]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200


def test_deploy_says_that_a_server_without_tenants_does_not_answer_aliases(project: Path) -> None:
    first, _ = _adapters(project)
    with open_project(project).serve(options=ServeOptions(port=0)).running():
        ran = _run(project, "deploy", "courts", first.name, *FORCE, "--untested", "a test")
    assert "No running server answers aliases: start `tunewright serve`, or restart it" in ran.stdout
    assert "No server is running" not in ran.stdout


def test_serve_with_tenants_refuses_adapter_names_and_no_auth(project: Path) -> None:
    _run(project, "tenant", "add", "acme")
    name = find_adapter(project / "adapters").name
    assert "request aliases" in _run(project, "serve", name).stderr
    assert "every request needs an API key" in _run(project, "serve", "--no-auth").stderr
    constrained = _run(project, "serve", "--constrain", "--port", "0")
    assert (constrained.code, "tunewright deploy ALIAS ADAPTER --constrain" in constrained.stderr) == (2, True)


@pytest.mark.slow
def test_running_server_picks_up_a_deploy(project: Path) -> None:
    first, second = _adapters(project)
    store_evidence(project, first, SHIPS)
    document(project, "tenant", "add", "acme", "--alias", "courts")
    key = document(project, "tenant", "key", "add", "acme")["key"]
    document(project, "deploy", "courts", first.name)
    with served(project, "--metrics-port", "0") as (process, started):
        assert "tunewright_requests" in httpx.get(started["metrics"]).text
        with openai.OpenAI(base_url=f"{started['url']}/v1", api_key=key, max_retries=0) as client:
            completions = client.chat.completions.with_raw_response

            def answered_by() -> str | None:
                answer = completions.create(model="courts", messages=ASKED, max_tokens=8)
                return answer.headers["x-tunewright-adapter"]

            assert [model.id for model in client.models.list()] == ["courts"]
            assert answered_by() == first.digest
            done = document(project, "deploy", "courts", second.name, "--force", "--because", "to see it switch")
            assert done["servers"] == 1
            end = time.monotonic() + 300
            while answered_by() != second.digest:
                assert time.monotonic() < end
            document(project, "undeploy", "courts")
            end = time.monotonic() + 300
            while client.models.list().data:
                assert time.monotonic() < end
            with pytest.raises(openai.NotFoundError):
                answered_by()
        stderr = interrupted(process)
    assert f"courts: release 2 is live: {second.name}" in stderr
    assert "courts is undeployed" in stderr
    (one, two) = document(project, "tenant", "usage", "acme")["usage"]
    assert {one["digest"], two["digest"]} == {first.digest, second.digest}
    rows = list(csv.DictReader(io.StringIO(_run(project, "tenant", "usage", "--csv").stdout)))
    assert len(rows) == one["requests"] + two["requests"]
    assert {row["tenant"] for row in rows} == {"acme"}
    assert sum(int(row["completion_tokens"]) for row in rows) == one["completion_tokens"] + two["completion_tokens"]


@pytest.mark.slow
def test_base_adapter_and_checkpoint_answer_without_tenants(project: Path) -> None:
    name = _adapters(project)[0].name
    with served(project, name, f"{name}@step-12") as (process, started):
        with openai.OpenAI(base_url=f"{started['url']}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == started["models"]
            assert len(started["models"]) == 3
            replies = [
                client.chat.completions.create(model=model, messages=ASKED, max_tokens=8) for model in started["models"]
            ]
        assert len({reply.choices[0].message.content for reply in replies}) > 1, replies
        interrupted(process)


def test_serve_refuses_an_address_in_use_before_loading_the_base(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = _run(project, "serve", "--port", str(port))
    assert ran.code == 2
    assert f"Cannot listen on 127.0.0.1 port {port}" in ran.stderr
    assert "Loading" not in ran.stderr


def test_requests_are_recorded_under_a_contract_read_and_forgotten(project: Path) -> None:
    url = f"sqlite:///{project}/serving/state.sqlite"
    with State(url) as state:
        caller, release = with_tenant(state)
    ran = _run(project, "tenant", "record", "acme")
    assert (ran.code, "--contract: Recording needs the reference of a contract" in ran.stderr) == (2, True)
    assert _run(project, "tenant", "record", "nobody", "--contract", "DPA-17").code == 2
    assert _run(project, "tenant", "record", "acme", "--contract", "DPA-17", "--stop").code == 2
    assert document(project, "tenant", "records") == {"recordings": []}
    assert document(project, "tenant", "record", "acme", "--contract", "DPA-17", "--share", "100%")["share"] == 1
    ran = _run(project, "tenant", "records", "acme", "--read")
    assert (ran.stdout, "No request of acme is recorded." in ran.stderr) == ("", True)
    ran = _run(project, "tenant", "record", "acme", "--contract", "DPA-17", "--days", "7", "--share", "50%")
    assert "set gateway.record to true in the config" in ran.stderr
    key = project / "serving" / "record.key"
    assert str(key) in ran.stdout and key.stat().st_mode & 0o777 == 0o600
    (found,) = document(project, "tenant", "records", "acme")["recordings"]
    assert (found["contract"], found["days"], found["share"], found["records"]) == ("DPA-17", 7, 0.5, 0)
    with State(url) as state:
        for place, end_user in enumerate(("eve", "bob")):
            named = replace(reservation(caller, release), response_id=f"chatcmpl-{place}", end_user=end_user)
            number = state.quota.reserve(named, "g")
            keys = KeyFile(key).keys("acme")
            unit = keys.digest("user", end_user)
            body = keys.encrypt({"path": "/", "request": {"user": place}, "answers": [], "redacted": {}}, number)
            state.records.write([NewRecord(number, unit, "user", unit, 0.5, body)], {caller.tenant_id: place})
    assert "2 users" in _run(project, "tenant", "records").stdout
    assert _run(project, "tenant", "records", "--read").code == 2
    lines = [json.loads(line) for line in _run(project, "tenant", "records", "acme", "--read").stdout.splitlines()]
    assert lines == document(project, "tenant", "records", "acme", "--read")["records"]
    assert [(line["id"], line["request"]) for line in lines] == [
        ("chatcmpl-0", {"user": 0}),
        ("chatcmpl-1", {"user": 1}),
    ]
    assert _run(project, "tenant", "forget", "acme").code == 2
    assert _run(project, "tenant", "forget", "acme", "--all", "--user", "eve").code == 2
    assert "--user: The ID is empty" in _run(project, "tenant", "forget", "acme", "--user", "").stderr
    assert "nothing was deleted" in _run(project, "tenant", "forget", "acme", "--user", "nobody").stdout
    ran = _run(project, "tenant", "forget", "acme", "--user", "eve")
    assert "Forgot 1 request: deleted 1 record, feedback on 0 answers and 0 answers of shadows." in ran.stdout
    assert document(project, "tenant", "forget", "acme", "--request", "chatcmpl-1")["records"] == 1
    (found,) = document(project, "tenant", "records")["recordings"]
    assert (found["records"], found["dropped"]) == (0, 1)
    assert "not recorded any more" in _run(project, "tenant", "record", "acme", "--stop").stdout
    assert "stopped" in _run(project, "tenant", "records").stdout
    shown = _run(project, "audit", "show").stdout
    for action in ("record.start", "record.read", "record.forget", "record.stop"):
        assert action in shown
    assert "eve" not in shown
    assert _run(project, "audit", "verify").code == 0
