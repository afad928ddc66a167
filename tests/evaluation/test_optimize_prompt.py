"""``optimize-prompt``: GEPA with a scripted reflection model, on a base whose answers depend on the instruction."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

import tunewright
from making.command_line import tunewright as command
from making.command_line import write_jsonl
from making.forked import kill_when
from making.scripted_reflection import ONE, OWN, TWO, Reflection, counting_base, counting_project, reflecting, rows
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.evidence.prompt_optimization import OptimizedPrompt


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return counting_base(tmp_path_factory.mktemp("base") / "counting")


def opened(folder: Path, base: Path, server: Reflection | None, **optimization: Any) -> Project:
    """The project with its rows added; without a server it has no reflection model."""
    project = tunewright.open(counting_project(folder, base, None if server is None else server.url, **optimization))
    project.data.add([folder / "pairs.jsonl"])
    return project


@dataclass
class Optimized:
    """A project whose prompt is optimized, and what its reflection model was sent, which is gone."""

    folder: Path
    prompt: OptimizedPrompt
    sent: list[str]

    def copy(self, to: Path) -> Project:
        return tunewright.open(shutil.copytree(self.folder, to))


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Optimized:
    with reflecting() as server:
        project = opened(tmp_path_factory.mktemp("optimized") / "project", base, server)
        return Optimized(project.folder.root, project.optimize_prompt().prompt, server.prompts)


def test_gepa_finds_the_better_instruction_and_dev_chooses_it(optimized: Optimized) -> None:
    prompt, project = optimized.prompt, tunewright.open(optimized.folder)
    assert [each.instruction for each in prompt.candidates[:2]] == [OWN, TWO]
    assert prompt.instruction == ONE
    assert prompt.best.dev == prompt.best.validation == 1.0
    assert prompt.candidates[prompt.best.parents[0]].instruction == TWO
    assert (prompt.place, prompt.own, prompt.optimizer) == ("system", OWN, "gepa 0.1.4")
    assert prompt.feedback_rows + prompt.validation_rows == len(project.data.version().examples("train"))
    assert prompt.reflection.calls == len(optimized.sent) == prompt.proposals
    assert prompt.reflection.prompt_tokens == 1000 * len(optimized.sent)
    again = project.optimize_prompt()
    assert (again.optimized, again.prompt.model_dump(mode="json")) == (False, prompt.model_dump(mode="json"))


def test_repeated_instruction_is_measured_on_dev_once(tmp_path: Path, base: Path) -> None:
    with reflecting(lambda _: TWO) as server:
        prompt = opened(tmp_path / "project", base, server).optimize_prompt().prompt
    assert [each.instruction for each in prompt.candidates].count(TWO) > 1
    assert [each.instruction for each in prompt.candidates if each.dev is not None] == [OWN, TWO]


def test_only_training_rows_are_sent_to_the_reflection_model(optimized: Optimized) -> None:
    version, sent = tunewright.open(optimized.folder).data.version(), "\n".join(optimized.sent)
    seen = Counter(m.split for m in version.members if m.example.input_text in sent)
    assert set(seen) == {"train"}
    assert seen["train"] <= optimized.prompt.feedback_rows
    assert "The correct answer is: y" in sent


def test_optimized_instruction_is_measured_as_further_arms(optimized: Optimized, tmp_path: Path) -> None:
    prompt = optimized.prompt
    advice = optimized.copy(tmp_path / "project").prompting().advice
    arms = {arm.name: arm for arm in advice.arms}
    assert {"zero-shot", "zero-shot-optimized", "retrieved-1", "retrieved-1-optimized"} == set(arms)
    assert advice.best == "zero-shot-optimized"
    assert arms["zero-shot-optimized"].score("exact_match").value == prompt.best.dev == 1.0
    assert arms["zero-shot"].score("exact_match").value == prompt.candidates[0].dev
    assert arms["zero-shot-optimized"].optimized == prompt.digest


@pytest.mark.slow
def test_adapter_is_measured_with_the_optimized_instruction(optimized: Optimized, tmp_path: Path) -> None:
    project, prompt = optimized.copy(tmp_path / "project"), optimized.prompt
    project.train()
    evidence = project.evaluate().evidence
    arms = {arm.name: arm for arm in evidence.arms if arm.kind != "free"}
    assert list(arms) == ["zero-shot", "zero-shot-optimized", "tuned", "tuned+retrieved-1", "tuned-optimized"]
    assert arms["tuned-optimized"].optimized == arms["zero-shot-optimized"].optimized == prompt.digest
    assert arms["tuned-optimized"].prompt_tokens == arms["zero-shot-optimized"].prompt_tokens
    assert arms["tuned-optimized"].prompt_tokens > arms["tuned"].prompt_tokens
    assert ("tuned-optimized", "tuned") in {(c.treatment, c.control) for c in evidence.contrasts}
    assert evidence.prompt_optimization is not None
    assert evidence.prompt_optimization.id == prompt.id
    assert evidence.opening is not None
    first = evidence.opening.declared[0]
    assert (first.treatment, first.control) == ("tuned", "zero-shot-optimized")
    page = project.report().read_text(encoding="utf-8")
    assert ONE in page
    assert "tried" in page
    assert "No prompt optimizer was run" not in page


def test_estimate_names_limits_and_sends_nothing(tmp_path: Path, base: Path) -> None:
    with reflecting() as server:
        project = opened(tmp_path / "project", base, server, max_reflection_calls=7, price_input=1.0, price_output=10.0)
        root = project.folder.root
        ran = command("optimize-prompt", "--estimate", "-p", root, "--json")
        assert ran.code == 0, ran.stderr
        assert ran.document["reflection_calls"] == 7
        assert ran.document["most_completion_tokens"] == 7 * 4096
        assert ran.document["most_cost"] == pytest.approx((ran.document["prompt_tokens"] + 70 * 4096) / 1e6)
        assert server.prompts == []
        usage = project.optimize_prompt().prompt
        assert usage.reflection.calls <= ran.document["reflection_calls"]
        assert usage.metric_calls <= ran.document["metric_calls"]
        assert max(map(len, server.prompts)) <= 4 * ran.document["prompt_tokens"] / 7


# Endpoints that fail, and limits that are reached


def test_optimize_prompt_refuses_a_config_without_a_reflection_model(tmp_path: Path, base: Path) -> None:
    project = opened(tmp_path / "project", base, None)
    ran = command("optimize-prompt", "-p", project.folder.root)
    assert ran.code == 2
    assert "The config has no reflection model" in ran.stderr
    assert not (project.folder.root / "prompts").exists()


def test_reflection_model_is_the_judge_by_default(tmp_path: Path, base: Path) -> None:
    with reflecting() as server:
        folder = counting_project(tmp_path / "project", base, None)
        with (folder / "tunewright.yaml").open("a", encoding="utf-8") as config:
            config.write(f"judge: {{base_url: '{server.url}', model: the-judge}}\n")
        project = tunewright.open(folder)
        project.data.add([folder / "pairs.jsonl"])
        prompt = project.optimize_prompt().prompt
        assert (prompt.reflection.model, prompt.instruction) == ("the-judge", ONE)


def test_failing_endpoint_is_one_error_and_the_next_run_pays_nothing_twice(tmp_path: Path, base: Path) -> None:
    response = JSONResponse({"error": {"message": "no such model"}}, 404)
    with reflecting() as server:
        project = opened(tmp_path / "project", base, server)
        root = project.folder.root
        server.misbehave = lambda count: response if count else None  # the first reply is fine
        ran = command("optimize-prompt", "-p", root)
        assert ran.code == 2
        assert "no such model" in ran.stderr
        assert "evaluate.prompt_optimization.reflection_model" in ran.stderr
        assert not (root / "prompts").exists()
        paid = list(server.prompts)
        server.misbehave = lambda _count: None
        assert command("optimize-prompt", "-p", root).code == 0
        assert paid[0] not in server.prompts[len(paid) :]


def test_missing_key_is_reported_before_any_answer(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFLECTION_KEY", raising=False)
    with reflecting() as server:
        project = opened(tmp_path / "project", base, server)
        config = project.folder.root / "tunewright.yaml"
        config.write_text(
            config.read_text().replace("model: scripted", "model: scripted\n      api_key_env: REFLECTION_KEY")
        )
        with pytest.raises(UserError, match="REFLECTION_KEY is not set"):
            tunewright.open(project.folder.root).optimize_prompt()
        assert not (project.folder.work / "generations").exists()


PRICES = {"price_input": 1000.0, "price_output": 0.0, "parameters": {"max_tokens": 100}}
"""A request costs 1; before it is sent, its bytes are its upper limit."""


def test_spent_budget_keeps_the_best_instruction_so_far(tmp_path: Path, base: Path) -> None:
    with reflecting() as server:
        project = opened(tmp_path / "project", base, server, budget=2.9, **PRICES)
        ran = command("optimize-prompt", "-p", project.folder.root, "--json")
        assert ran.code == 0, ran.stderr
        prompt = ran.document["prompt"]
        assert prompt["stopped"] == "the budget was used up"
        assert "The best instruction so far is kept" in ran.stderr
        assert prompt["reflection"]["calls"] == len(server.prompts) == prompt["reflection"]["cost"] < 3
        assert prompt["candidates"][prompt["chosen"]]["instruction"] in {TWO, ONE}


def test_budget_too_small_for_one_call_is_an_error(tmp_path: Path, base: Path) -> None:
    with reflecting() as server:
        project = opened(tmp_path / "project", base, server, budget=0.5, **PRICES)
        with pytest.raises(UserError, match="next request may cost") as refused:
            project.optimize_prompt()
        assert refused.value.where == "evaluate.prompt_optimization.budget"
        assert server.prompts == []


def test_limit_of_reflection_calls_ends_the_search(tmp_path: Path, base: Path) -> None:
    with reflecting() as server:
        project = opened(tmp_path / "project", base, server, max_reflection_calls=2)
        prompt = project.optimize_prompt().prompt
        assert prompt.stopped == "max_reflection_calls (2) was reached"
        assert len(server.prompts) == 2
        assert prompt.instruction in {TWO, ONE}


def test_replies_without_an_instruction_are_counted(tmp_path: Path, base: Path) -> None:
    with reflecting(lambda _prompt: "") as server:
        project = opened(tmp_path / "project", base, server, max_reflection_calls=3)
        prompt = project.optimize_prompt().prompt
        assert (prompt.proposals, prompt.chosen, prompt.instruction) == (0, 0, None)
        assert prompt.notes == ("a reply has no instruction (3 times)",)
        assert "No candidate beats the pairs' own instruction on dev" in prompt.summary
    assert "zero-shot-optimized" not in {arm.name for arm in project.prompting().advice.arms}


def test_cut_replies_and_too_long_instructions_are_counted(tmp_path: Path, base: Path) -> None:
    with reflecting() as server:
        project = opened(tmp_path / "project", base, server, max_reflection_calls=2)
        server.finish = "length"
        assert project.optimize_prompt().prompt.notes == ("a reply was cut at its token limit (2 times)",)
    with reflecting(lambda _prompt: "Q" * 3000) as server:
        project = opened(tmp_path / "long", base, server, max_reflection_calls=1)
        prompt = project.optimize_prompt().prompt
        (note,) = prompt.notes
        assert "does not fit the base's context of 2,048" in note
        assert len(prompt.candidates) == 1


# Stale, changed and interrupted


def test_optimized_prompt_of_other_data_is_named_and_not_used(
    optimized: Optimized, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = optimized.copy(tmp_path / "project")
    project.data.add([write_jsonl(tmp_path / "more.jsonl", rows(10, seed=5)[:5])])
    project = tunewright.open(project.folder.root)
    arms = {arm.name for arm in project.prompting().advice.arms}
    assert "zero-shot-optimized" not in arms
    assert f"The optimized prompt {optimized.prompt.id} is stale and not used" in caplog.text
    assert "another dataset version" in caplog.text


def test_changed_prompt_file_is_refused(optimized: Optimized, tmp_path: Path) -> None:
    project = optimized.copy(tmp_path / "project")
    file = project.folder.prompts / f"{optimized.prompt.id}.json"
    file.write_text(file.read_text(encoding="utf-8").replace(ONE, "Answer with nothing."), encoding="utf-8")
    with pytest.raises(UserError, match="was changed after it was written"):
        project.prompting()


@pytest.mark.slow
def test_optimize_prompt_resumes_after_kill_without_paying_twice(
    optimized: Optimized, tmp_path: Path, base: Path
) -> None:
    with reflecting() as server:
        root = opened(tmp_path / "project", base, server).folder.root
        kill_when(lambda: bool(server.prompts), lambda: command("optimize-prompt", "-p", root))
        resumed = command("optimize-prompt", "-p", root, "--json").document["prompt"]
        # A reply that was on its way at the kill may be asked for again.
        assert len(server.prompts) - len(set(server.prompts)) <= 1
    whole, own = optimized.prompt.model_dump(mode="json"), {"created", "id", "lineage", "reflection"}
    assert {key: whole[key] for key in whole.keys() - own} == {key: resumed[key] for key in whole.keys() - own}
