"""`data generate` against a scripted teacher, and files of inputs: any format of pairs, with or without outputs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from making.command_line import tunewright
from making.scripted_teacher import LICENSE, PEOPLE, asked, read, teacher_project, teaching, write
from tunewright.config import DataConfig
from tunewright.core.progress import LogReporter
from tunewright.data.versions import load_version
from tunewright.synthesis.input_files import read_inputs

INPUTS = [f"please name the court of the town number {n} of {n * 7919 % 10007}" for n in range(6)]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def right(body: dict[str, Any], _times: int) -> str:
    return f"court of {asked(body)[-4:]}"


def generate(project: Path, *options: str | Path, rows: list[Any] | None = None) -> Any:
    inputs = project / "inputs.jsonl"
    if not inputs.exists():
        write(inputs, [{"prompt": text} for text in INPUTS] if rows is None else rows)
    return tunewright("data", "generate", inputs, "-p", project, *options)


def test_generate_writes_rows_that_data_add_takes_with_provenance(tmp_path: Path) -> None:
    with teaching(right) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url)
        ran = generate(project, "--json")
        assert ran.code == 0, ran.stderr
        assert len(teacher.bodies) == 3 * len(INPUTS)
    rows = read(project / "generated" / "inputs.jsonl")
    assert [row["messages"] for row in rows] == [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"court of {text[-4:]}"}]
        for text in INPUTS
    ]
    about = rows[0]["generated"]
    assert about.keys() == {
        *("teacher", "version", "url", "date", "prompt", "samples", "agreement", "license", "input"),
    }
    assert (about["teacher"], about["version"], about["samples"], about["agreement"]) == ("big", ["big-1"], 3, 1.0)
    assert about["license"] == LICENSE
    assert about["input"].endswith("inputs.jsonl:1")
    assert ran.document["rows"] == 6
    assert ran.document["used"] == {"calls": 18, "prompt_tokens": 1800, "completion_tokens": 180, "cost": None}

    added = tunewright("data", "add", project / "generated" / "inputs.jsonl", "-p", project, "--json")
    assert (added.code, added.document["added"]) == (0, 6)
    members = {m.example.input_text: m for m in load_version(project / "dataset").members}
    assert all(members[text].generated and members[text].split == "train" for text in INPUTS)
    assert not any(members[text].generated for text, _ in PEOPLE)
    shown = tunewright("data", "show", members[INPUTS[0]].key[:12], "-p", project, "--json").document
    assert shown["metadata"]["generated"] == about


def test_generate_estimates_without_sending(tmp_path: Path) -> None:
    with teaching(right) as teacher:
        prices = {"price_input": 2.0, "price_output": 4.0, "parameters": {"temperature": 1, "max_tokens": 1000}}
        project = teacher_project(tmp_path / "p", teacher.url, generate=prices)
        ran = generate(project, "--estimate", "--json")
        assert teacher.bodies == []
        calls = ran.document["calls"]
        assert (calls["calls"], calls["known"], calls["most_completion_tokens"]) == (18, 0, 18_000)
        tokens = 3 * sum(-(-len(text) // 4) for text in INPUTS)
        assert calls["prompt_tokens"] == tokens
        assert calls["most_cost"] == pytest.approx((2 * tokens + 4 * 18_000) / 1e6)
        text = generate(project, "--estimate").stdout
        assert "18 calls for 6 of 6 inputs" in text
        generate(project)
        assert generate(project, "--estimate", "--json").document["calls"]["known"] == 18


def test_generate_keeps_the_majority_and_counts_disagreement(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> str:
        if asked(body) == INPUTS[0]:
            return ["one", "two", "two"][times]
        return f"sample {times}" if asked(body) == INPUTS[1] else "same"

    with teaching(script) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url, generate={"concurrency": 1})
        ran = generate(project, "--json")
    rows = read(project / "generated" / "inputs.jsonl")
    assert (rows[0]["messages"][-1]["content"], rows[0]["generated"]["agreement"]) == ("two", 0.6667)
    assert ran.document["left_out"] == {"samples disagree": [f"{project}/inputs.jsonl:2"]}


def test_generate_never_asks_for_known_or_held_out_inputs(tmp_path: Path) -> None:
    with teaching(right) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url)
        members = load_version(project / "dataset").members
        held = {split: next(m.example.input_text for m in members if m.split == split) for split in ("test", "dev")}
        known = next(m.example.input_text for m in members if m.split == "train")
        texts = [
            f"{held['test']}!",
            f"{held['dev']}?",
            known.upper(),
            INPUTS[0],
            INPUTS[0],
            f"A {held['test']} Z 1 2 3 4 5 6",
        ]
        ran = generate(project, "--json", rows=[{"prompt": text} for text in texts])
        assert {asked(body) for body in teacher.bodies} == {INPUTS[0]}
    counts = {reason: len(places) for reason, places in ran.document["left_out"].items()}
    assert sum(counts.values()) == 5
    assert counts["the dataset has this input"] == 1
    assert counts["repeats an earlier input of the files"] == 1
    assert counts["near-duplicate of a dev or test input, or of their group"] >= 2


def test_generate_counts_unusable_samples_by_reason(tmp_path: Path, tiny_base_folder: Path) -> None:
    refusal = JSONResponse({"error": {"message": "content_filter"}}, 400)
    answers: dict[str, Any] = {INPUTS[0]: "", INPUTS[1]: refusal, INPUTS[2]: "granted", INPUTS[3]: "perhaps"}
    with teaching(lambda body, _: answers.get(asked(body), "denied")) as teacher:
        structured = {"metric": "exact_match", "structured_outputs": {"choices": ["granted", "denied"]}}
        project = teacher_project(tmp_path / "p", teacher.url, str(tiny_base_folder), evaluate=structured)
        ran = generate(project, "--json")
        assert ran.code == 0, ran.stderr
    assert {reason: len(places) for reason, places in ran.document["left_out"].items()} == {
        "empty answer": 1,
        "refused by a content filter": 1,
        "not in the form of evaluate.structured_outputs": 1,
    }
    with teaching(right) as teacher:
        teacher.finish = "length"
        cut = generate(teacher_project(tmp_path / "cut", teacher.url), "--json")
    assert cut.document["out"] is None
    assert {reason: len(places) for reason, places in cut.document["left_out"].items()} == {
        "cut off at the token limit": 6
    }


def test_generate_filters_by_the_metric_where_the_input_has_an_ideal_output(tmp_path: Path) -> None:
    with teaching(right) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url)
        rows = [
            {"prompt": INPUTS[0], "completion": f"court of {INPUTS[0][-4:]}"},
            {"prompt": INPUTS[1], "completion": "x"},
        ]
        ran = generate(project, "--json", rows=rows)
    assert ran.document["rows"] == 1
    assert ran.document["left_out"] == {"scores under generate.min_score": [f"{project}/inputs.jsonl:2"]}


def test_generate_writes_calls_of_declared_functions(tmp_path: Path) -> None:
    def script(body: dict[str, Any], _times: int) -> dict[str, Any]:
        assert body["tools"] == [WEATHER]
        arguments = '{"city": "Oslo"}' if "Oslo" in asked(body) else '{"town": 1}'
        call = {"id": "call_x", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    with teaching(script) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url, evaluate={"metric": "call_exact_match"})
        rows = [
            {"messages": [{"role": "user", "content": f"weather in {city} now"}], "tools": [WEATHER]}
            for city in ("Oslo", "Bergen")
        ]
        ran = generate(project, "--json", rows=rows)
        assert ran.code == 0, ran.stderr
    (row,) = read(project / "generated" / "inputs.jsonl")
    assert row["messages"][-1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert row["tools"] == [WEATHER]
    (reason,) = ran.document["left_out"]
    assert reason.startswith("invalid answer: ")
    assert tunewright("data", "add", project / "generated" / "inputs.jsonl", "-p", project).code == 0


def test_generate_sends_schema_and_instruction_but_keeps_neither(tmp_path: Path, tiny_base_folder: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    with teaching(lambda _body, times: ['{"n": 1}', '{ "n": 1 }', '{"n":1}'][times]) as teacher:
        evaluate = {"metric": "json", "structured_outputs": {"json_schema": schema}}
        settings = {"instruction": "Reply in JSON.", "concurrency": 1}
        base = str(tiny_base_folder)
        project = teacher_project(tmp_path / "p", teacher.url, base, evaluate=evaluate, generate=settings)
        ran = generate(project, "--json", rows=[{"prompt": INPUTS[0]}])
        assert ran.code == 0, ran.stderr
        body = teacher.bodies[0]
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert body["messages"][0] == {"role": "system", "content": "Reply in JSON."}
    (row,) = read(project / "generated" / "inputs.jsonl")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert row["generated"]["agreement"] == 1.0


def test_generate_names_versions_that_change_in_the_middle(tmp_path: Path) -> None:
    with teaching(right) as teacher:
        teacher.model = lambda count: "big-1" if count < 9 else "big-2"
        project = teacher_project(tmp_path / "p", teacher.url, generate={"concurrency": 1})
        ran = generate(project)
    assert "The teacher's version changed between samples: big-1 (9), big-2 (9)" in ran.stderr
    versions = [row["generated"]["version"] for row in read(project / "generated" / "inputs.jsonl")]
    assert versions == [["big-1"]] * 3 + [["big-2"]] * 3


def test_generate_refuses_secrets_before_anything_is_sent(tmp_path: Path) -> None:
    with teaching(right) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url)
        rows = [{"prompt": "use the key AKIAIOSFODNN7EXAMPLQ with ghp_16C7e42F292c6912E7710c838347Ae178B4a please"}]
        ran = generate(project, rows=rows)
        assert ran.code == 2
        assert "inputs.jsonl:1" in ran.stderr
        assert teacher.bodies == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"license": None, "base_url": "http://127.0.0.1:9/v1", "model": "m"}, "generate.license"),
        ({"base_url": None, "model": None}, "The config has no teacher"),
        ({"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        ({"base_url": "http://127.0.0.1:9/v1", "model": "m", "max_retries": 0}, "does not answer"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "The teacher has no model"),
    ],
)
def test_generate_refuses_an_incomplete_teacher(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    ran = generate(teacher_project(tmp_path / "p", generate=settings))
    assert ran.code == 2
    assert message in ran.stderr
    assert not (tmp_path / "p" / "generated").exists()


def test_generate_pays_for_nothing_twice_after_a_failure_or_a_budget(tmp_path: Path) -> None:
    broken = [PlainTextResponse("<html>busy</html>", 200)]

    def script(body: dict[str, Any], times: int) -> Any:
        return broken[0] if broken and asked(body) == INPUTS[4] else right(body, times)

    with teaching(script) as teacher:
        settings = {"concurrency": 1, "max_retries": 0, "price_input": 1, "price_output": 1}
        project = teacher_project(tmp_path / "p", teacher.url, generate=settings)
        ran = generate(project)
        assert ran.code == 2
        assert "not a chat completion" in ran.stderr
        assert not (project / "generated").exists()
        assert len(teacher.bodies) == 13
        broken.clear()
        assert generate(project).code == 0
        assert len(teacher.bodies) == 13 + 6
        again = generate(project)
        assert (again.code, len(teacher.bodies)) == (0, 19)
        (project / "generated" / "inputs.jsonl").write_text("other\n", encoding="utf-8")
        assert "has other rows" in generate(project).stderr
        assert (project / "generated" / "inputs.jsonl").read_text(encoding="utf-8") == "other\n"

        poor = teacher_project(tmp_path / "poor", teacher.url, generate={**settings, "budget": 0.0012})
        before = len(teacher.bodies)
        ran = generate(poor)
        assert ran.code == 2
        assert "generate.budget" in ran.stderr
        assert 0 < len(teacher.bodies) - before < 18


_TEXTS = re.compile(r"<<<(TASK|ANSWER) \w+>>>\n(.*?)\n<<<END", re.DOTALL)


def judging(honest: bool) -> Any:
    """A teacher that is a judge too: people's answers and those of even inputs are good."""
    known = dict(PEOPLE)

    def script(body: dict[str, Any], times: int) -> str:
        prompt = asked(body)
        if "SCORE: N" not in prompt:
            return right(body, times)
        texts = dict(_TEXTS.findall(prompt))
        good = known[texts["TASK"]] == texts["ANSWER"] if texts["TASK"] in known else int(texts["ANSWER"][-1]) % 2 == 0
        return f"I thought about it.\n**SCORE: {5 if good or not honest else 2}/5**"

    return script


def test_generate_keeps_what_a_tested_judge_scores_high_enough(tmp_path: Path) -> None:
    with teaching(judging(honest=True)) as teacher:
        judge = {"base_url": teacher.url, "model": "judge-1", "controls": 20}
        project = teacher_project(tmp_path / "p", teacher.url, generate={"judge_score": 4}, judge=judge)
        assert "at most 46 calls of the judge" in generate(project, "--estimate").stdout
        ran = generate(project, "--json")
        assert ran.code == 0, ran.stderr
        assert ran.document["judged"] == {"calls": 40 + 6, "cost": None}
    good = [text for text in INPUTS if int(text[-1]) % 2 == 0]
    rows = read(project / "generated" / "inputs.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == good
    assert {(row["generated"]["judge"], row["generated"]["score"]) for row in rows} == {("judge-1", 5)}
    (reason,) = ran.document["left_out"]
    assert reason == "scored under generate.judge_score by the judge"

    with teaching(judging(honest=False)) as teacher:
        judge = {"base_url": teacher.url, "model": "judge-1", "controls": 20}
        refused = teacher_project(tmp_path / "refused", teacher.url, generate={"judge_score": 4}, judge=judge)
        ran = generate(refused)
        assert ran.code == 2
        assert "it is right on 0 of 20 of other rows' answers" in ran.stderr
        assert len(teacher.bodies) == 40, "a judge that fails its test costs nothing of the teacher"
    none = teacher_project(tmp_path / "none", "http://127.0.0.1:9/v1", generate={"judge_score": 4})
    assert "requires a judge" in generate(none).stderr


@pytest.mark.slow
def test_generate_resumes_after_kill_9_without_asking_twice(tmp_path: Path) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def script(body: dict[str, Any], times: int) -> str:
        if len(teacher.bodies) == 8 and processes:
            processes.pop().send_signal(signal.SIGKILL)
        return right(body, times)

    with teaching(script) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url, generate={"concurrency": 1})
        inputs = write(project / "inputs.jsonl", [{"prompt": text} for text in INPUTS])
        command = [sys.executable, "-m", "tunewright", "data", "generate", str(inputs), "-p", str(project)]
        process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
        processes.append(process)
        assert process.wait() == -signal.SIGKILL
        assert not (project / "generated").exists()
        assert generate(project).code == 0
        # The reply that was in flight when the process was killed is asked for again.
        assert len(teacher.bodies) <= 18 + 1
    assert len(read(project / "generated" / "inputs.jsonl")) == 6


def test_generate_samples_a_local_base_and_keeps_its_samples(tmp_path: Path, tiny_base_folder: Path) -> None:
    settings = {
        "base": str(tiny_base_folder),
        "samples": 2,
        "agreement": 0.0,
        "parameters": {"temperature": 1.0, "max_tokens": 8},
    }
    evaluate = {"structured_outputs": {"choices": ["granted", "denied"]}}
    project = teacher_project(
        tmp_path / "p", base=str(tiny_base_folder), generate=settings, evaluate=evaluate, train={"dtype": "float32"}
    )
    ran = generate(project, "--json")
    assert ran.code == 0, ran.stderr
    rows = read(project / "generated" / "inputs.jsonl")
    assert {row["messages"][-1]["content"] for row in rows} <= {"granted", "denied"}
    assert len(rows) == 6
    assert rows[0]["generated"]["base"]
    (journal,) = (project / ".tunewright" / "generate").glob("local-*.jsonl")
    before = journal.read_text(encoding="utf-8")
    assert len(before.split()) >= 12
    # Samples that an earlier version kept are found again.
    assert {(*json.loads(line),) for line in before.split("\n") if line} == {("key", "turn", "cut", "when", "tokens")}
    assert json.loads(generate(project, "--estimate", "--json").stdout)["calls"]["known"] == 12
    assert generate(project).code == 0
    assert journal.read_text(encoding="utf-8") == before


def test_generate_refuses_parameters_that_a_local_base_ignores(tmp_path: Path, tiny_base_folder: Path) -> None:
    settings = {"base": str(tiny_base_folder), "parameters": {"temperature": 1.0, "min_p": 0.1}}
    ran = generate(teacher_project(tmp_path / "p", base=str(tiny_base_folder), generate=settings))
    assert ran.code == 2
    assert "does not take min_p" in ran.stderr


TURN = {"role": "user", "content": "hello you"}


@pytest.mark.parametrize(
    ("row", "config", "answered"),
    [
        ({"prompt": "hello you"}, {}, False),
        ({"prompt": "hello you", "completion": ""}, {}, False),
        ({"prompt": "hello you", "completion": "hi"}, {}, True),
        ({"instruction": "hello", "input": "you"}, {}, False),
        ({"messages": [TURN]}, {}, False),
        ({"messages": [TURN, {"role": "assistant", "content": "hi"}]}, {}, True),
        ({"conversations": [{"from": "human", "value": "hello you"}]}, {}, False),
        ({"q": "hello you"}, {"input": "q", "output": "a"}, False),
        ({"q": "hello you", "a": "hi"}, {"input": "q", "output": "a"}, True),
        ({"x": "hello", "y": "you"}, {"input": "{{ x }} {{ y }}", "output": "{{ answer }}"}, False),
    ],
)
def test_read_inputs_takes_rows_of_any_format(
    tmp_path: Path, row: dict[str, Any], config: dict[str, Any], answered: bool
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({**row, "team": "a"}) + "\n", encoding="utf-8")
    (found,) = read_inputs([path], DataConfig(system_prompt="Be brief.", group_by=("team",), **config), LogReporter())
    assert [m.content.split() for m in found.example.prompt] == [["Be", "brief."], ["hello", "you"]]
    assert (found.answered, found.row.groups, found.place) == (answered, {"team": "a"}, f"{path}:1")


def test_read_inputs_takes_tables_with_an_empty_output_column(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("question,answer,note\nhello you,,1\nand you,,2\n", encoding="utf-8")
    found = read_inputs([path], DataConfig(input="question", output="answer"), LogReporter())
    assert [each.example.input_text for each in found] == ["hello you", "and you"]
    assert (found[0].answered, found[0].row.metadata) == (False, {"note": "1"})
