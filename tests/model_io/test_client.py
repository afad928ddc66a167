"""The endpoint as it is in the world: slow, limited, failing, expensive; and what was answered is kept."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse, PlainTextResponse, Response

from making.command_line import tunewright
from making.evidence import make_items
from making.scripted_judge import Server, honest, scripted, write_project
from tunewright.config import EndpointConfig
from tunewright.config.io import parse_config
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.evaluation.judge.questions import ROWS_FILE
from tunewright.evidence.files import load_evidence
from tunewright.model_io import client
from tunewright.model_io.client import Endpoint
from tunewright.model_io.replies import Budget, Journal

CONTROL_QUESTIONS = 14 * 6
CONVERSATIONS = [({"role": "user", "content": f"question {n}"},) for n in range(12)]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


def ask(server: Server, folder: Path, count: int = 12, **settings: Any) -> list[str]:
    """Ask an endpoint directly; the replies' texts."""
    config = EndpointConfig.model_validate({"base_url": server.url, "model": "scripted", **settings})
    return [
        r.text
        for r in Endpoint(config, "judge", folder, Budget(None, "judge.budget"), LogReporter()).ask(
            "t", CONVERSATIONS[:count]
        )
    ]


def failing_first(times: int, response: Response) -> Callable[[int], Response | None]:
    """The first requests get ``response``."""
    return lambda count: response if count < times else None


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_endpoint_retries_transient_errors(tmp_path: Path, status: int) -> None:
    with scripted(honest) as server:
        server.misbehave = failing_first(3, PlainTextResponse("busy", status))
        assert ask(server, tmp_path) == [f"An answer to question {n}" for n in range(12)]
        assert len(server.bodies) == 12 + 3


def test_waits_between_tries_grow_to_a_minute_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(_: object, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client, "_FIRST_WAIT", 1.0)
    monkeypatch.setattr(client._Failure, "sleep", sleep)
    with scripted(honest) as server:
        server.misbehave = failing_first(99, PlainTextResponse("busy", 503))
        with pytest.raises(UserError, match="asked 9 times"):
            ask(server, tmp_path, count=1, max_retries=8)
    assert [int(wait) for wait in waits[:6]] == [1, 2, 4, 8, 16, 32]
    assert waits[6:] == [60, 60]
    assert not any(wait.is_integer() for wait in waits[:6])


@pytest.mark.slow
def test_retry_after_is_waited_for_in_seconds_or_until_a_date(tmp_path: Path) -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    for number, value in enumerate([format_datetime(until, usegmt=True), "1"]):
        with scripted(honest) as server:
            server.misbehave = failing_first(1, PlainTextResponse("slow down", 429, headers={"retry-after": value}))
            began = time.monotonic()
            ask(server, tmp_path / str(number), count=1)
            assert datetime.now(UTC) >= until
            assert number == 0 or time.monotonic() - began >= 1
            assert len(server.bodies) == 2


def test_endpoint_stops_the_run_when_asked_to_wait_for_hours(tmp_path: Path) -> None:
    with scripted(honest) as server:
        server.misbehave = failing_first(99, PlainTextResponse("quota", 429, headers={"retry-after": "86400"}))
        with pytest.raises(UserError, match=r"asks to wait 86,400 s\. Finished answers are kept"):
            ask(server, tmp_path, count=1)
        assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_endpoint_does_not_retry_permanent_errors(tmp_path: Path, status: int) -> None:
    with scripted(honest) as server:
        server.misbehave = failing_first(99, JSONResponse({"error": {"message": "no such thing"}}, status))
        with pytest.raises(UserError, match=f"status {status}: no such thing"):
            ask(server, tmp_path, concurrency=1)
        assert len(server.bodies) == 1


@pytest.mark.fault("connection", "judge")
def test_endpoint_reports_a_timeout(tmp_path: Path) -> None:
    with scripted(honest) as server:
        server.slow_s = 1.0
        with pytest.raises(UserError, match=r"no reply within 0.1 s; asked 2 times"):
            ask(server, tmp_path, count=1, timeout=0.1, max_retries=1)


@pytest.mark.fault("connection", "judge")
def test_endpoint_reports_a_refused_connection(tmp_path: Path) -> None:
    with scripted(honest) as server:
        pass
    with pytest.raises(UserError, match=r"does not answer \(no connection"):
        ask(server, tmp_path, count=1, max_retries=0)


@pytest.mark.parametrize(
    "body", ["<html>welcome</html>", '{"choices": []}', '{"choices": [{"message": {"content": 1}}]}']
)
def test_endpoint_reports_a_reply_of_another_protocol(tmp_path: Path, body: str) -> None:
    with scripted(honest) as server:
        server.misbehave = failing_first(99, PlainTextResponse(body))
        with pytest.raises(UserError, match="not a chat completion"):
            ask(server, tmp_path, count=1, max_retries=1)


def test_endpoint_limits_concurrent_requests(tmp_path: Path) -> None:
    with scripted(honest) as server:
        server.wait_for = 3  # the first ones are answered once this many have arrived
        ask(server, tmp_path, concurrency=3)
        assert server.most_at_once == 3


def test_endpoint_limits_requests_per_minute_including_retries(tmp_path: Path) -> None:
    with scripted(honest) as server:
        server.misbehave = failing_first(2, PlainTextResponse("busy", 500))
        began = time.monotonic()
        ask(server, tmp_path, count=8, requests_per_minute=1200)
        assert time.monotonic() - began >= 9 * 0.05


def test_endpoint_sends_the_key_and_never_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    project = tmp_path / "project"
    with scripted(honest) as server:
        write_project(project, {"base_url": server.url, "model": "scripted", "api_key_env": "JUDGE_KEY"})
        assert tunewright("judge", "-p", project).code == 0
        assert set(server.keys) == {"Bearer sk-very-secret"}
        server.misbehave = failing_first(999, JSONResponse({"error": {"message": "bad key sk-very-secret"}}, 401))
        (project / "tunewright.yaml").write_text(
            (project / "tunewright.yaml").read_text() + "  criteria: other\n", encoding="utf-8"
        )
        ran = tunewright("judge", "-p", project)
        assert ran.code == 2
        assert "bad key …" in ran.stderr
    assert not [f for f in project.rglob("*") if f.is_file() and "very-secret" in f.read_text(encoding="utf-8")]


def test_failing_endpoint_ends_the_run_and_keeps_answers(tmp_path: Path) -> None:
    with scripted(honest) as server:
        settings = {"base_url": server.url, "model": "scripted", "max_retries": 1}
        evaluation = write_project(tmp_path / "project", settings)
        before = {file: file.read_bytes() for file in evaluation.iterdir()}
        server.misbehave = lambda count: PlainTextResponse("down", 503) if count >= 100 else None
        ran = tunewright("judge", "-p", tmp_path / "project", "--json")
        assert ran.code == 2
        assert ran.document["error"]["where"] == "judge.base_url"
        assert "the same command resumes from there" in ran.document["error"]["fix"]
        assert {file: file.read_bytes() for file in evaluation.iterdir()} == before
        server.misbehave = lambda count: None
        first = list(server.prompts)
        assert tunewright("judge", "-p", tmp_path / "project").code == 0
        assert len(first) == 100
        assert len(server.prompts) == len(set(server.prompts))
        asked = len(server.bodies)
        assert tunewright("judge", "-p", tmp_path / "project").code == 0
        assert len(server.bodies) == asked


def test_failure_wakes_waiting_retries(tmp_path: Path) -> None:
    def second_is_refused(count: int) -> Response:
        return PlainTextResponse("no", 403) if count else PlainTextResponse("", 429, headers={"retry-after": "60"})

    with scripted(honest) as server:
        server.misbehave = second_is_refused
        with pytest.raises(UserError, match="status 403"):
            ask(server, tmp_path, count=2, concurrency=2)
        assert len(server.bodies) == 2, "the first was not asked again"


@pytest.mark.slow
@pytest.mark.fault("kill", "judge")
def test_judge_resumes_after_a_kill(tmp_path: Path) -> None:
    project = tmp_path / "project"
    with scripted(honest) as server:
        server.slow_s = 0.03
        write_project(project, {"base_url": server.url, "model": "scripted", "concurrency": 2})
        command = [sys.executable, "-m", "tunewright", "judge", "-p", str(project)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while len(server.prompts) < 40:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        server.slow_s = 0.0
        assert tunewright("judge", "-p", project).code == 0
        # Only requests in progress are sent twice: nobody stored their replies.
        assert len(server.prompts) - len(set(server.prompts)) <= 2


def test_judge_asks_again_for_another_model_parameter_or_criterion(tmp_path: Path) -> None:
    project = tmp_path / "project"
    with scripted(honest) as server:
        write_project(project, {"base_url": server.url, "model": "scripted"})
        assert tunewright("judge", "-p", project).code == 0
        once = len(server.bodies)
        config = (project / "tunewright.yaml").read_text()
        for number, change in enumerate(["  parameters: {seed: 1}\n", "  criteria: Names matter most.\n"], start=2):
            (project / "tunewright.yaml").write_text(config + change)
            assert tunewright("judge", "-p", project).code == 0
            assert len(server.bodies) == number * once
        assert "Names matter most." in server.prompts[-1]


def test_judgement_records_the_ones_it_replaced(tmp_path: Path) -> None:
    with scripted(honest) as server:
        evaluation = write_project(tmp_path / "project", {"base_url": server.url, "model": "first"})
        config = tmp_path / "project" / "tunewright.yaml"
        for _ in range(2):
            assert tunewright("judge", "-p", tmp_path / "project").code == 0
        server.script = lambda asked: "no idea"
        config.write_text(config.read_text().replace("first", "second"))
        assert (evaluation / ROWS_FILE).exists()
        assert tunewright("judge", "-p", tmp_path / "project").code == 3
        assert not (evaluation / ROWS_FILE).exists()
        server.script = honest
        config.write_text(config.read_text().replace("second", "third"))
        assert tunewright("judge", "-p", tmp_path / "project").code == 0
    section = load_evidence(evaluation).judge
    assert section is not None
    assert [re.sub(r"\d{4}.*?\+00:00", "TIME", reported) for reported in section.replaced] == [
        "first, TIME",
        "second, TIME, vetoed",
    ]


def test_item_too_long_for_the_judge_is_unscored(tmp_path: Path) -> None:
    items = make_items()
    wrong = next(i for i in items if i.answers["tuned"] != i.reference)
    too_long = JSONResponse({"error": {"message": "too many tokens", "code": "context_length_exceeded"}}, 400)
    with scripted(honest) as server:
        evaluation = write_project(tmp_path / "project", {"base_url": server.url, "model": "scripted"}, items)
        server.misbehave = lambda count: (
            too_long
            if f">>>\n{wrong.answers['tuned']}\n<<<" in server.bodies[count]["messages"][0]["content"]
            else None
        )
        assert tunewright("judge", "-p", tmp_path / "project").code == 0
    section = load_evidence(evaluation).judge
    assert section is not None
    assert section.arms[0].unscored == {"too long for the model": 1}


# What is refused, and what is said


ENDPOINT = {"base_url": "http://x/v1", "model": "m"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "http://u:p@x/v1"}, "judge.base_url"),
        ({"budget": 1.0}, "price_input"),
        ({"price_input": 1.0}, "price_output"),
        ({"parameters": {"stream": True}}, "stream"),
        ({"controls": 5}, "judge.controls"),
        ({"reference_model": {"model": "m"}}, "answers"),
        ({"budget": 1, "price_input": 1, "price_output": 9, "parameters": {}}, "max_tokens"),
    ],
)
def test_config_refuses_a_judge_that_cannot_be_asked_or_paid(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(json.dumps({"judge": {**ENDPOINT, **settings}}), Path("tunewright.yaml"))
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"base_url": "http://x/v1"}, "no judge"), ({**ENDPOINT, "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY")],
)
def test_judge_refuses_an_incomplete_config_before_sending(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    write_project(tmp_path / "project", settings)
    ran = tunewright("judge", "-p", tmp_path / "project", "--json")
    assert ran.code == 2
    assert words in ran.document["error"]["what"]


def test_judge_of_the_bases_family_is_warned_about(tmp_path: Path) -> None:
    with scripted(honest) as server:
        settings = {"base_url": server.url, "model": "Llama-3.3-70B-Instruct"}
        evaluation = write_project(tmp_path / "project", settings, base="meta-llama/Llama-3.1-8B")
        assert "belongs to the base's family (llama)" in tunewright("judge", "-p", tmp_path / "project").stderr
    section = load_evidence(evaluation).judge
    assert section is not None
    assert section.same_family == "llama"


def test_judge_runs_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def cell(server: Server) -> list[str]:
        return ask(server, tmp_path)

    with scripted(honest) as server:
        assert len(asyncio.run(cell(server))) == 12


ANSWERS = st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=4)


def journal_of(path: Path) -> Journal[str]:
    return Journal(path, lambda row: (row["key"], row["text"]), lambda key, text: {"key": key, "text": text})


@given(answers=ANSWERS, cut=st.integers(min_value=0), last=st.text(max_size=5))
def test_journal_cut_at_any_byte_yields_its_whole_rows_and_later_ones(
    tmp_path_factory: pytest.TempPathFactory, answers: dict[str, str], cut: int, last: str
) -> None:
    path = tmp_path_factory.mktemp("log") / "folder" / "journal.jsonl"
    first = journal_of(path)
    with first.keeping() as keep:
        for key, text in answers.items():
            keep(key, text)
    assert first.answers == answers
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])
    there = journal_of(path)
    assert there.answers == dict(list(answers.items())[: len(there.answers)])
    assert there.missing({**answers, "last": "?"}).keys() == answers.keys() - there.answers.keys() | {"last"}
    with there.keeping() as keep:
        keep("last", last)
    assert journal_of(path).answers == {**there.answers, "last": last}


def test_journal_skips_rows_of_another_form_and_a_line_cut_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes('[1]\n1\n{"key": "a"}\n{"key": "b", "text": "ü"}\n{"key": "c", "text": "ü'.encode()[:-1])
    assert journal_of(path).answers == {"b": "ü"}


def test_answer_without_a_row_is_kept_in_memory_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal: Journal[str] = Journal(path, lambda row: (row["key"], ""), lambda _key, _text: None)
    with journal.keeping() as keep:
        keep("a", "refused")
    assert journal.missing({"a": 1, "b": 2}) == {"b": 2}
    assert path.read_text().strip() == ""
