"""An incumbent's endpoint as it is in the world: down, limited, changing, cutting; nothing is paid for twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse

import tunewright as package
from making.command_line import tiny_project, tunewright, write_jsonl
from making.forked import kill_when
from making.hosted_model import StandIn, first_word, stand_in, with_incumbents
from tunewright.api import Project
from tunewright.config import IncumbentConfig
from tunewright.core.errors import UserError
from tunewright.data.versions import Member
from tunewright.evaluation.frozen_answers import (
    FrozenAnswer,
    FrozenSet,
    IncumbentModel,
    incumbent_models,
    read_frozen,
    require_ready,
)
from tunewright.model_io import client

PRICES = {"price_input": 10.0, "price_output": 100.0}  # 100 prompt and 10 reply tokens: 0.002 a call


class Warnings:
    """A reporter that remembers warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def __getattr__(self, name: str) -> Any:
        from tunewright.core.progress import LogReporter

        return getattr(LogReporter(), name)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Project:
    """A project with a dataset and no adapter."""
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    opened = package.open(folder)
    opened.data.add([folder / "pairs.jsonl"])
    return opened


def model_of(
    project: Project, server: StandIn, reporter: Any = None, **settings: Any
) -> tuple[IncumbentModel, tuple[Member, ...]]:
    """An incumbent at the server, and the test rows."""
    config = IncumbentConfig.model_validate(
        {"name": "hosted", "base_url": server.url, "model": "stand-in", "concurrency": 1, **settings}
    )
    rows = project.data.version().examples("test")
    return IncumbentModel(project.folder, config, reporter or Warnings()), tuple(rows)


def ask(project: Project, server: StandIn, reporter: Any = None, **settings: Any) -> FrozenSet:
    model, rows = model_of(project, server, reporter, **settings)
    return model.answers(rows, "test")


def failing_after(count: int, response: Any) -> Any:
    return lambda earlier: response if earlier >= count else None


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (PlainTextResponse("<html>maintenance</html>"), "not a chat completion: '<html>maintenance"),
        (JSONResponse({"error": {"message": "insufficient_quota"}}, 429), "insufficient_quota"),
        (JSONResponse({"error": {"message": "model stopped"}}, 404), "model stopped"),
    ],
)
def test_failing_endpoint_ends_in_one_error_and_loses_no_answer(project: Project, response: Any, said: str) -> None:
    with stand_in() as server:
        server.misbehave = failing_after(5, response)
        with pytest.raises(UserError, match="Finished answers are kept") as raised:
            ask(project, server, max_retries=1)
        assert said in str(raised.value)
        assert raised.value.where == "evaluate.incumbents.hosted.base_url"
        assert not project.folder.incumbents.exists()
        server.bodies.clear()
        server.misbehave = lambda _count: None
        frozen = ask(project, server)
        assert len(frozen.given) == len(frozen.answers) == len(server.bodies) + 5


def test_endpoint_that_is_down_or_slow_ends_in_one_error(project: Project) -> None:
    with stand_in() as server:
        server.slow_s = 0.5
        with pytest.raises(UserError, match=r"no reply within 0.1 s"):
            ask(project, server, timeout=0.1, max_retries=0)
    with pytest.raises(UserError, match=r"no connection"):
        ask(project, server, max_retries=0)


def test_budget_is_never_exceeded_and_a_larger_one_resumes(project: Project) -> None:
    with stand_in() as server:
        limited = {**PRICES, "parameters": {"max_tokens": 10}}
        with pytest.raises(UserError, match=r"budget of 0\.011 is used up") as raised:
            ask(project, server, budget=0.011, **limited)
        assert raised.value.where == "evaluate.incumbents.hosted.budget"
        paid = len(server.bodies)
        assert 0 < 0.002 * paid <= 0.011
        frozen = ask(project, server, budget=1.0, **limited)
        assert len(server.bodies) == len(frozen.answers)


def test_change_of_the_model_version_is_counted_and_reported(project: Project) -> None:
    reporter = Warnings()
    with stand_in() as server:
        server.version = lambda count: "v1" if count < 4 else "v2"
        frozen = ask(project, server, reporter)
    assert frozen.versions == {"v1": 4, "v2": len(frozen.answers) - 4}
    assert any("changed its model version on test: v1 (4), v2" in warning for warning in reporter.warned)


def test_cut_answers_are_counted_and_reported(project: Project) -> None:
    reporter = Warnings()
    with stand_in() as server:
        server.finish = lambda count: "length" if count < 3 else "stop"
        frozen = ask(project, server, reporter)
    assert sum(answer.finish == "length" for answer in frozen.given) == 3
    assert any("3 of 12 answers of incumbent-hosted on test reached its token limit" in w for w in reporter.warned)


def test_refused_rows_are_gaps_with_their_reasons(project: Project) -> None:
    reporter = Warnings()
    refusal = JSONResponse({"error": {"code": "content_filter", "message": "filtered"}}, 400)
    with stand_in() as server:
        server.misbehave = lambda count: refusal if count in {1, 2} else None
        server.finish = lambda count: "content_filter" if count == 5 else "stop"
        frozen = ask(project, server, reporter)
    assert sorted(frozen.gaps.values()) == ["refused by a content filter"] * 2 + ["stopped by a content filter"]
    assert len(frozen.given) == len(frozen.answers) - 3
    assert any("3 of 12 test items have no answer of incumbent-hosted" in warning for warning in reporter.warned)
    with stand_in() as gone:
        pass
    model, rows = model_of(project, server)
    assert model.answers(rows, "test").gaps == frozen.gaps, "a frozen refusal is not asked again"
    assert gone.bodies == []


def test_frozen_answers_are_used_for_rows_of_a_later_version(project: Project) -> None:
    root = project.folder.root
    with stand_in() as server:
        before = ask(project, server)
        assert len(read_frozen(before.path)) == len(before.answers)
        more = [{"prompt": f"pink mauve number {n * 31}", "completion": "pink"} for n in range(60)]
        project.data.add([write_jsonl(root / "more.jsonl", more)])
        after = ask(project, server)
        assert len(after.answers) > len(before.answers)
        assert len(server.bodies) == len(after.answers)
    more = [{"prompt": f"black white number {n * 37}", "completion": "black"} for n in range(60)]
    project.data.add([write_jsonl(root / "again.jsonl", more)])
    model, rows = model_of(project, server, frozen=True)
    model.require_ready(rows)
    partly = model.answers(rows, "test")
    assert set(partly.gaps.values()) == {"no frozen answer"}
    assert len(partly.given) == len(after.answers)
    assert model.unfrozen(rows) == len(rows) - len(after.answers)


def test_frozen_incumbent_without_any_answer_is_refused(project: Project) -> None:
    with stand_in() as server:
        model, rows = model_of(project, server, frozen=True)
        with pytest.raises(UserError, match="No answer of hosted to these 12 rows is frozen"):
            model.require_ready(rows)
        assert server.bodies == []


def test_system_prompt_replaces_the_rows_own(project: Project) -> None:
    root = project.folder.root
    row = [{"role": "system", "content": "Old."}, {"role": "user", "content": "red"}]
    write_jsonl(root / "chat.jsonl", [{"messages": [*row, {"role": "assistant", "content": "red"}]}])
    project.data.add([root / "chat.jsonl"])
    member = next(m for m in project.data.version().members if m.example.messages[0].role == "system")
    with stand_in() as server:
        model, _ = model_of(project, server, system_prompt="New.")
        assert [turn["content"] for turn in model.request(member.example).conversation] == ["New.", "red"]
        model, _ = model_of(project, server)
        assert [turn["content"] for turn in model.request(member.example).conversation] == ["Old.", "red"]


def test_functions_are_sent_as_tools_and_calls_compare_in_canonical_form(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    called = {"name": "weather", "arguments": '{"city": "Oslo", "at": 1}'}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Weather number {n}?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "call_1", "type": "function", "function": called}],
                },
            ],
            "tools": [tool],
        }
        for n in range(40)
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    project = package.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    spaced = {"name": "weather", "arguments": '{ "at":1,  "city":"Oslo" }'}
    with stand_in(lambda _body: {"content": None, "tool_calls": [{"id": "x", "function": spaced}]}) as server:
        model, _ = model_of(project, server)
        member = project.data.version().members[0]
        (answer,) = model.answers([member], "test").given
        assert server.bodies[0]["tools"][0]["function"]["name"] == "weather"
        assert [m["role"] for m in server.bodies[0]["messages"]] == ["user"]
    assert answer.answer == member.example.output


def test_incumbent_without_a_model_or_with_the_name_of_another_is_refused(project: Project) -> None:
    one = {"name": "hosted", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    for incumbents, said in (
        ([one, dict(one)], "two incumbents are named hosted"),
        ([{"name": "hosted", "base_url": "http://127.0.0.1:9/v1"}], "set base_url and model"),
        ([{**one, "budget": 1}], "a budget requires price_input and price_output"),
        ([{**one, "name": "a b"}], "incumbents"),
    ):
        with_incumbents(project.folder.root, *incumbents)
        ran = tunewright("evaluate", "--estimate", "-p", project.folder.root)
        assert ran.code == 2 and said in ran.stderr
    with_incumbents(project.folder.root)
    ran = tunewright("evaluate", "--estimate", "-p", project.folder.root)
    assert ran.code == 0 and "This counts an adapter that is not trained yet." in ran.stdout


@pytest.mark.slow
def test_killed_run_resumes_without_paying_twice(project: Project) -> None:
    """Only requests in progress are sent again: nobody stored their replies."""
    root = project.folder.root
    with stand_in(first_word) as server:
        server.slow_s = 0.05
        incumbent = {"name": "hosted", "base_url": server.url, "model": "stand-in", "concurrency": 2}
        with_incumbents(root, incumbent)

        def answer() -> None:
            again = package.open(root)
            for model in incumbent_models(again.folder, again.reporter):
                model.answers(again.data.version().examples("test"), "test")

        kill_when(lambda: len(server.bodies) >= 5, answer)
        answer()
        assert len(server.prompts) - len(set(server.prompts)) <= 2
        require_ready(package.open(root).folder, project.data.version(), ["test"], project.reporter)
    (file,) = project.folder.incumbents.iterdir()
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1 + 12
    assert json.loads(file.read_text(encoding="utf-8").splitlines()[0])["incumbent"] == "hosted"


@pytest.mark.parametrize(
    ("text", "answer"), [("<think>two and two</think>\n\n4.", "4."), ("<think>two", ""), ("4.", "4.")]
)
def test_answer_is_without_the_thinking_that_the_endpoint_writes(text: str, answer: str) -> None:
    row = dict.fromkeys(FrozenAnswer.model_fields, None) | {"key": "k", "request": "r", "text": text, "calls": ()}
    row |= {"at_once": 1, "prompt_tokens": 1, "completion_tokens": 9, "estimated": False}
    assert FrozenAnswer.model_validate(row).answer == answer
