"""Cost of a judge, and the reference model that answers in addition to the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunewright as package
from making.command_line import pairs, tunewright, write_jsonl
from making.evidence import make_items
from making.human_evaluations import save
from making.scripted_judge import honest, read_prompt, scripted, write_project
from tunewright.evidence.files import load_evidence, load_items

CONTROL_QUESTIONS = 14 * 6


# What it costs


PRICES = {"price_input": 10.0, "price_output": 100.0}  # 100 prompt and 10 reply tokens: 0.002 a reply


def test_estimate_sends_nothing_and_matches_the_later_requests(tmp_path: Path) -> None:
    project = tmp_path / "project"
    with scripted(honest) as server:
        write_project(project, {"base_url": server.url, "model": "scripted", **PRICES})
        estimated = tunewright("judge", "--estimate", "-p", project, "--json").document
        assert server.bodies == []
        judged = tunewright("judge", "-p", project, "--json").document["judge"]
        assert estimated["controls"] == CONTROL_QUESTIONS
        assert estimated["controls"] + estimated["questions"] == len(server.bodies) == judged["spent"]["calls"]
        characters = sum(len(prompt) for prompt in server.prompts)
        assert estimated["prompt_tokens"] == pytest.approx(characters / 4, rel=0.01)
        assert estimated["most_completion_tokens"] == 512 * len(server.bodies)
        assert judged["spent"]["cost"] == pytest.approx(0.002 * len(server.bodies))
        again = tunewright("judge", "--estimate", "-p", project, "--json").document
        assert (again["known"], again["prompt_tokens"], again["most_cost"]) == (len(server.bodies), 0, 0)


def test_missing_token_counts_are_estimated_and_reported(tmp_path: Path) -> None:
    with scripted(honest) as server:
        server.usage = False
        write_project(tmp_path / "project", {"base_url": server.url, "model": "scripted", **PRICES})
        spent = tunewright("judge", "-p", tmp_path / "project", "--json").document["judge"]["spent"]
        assert spent["estimated"] == spent["calls"] == len(server.bodies)
        assert spent["prompt_tokens"] == sum(-(-len(prompt) // 4) for prompt in server.prompts)


# The reference model


def test_reference_answers_are_read_from_a_file_by_pair_key(tmp_path: Path) -> None:
    items, project = make_items(), tmp_path / "project"
    with scripted(honest) as server:
        settings = {"base_url": server.url, "model": "scripted", "reference_model": {"answers": "others.jsonl"}}
        evaluation = write_project(project, settings, items)
        rows = [{"key": i.key, "answer": i.reference if n % 2 else f"**none** {n}"} for n, i in enumerate(items)]
        write_jsonl(project / "others.jsonl", rows[1:])
        ran = tunewright("judge", "-p", project, "--json")
        assert (ran.code, server.bodies) == (2, [])
        assert f"1 of 60 test items have no answer (first: {items[0].key}" in ran.document["error"]["what"]
        write_jsonl(project / "others.jsonl", [*rows, rows[3]])
        assert "others.jsonl:61: Duplicate key" in tunewright("judge", "-p", project).stderr
        write_jsonl(project / "others.jsonl", rows)
        assert tunewright("judge", "-p", project).code == 0
    section = load_evidence(evaluation).judge
    assert section is not None
    assert [(arm.name, arm.correct) for arm in section.arms][2] == ("reference model", 30)
    against = section.preferences[1]
    right = [i.answers["tuned"] == i.reference for i in items]
    assert against.rate.wins == sum(r for n, r in enumerate(right) if n % 2 == 0)
    assert against.rate.losses == sum(not r for n, r in enumerate(right) if n % 2)
    assert against.stripped is not None
    assert (section.reference_model, section.reference_spent) == ("others.jsonl", None)


def test_reference_model_gets_the_test_prompts(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = tmp_path / "project"
    with scripted(honest) as server:
        other = {"base_url": server.url, "model": "other", "parameters": {"max_tokens": 64}, **PRICES}
        settings = {"base_url": server.url, "model": "scripted", "reference_model": other}
        evaluation = write_project(project, settings)
        rows = pairs(40)
        config = f"base_model: {tiny_base_folder}\ndata:\n  system_prompt: Give the first word.\n"
        (project / "tunewright.yaml").write_text(config + (project / "tunewright.yaml").read_text())
        opened = package.open(project)
        opened.data.add([write_jsonl(project / "pairs.jsonl", rows)])
        version = opened.data.version()
        members = {m.example.input_text: m for m in version.members}
        items = [
            item.model_copy(update={"key": members[row["prompt"]].key, "input": row["prompt"], "reference": f"r{n}"})
            for n, (item, row) in enumerate(zip(load_items(evaluation), rows, strict=False))
        ]
        evidence = load_evidence(evaluation)
        lineage = {**evidence.lineage, "dataset": version.digest}
        save(evaluation, items, evidence.model_copy(update={"lineage": lineage}))

        estimated = opened.estimate_judge()
        assert (estimated.reference_answers, server.bodies) == (40, [])
        section = opened.judge().judgement
        asked = [body for body in server.bodies if body["model"] == "other"]
        assert sorted(body["messages"][1]["content"] for body in asked) == sorted(row["prompt"] for row in rows)
        assert all(body["messages"][0] == {"role": "system", "content": "Give the first word."} for body in asked)
        assert all(body["max_tokens"] == 64 for body in asked)
        assert read_prompt(server.prompts[-1]).task.startswith("Give the first word.\n\n")
        assert section.reference_spent is not None
        assert section.reference_spent.calls == 40
        assert section.reference_spent.cost == pytest.approx(40 * 0.002)
        assert estimated.controls + estimated.questions == section.spent.calls
