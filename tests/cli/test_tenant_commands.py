"""Tenants, releases and audit through the command line."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from sqlalchemy import create_engine, text
from states import Clock, raw, reservation, with_tenant

from command_line import Ran, tiny_project, tunewright, without_state
from factories import make_evidence, make_items, make_opening, with_contrast
from tunewright import open as open_project
from tunewright.adapters.registry import Adapter, find_adapter, list_adapters
from tunewright.chat.call_grammar import CallGrammars
from tunewright.evaluation.access_log import ACCESS_LOG, AccessLog
from tunewright.evidence.logged_access import LogLine
from tunewright.evidence.schema import Evidence
from tunewright.generation.constraints import Grammar
from tunewright.serving.options import ServeOptions
from tunewright.serving.tenants import RequestUsage, State


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with two trained adapters."""
    folder = tiny_project(tmp_path_factory.mktemp("tenants") / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert tunewright("train", "-p", folder).code == 0
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 1"))
    assert tunewright("train", "-p", folder).code == 0
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return without_state(trained, tmp_path / "project")


def _adapters(project: Path) -> list[Adapter]:
    return list_adapters(project / "adapters")


def _evaluated(project: Path, adapter: Adapter, evidence: Evidence, number: int = 1) -> None:
    """Evidence on an adapter, as `evaluate` leaves it."""
    lineage = evidence.lineage | {
        "created": f"2026-11-0{number}T10:00:00+00:00",
        "adapter": {"name": adapter.name, "digest": adapter.digest, "lineage": adapter.lineage},
    }
    stored = evidence.model_copy(update={"id": f"{number:012x}", "lineage": lineage})
    evaluations = project / "evaluations"
    AccessLog(evaluations).write(evaluations / stored.id / "evidence.json", stored.model_dump_json())


FORCE = ("--force", "--because", "it is urgent")
SHIPS = make_evidence(make_items())
FAILS = with_contrast(SHIPS, difference=-0.2, low=-0.3, high=-0.1, p_value=0.001)
OPEN = with_contrast(SHIPS, difference=0.02, low=-0.1, high=0.1, p_value=0.6)


def _run(project: Path, *arguments: str) -> Ran:
    return tunewright(*arguments, "-p", project)


def _document(project: Path, *arguments: str) -> Any:
    ran = _run(project, *arguments, "--json")
    assert ran.code == 0, ran.stderr
    return ran.document


def test_tenant_commands_manage_limits_and_keys(project: Path) -> None:
    made = _document(project, "tenant", "add", "acme", "--alias", "courts", "--requests", "60")
    assert made["limits"] == {"requests_per_minute": 60, "tokens_per_minute": None, "concurrency": None}
    changed = _document(project, "tenant", "limit", "acme", "--tokens", "10000", "--requests", "none")
    assert changed["limits"] == {"requests_per_minute": None, "tokens_per_minute": 10000, "concurrency": None}
    assert _document(project, "tenant", "limit", "acme") == changed
    assert _document(project, "tenant", "grant", "acme", "recipes")["aliases"] == ["courts", "recipes"]
    assert _document(project, "tenant", "revoke", "acme", "recipes")["aliases"] == ["courts"]

    key = _document(project, "tenant", "key", "add", "acme", "--expires", "30d", "--alias", "courts")
    assert key["key"].startswith(key["prefix"])
    listed = _run(project, "tenant", "key", "list", "acme", "--json")
    assert key["key"] not in listed.stdout
    assert listed.document["keys"][0]["aliases"] == ["courts"]
    rotated = _document(project, "tenant", "key", "rotate", key["prefix"], "--overlap", "2h")
    assert rotated["aliases"] == ["courts"]
    assert _document(project, "tenant", "key", "revoke", rotated["prefix"])["state"] == "revoked"
    states = {k["prefix"]: k["state"] for k in _document(project, "tenant", "key", "list")["keys"]}
    assert states == {key["prefix"]: "valid", rotated["prefix"]: "revoked"}
    ended = _document(project, "tenant", "disable", "acme")
    assert (ended["aliases"], ended["keys"]) == ([], 0)
    assert [t["name"] for t in _document(project, "tenant", "list")["tenants"]] == ["acme"]
    assert [line["action"] for line in _document(project, "audit", "show")["lines"]] == [
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


def test_tenant_tables_match_the_json(project: Path) -> None:
    _run(project, "tenant", "add", "acme", "--alias", "courts")
    key = _run(project, "tenant", "key", "add", "acme")
    assert "It is not shown again" in key.stderr
    assert re.fullmatch(r"tw_[0-9a-f]{10}_\S{49}\n", key.stdout)
    assert key.stdout.strip() not in key.stderr
    for command in (["tenant", "list"], ["tenant", "key", "list"], ["audit", "show"]):
        ran = _run(project, *command)
        assert (ran.code, "acme" in ran.stdout, ran.stderr) == (0, True, "")
    assert "No requests yet" in _run(project, "tenant", "usage").stdout
    assert "Nothing has been released" in _run(project, "releases").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tenant", "key", "add", "nobody"], "no tenant 'nobody'"),
        (["tenant", "add", "Acme"], "Invalid name 'Acme' for a tenant"),
        (["tenant", "add", "acme", "--requests", "0"], "--requests: Invalid limit '0'"),
        (["tenant", "key", "rotate", "tw_0", "--overlap", "soon"], "--overlap: Invalid duration 'soon'"),
        (["tenant", "key", "add", "acme", "--expires", "0d"], "--expires: A key's lifetime must be greater than 0"),
        (["tenant", "usage", "--since", "yesterday"], "--since: Invalid date 'yesterday'"),
        (["tenant", "usage", "--csv", "--json"], "mutually exclusive"),
        (["tenant", "usage", "--csv", "--by-day"], "mutually exclusive"),
        (["tenant", "list", "--database-url", "mysql://x/y"], "Unsupported database"),
        (["tenant", "list", "--database-url", "sqlite:///no/such.sqlite"], "There is no serving state"),
        (["audit", "verify", "--database-url", "sqlite:///no/such.sqlite"], "There is no serving state"),
        (["serve", "--database-url", "sqlite:///no/such.sqlite"], "There is no serving state"),
        (["audit", "verify", "--noted", ""], "Invalid digest ''"),
        (["promote", "courts"], "no alias 'courts'"),
        (["rollback", "courts"], "no alias 'courts'"),
        (["undeploy", "courts"], "no alias 'courts'"),
        (["undeploy", "courts", "--because", " "], "--because: The reason is empty"),
        (["tenant", "disable", "nobody"], "no tenant 'nobody'"),
        (["deploy", "courts", "nowhere"], "No adapter is named 'nowhere'"),
        (["deploy", "courts", "tiny", "--canary", "110%"], "Invalid traffic share"),
        (["deploy", "courts", "tiny", "--force"], "--force and --because require each other"),
        (["deploy", "courts", "tiny", "--because", "x"], "--force and --because require each other"),
    ],
)
def test_tenant_commands_report_mistakes_with_exit_code_2(project: Path, arguments: list[str], message: str) -> None:
    ran = _run(project, *arguments)
    assert ran.code == 2
    assert message in ran.stderr + ran.stdout
    assert not Path("no").exists()
    assert not list((project / "serving").glob("*.sqlite")) or not _document(project, "audit", "show")["lines"]


def test_deploy_refuses_an_adapter_without_a_ship_verdict(project: Path) -> None:
    first, second = _adapters(project)
    ran = _run(project, "deploy", "courts", first.name)
    assert (ran.code, "has no verdict on the test split" in ran.stderr) == (2, True)
    _evaluated(project, first, FAILS)
    ran = _run(project, "deploy", "courts", first.name)
    assert (ran.code, "courts is unchanged" in ran.stdout) == (3, True)
    _evaluated(project, first, OPEN, 2)  # the newest evaluation decides
    assert _run(project, "deploy", "courts", first.name).code == 4
    assert "Nothing has been released" in _run(project, "releases").stdout
    _evaluated(project, second, SHIPS, 3)
    assert _run(project, "deploy", "courts", first.name).code == 4, "evidence on another adapter"
    done = _document(project, "deploy", "courts", second.name)
    assert (done["release"]["adapter"], done["verdict"]["decision"]) == (second.name, "ship")
    grounds = done["release"]["grounds"]
    assert (grounds["verdict"], grounds["evaluation"], grounds["because"]) == ("ship", f"{3:012x}", None)


@pytest.mark.slow
def test_deploy_force_stores_the_reason(project: Path) -> None:
    first, second = _adapters(project)
    _evaluated(project, first, FAILS)
    forced = _document(project, "deploy", "courts", first.name, "--force", "--because", "the client insists")
    assert forced["release"]["grounds"]["verdict"] == "don't ship"
    _document(project, "deploy", "courts", second.name, "--force", "--because", "never evaluated")
    history = _document(project, "releases", "courts")["releases"]
    assert [release["grounds"]["because"] for release in history] == ["the client insists", "never evaluated"]
    reported = _run(project, "releases").stdout
    assert "courts 1 was forced: the client insists" in reported
    assert "courts 2 was forced: never evaluated" in reported
    assert "the client insists" in _document(project, "audit", "show")["lines"][0]["details"]
    assert _document(project, "audit", "verify")["ok"]


@pytest.mark.slow
def test_deploy_constrain_requires_evidence_with_the_same_constraint(project: Path) -> None:
    first, second = _adapters(project)
    config = project / "tunewright.yaml"
    text = config.read_text()
    config.unlink()
    config.write_text(text)
    _evaluated(project, first, SHIPS)
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
    _evaluated(project, first, constrained, 2)
    release = _document(project, *command)["release"]
    assert (release["grammar"], release["grounds"]["evaluation"]) == (grammar.rule, f"{2:012x}")
    assert "constrained" in _run(project, "releases").stdout

    config.write_text(text.replace("evaluate:\n", choices.replace("blue", "green")))
    ran = _run(project, *command)
    assert (ran.code, "was evaluated with another constraint" in ran.stderr) == (2, True)
    forced = _run(project, "deploy", "courts", second.name, "--constrain", "--canary", "10%", *FORCE, "--json")
    assert forced.document["release"]["candidate"]["grammar"] == Grammar.choices(["red", "green"]).rule
    assert "The release constrains its answers all the same" in forced.stderr
    assert _document(project, "promote", "courts")["release"]["grammar"] == Grammar.choices(["red", "green"]).rule
    assert _document(project, "rollback", "courts")["grammar"] == grammar.rule
    assert _document(project, "audit", "verify")["ok"]


def test_deploy_constrain_carries_a_constraint_on_calls(project: Path) -> None:
    config = project / "tunewright.yaml"
    text = config.read_text().replace("evaluate:\n", "evaluate:\n  structured_outputs: {tools: auto}\n")
    config.unlink()
    config.write_text(text)
    ran = _run(project, "deploy", "courts", _adapters(project)[0].name, "--constrain", *FORCE)
    assert (ran.code, "chat.tools" in ran.stderr) == (2, True), "the base has no form of calls"
    config.write_text(f"{text}seed: 7\nchat:\n  tools: hermes\n")
    (project / "adapters").unlink()  # the new one is for this test alone
    name = _document(project, "train")["adapter"]
    adapter = find_adapter(project / "adapters", name)
    arm = next(arm for arm in SHIPS.arms if arm.name == "tuned")
    arms = [*SHIPS.arms, arm.model_copy(update={"name": "tuned+constrained", "constrained": True})]
    choices: list[Literal["required", "auto"]] = ["required", "auto"]
    for number, choice in enumerate(choices, 1):
        lineage = SHIPS.lineage | {"grammar": CallGrammars(choice).digest}
        _evaluated(project, adapter, SHIPS.model_copy(update={"arms": arms, "lineage": lineage}), number)
        if choice == "required":
            ran = _run(project, "deploy", "courts", name, "--constrain")
            assert (ran.code, "was evaluated with another constraint" in ran.stderr) == (2, True)
    release = _document(project, "deploy", "courts", name, "--constrain")["release"]
    assert (release["grammar"], release["grounds"]["evaluation"]) == (CallGrammars("auto").rule, f"{2:012x}")
    assert "constrained" in _run(project, "releases").stdout


def test_serve_constrain_is_refused_with_tenants_and_without_a_constraint(project: Path) -> None:
    ran = _run(project, "serve", "--constrain", "--port", "0")
    assert (ran.code, "The config has no constraint" in ran.stderr) == (2, True)
    _document(project, "tenant", "add", "acme", "--alias", "courts")
    ran = _run(project, "serve", "--constrain", "--port", "0")
    assert (ran.code, "each release sets whether its answers are constrained" in ran.stderr) == (2, True)
    assert "tunewright deploy ALIAS ADAPTER --constrain" in ran.stderr


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
    _evaluated(project, first, SHIPS.model_copy(update={"arms": arms, "lineage": lineage}))
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


@pytest.mark.slow
def test_canary_is_promoted_or_rolled_back(project: Path) -> None:
    first, second = _adapters(project)
    for adapter, number in ((first, 1), (second, 2)):
        _evaluated(project, adapter, SHIPS, number)
    _document(project, "deploy", "courts", first.name)
    canary = _document(project, "deploy", "courts", second.name, "--canary", "10%")["release"]
    expected = {"adapter": second.name, "digest": second.digest, "share": 0.1, "system_prompt": True}
    assert canary["candidate"] == expected | {"grammar": None}
    assert canary["adapter"] == first.name
    assert _document(project, "rollback", "courts")["candidate"] is None
    _document(project, "deploy", "courts", second.name, "--shadow")
    assert _document(project, "promote", "courts")["release"]["adapter"] == second.name
    assert _document(project, "rollback", "courts")["adapter"] == first.name
    assert _document(project, "rollback", "courts", "--to", "5")["adapter"] == second.name
    _document(project, "undeploy", "courts", "--because", "a typing mistake")
    reported = _run(project, "releases").stdout
    assert "courts 8 was undeployed: a typing mistake" in reported
    assert _document(project, "rollback", "courts")["adapter"] == second.name
    actions = [release["action"] for release in _document(project, "releases")["releases"]]
    assert actions == [
        "deploy",
        "canary",
        "rollback",
        "shadow",
        "promote",
        "rollback",
        "rollback",
        "undeploy",
        "rollback",
    ]
    assert "No shadow candidate has answered" in _run(project, "shadow", "courts").stdout


def _evidence_file(project: Path, number: int = 1) -> Path:
    return project / "evaluations" / f"{number:012x}" / "evidence.json"


def _require_refusal(project: Path, command: list[str], file: Path, what: str) -> None:
    """The command names the file, changes nothing, and the history has no new release."""
    before = _document(project, "releases")
    ran = _run(project, *command, "--json")
    error = ran.document["error"]
    assert (ran.code, error["where"]) == (2, str(file)), command
    assert what in error["what"]
    assert "Restore" in error["fix"]
    assert _document(project, "releases") == before


@pytest.mark.parametrize(
    "edit",
    [
        lambda evidence: {**evidence, "contrasts": json.loads(SHIPS.model_dump_json())["contrasts"]},
        lambda evidence: {**evidence, "margin": -1.0},
        lambda evidence: {**evidence, "lineage": {**evidence["lineage"], "adapter": {"digest": "0" * 64}}},
        lambda evidence: {**evidence, "lineage": {**evidence["lineage"], "created": "2026-11-01T00:00:00+00:00"}},
        lambda evidence: {**evidence, "split": "dev"},
        lambda evidence: {**evidence, "schema_version": 1},
        lambda _evidence: {},
    ],
)
def test_deploy_refuses_evidence_that_was_edited(project: Path, edit: Any) -> None:
    """Also where the edit makes an older evaluation the newest one of the adapter."""
    first, _ = _adapters(project)
    _evaluated(project, first, SHIPS, 1)
    _evaluated(project, first, FAILS, 2)
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
    _evaluated(project, first, SHIPS)
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
        _evaluated(project, adapter, SHIPS if number != 2 else FAILS, number)
    shutil.rmtree(_evidence_file(project, 2).parent)
    what = f"The evidence of evaluation {2:012x} of {first.name} is missing"
    _require_refusal(project, ["deploy", "courts", first.name], access_log.path, what)
    assert _run(project, "deploy", "courts", second.name).code == 0
    assert _run(project, "deploy", "courts", first.name, "--force", "--because", "it is urgent").code == 0


@pytest.mark.slow
def test_promote_refuses_a_candidate_whose_evidence_was_edited_or_removed(project: Path) -> None:
    first, second = _adapters(project)
    _document(project, "deploy", "courts", second.name, "--force", "--because", "the first one")
    _evaluated(project, first, SHIPS)
    _document(project, "deploy", "courts", first.name, "--canary", "10%")
    file = _evidence_file(project)
    whole = file.read_text()
    file.write_text(whole.replace('"margin":0.02', '"margin":0.01'))
    _require_refusal(project, ["promote", "courts"], file, "was changed after it was written")
    shutil.rmtree(file.parent)
    _require_refusal(project, ["promote", "courts"], file.parent, "on which the candidate was released, is missing")
    _evaluated(project, first, SHIPS)
    assert _document(project, "promote", "courts")["release"]["adapter"] == first.name


def test_audit_verify_names_a_changed_line_with_exit_code_1(project: Path) -> None:
    for name in ("acme", "globex", "initech"):
        _document(project, "tenant", "add", name)
    head = _document(project, "audit", "verify")["head"]
    assert _document(project, "audit", "verify", "--noted", head)["ok"]
    engine = create_engine(f"sqlite:///{project}/serving/state.sqlite")
    with engine.begin() as connection:
        connection.execute(text("UPDATE audit SET subject = 'nobody' WHERE number = 2"))
    engine.dispose()
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


def test_audit_show_leaves_totals_of_days_to_the_usage(project: Path) -> None:
    clock = Clock()
    with State(f"sqlite:///{project}/serving/state.sqlite", "ann", clock) as state:
        caller, release = with_tenant(state)
        state.quota.settle(state.quota.reserve(reservation(caller, release), "g"), RequestUsage(3, 4, 0, 0, 0, "stop"))
        clock.now += 172_800
        state.usage_rollup.roll_up(clock.now // 86_400 * 86_400)
    ran = _run(project, "audit", "show")
    assert (ran.code, "usage.rollup" in ran.stdout, "prompt_tokens" in ran.stdout) == (0, True, False)
    assert '"prompt_tokens":3' in _document(project, "audit", "show")["lines"][-1]["details"]


def test_state_is_postgresql_by_option_or_config(project: Path, postgres: Path) -> None:
    from postgres import new_schema

    url = new_schema(postgres)
    made = _document(project, "tenant", "add", "acme", "--database-url", url)
    assert not (project / "serving").exists()
    config = (project / "tunewright.yaml").read_text()
    (project / "tunewright.yaml").unlink()
    (project / "tunewright.yaml").write_text(f"{config}serve:\n  database_url: '{url}'\n")
    assert _document(project, "tenant", "list")["tenants"] == [made]


def test_serve_without_tenants_answers_only_this_machine(project: Path) -> None:
    for host in ("0.0.0.0", "::"):
        ran = _run(project, "serve", "--host", host, "--port", "0")
        assert (ran.code, "answers all of them" in ran.stderr) == (2, True)


def test_serve_no_auth_answers_all_clients(project: Path) -> None:
    service = open_project(project).serve(options=ServeOptions(host="0.0.0.0", port=0, auth=False))
    with service.running() as url:
        port = url.rsplit(":", 1)[1]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200


def test_serve_with_tenants_refuses_adapter_names_and_no_auth(project: Path) -> None:
    _run(project, "tenant", "add", "acme")
    name = find_adapter(project / "adapters").name
    assert "request aliases" in _run(project, "serve", name).stderr
    assert "every request needs an API key" in _run(project, "serve", "--no-auth").stderr


@pytest.fixture
def server(project: Path) -> Iterator[tuple[subprocess.Popen[str], str, str, list[Adapter]]]:
    """A server for acme's alias courts: the process, its address, acme's key, the adapters; the first is released."""
    adapters = _adapters(project)
    _evaluated(project, adapters[0], SHIPS)
    _document(project, "tenant", "add", "acme", "--alias", "courts")
    key = _document(project, "tenant", "key", "add", "acme")["key"]
    _document(project, "deploy", "courts", adapters[0].name)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tunewright",
            "serve",
            "--port",
            "0",
            "--metrics-port",
            "0",
            "--json",
            "-p",
            str(project),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line == "}\n":
            break
    try:
        started = json.loads(said)
        assert "tunewright_requests" in httpx.get(started["metrics"]).text
        yield process, started["url"], key, adapters
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_running_server_picks_up_a_deploy(
    project: Path, server: tuple[subprocess.Popen[str], str, str, list[Adapter]]
) -> None:
    process, url, key, (first, second) = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    asked: list[Any] = [{"role": "user", "content": "red teal navy 7"}]

    def answered_by() -> str | None:
        raw = client.chat.completions.with_raw_response.create(model="courts", messages=asked, max_tokens=8)
        return raw.headers["x-tunewright-adapter"]

    assert [model.id for model in client.models.list()] == ["courts"]
    assert answered_by() == first.digest
    done = _document(project, "deploy", "courts", second.name, "--force", "--because", "to see it switch")
    assert done["servers"] == 1
    end = time.monotonic() + 300
    while answered_by() != second.digest:
        assert time.monotonic() < end
    _document(project, "undeploy", "courts")
    end = time.monotonic() + 300
    while client.models.list().data:
        assert time.monotonic() < end
    with pytest.raises(openai.NotFoundError):
        answered_by()
    client.close()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert f"courts: release 2 is live: {second.name}" in stderr
    assert "courts is undeployed" in stderr
    (one, two) = _document(project, "tenant", "usage", "acme")["usage"]
    assert {one["digest"], two["digest"]} == {first.digest, second.digest}
    rows = list(csv.DictReader(io.StringIO(_run(project, "tenant", "usage", "--csv").stdout)))
    assert len(rows) == one["requests"] + two["requests"]
    assert {row["tenant"] for row in rows} == {"acme"}
    assert sum(int(row["completion_tokens"]) for row in rows) == one["completion_tokens"] + two["completion_tokens"]
