"""Rows from a teacher, an incumbent, an optimized prompt and preference tuning: one project, by the command line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

import tunewright as library
from making.command_line import tunewright, write_jsonl
from making.scripted_reflection import ONE, counting_base, counting_project, reflecting, rows
from making.scripted_teacher import LICENSE, asked, teaching

HUMAN, GENERATED = 80, 80


def _right(body: dict[str, Any], _times: int) -> str:
    """The right answer: the teacher's, and that of the incumbent."""
    return "n" if asked(body).endswith("Z") else "y"


def _section(project: Path, name: str, values: dict[str, Any]) -> None:
    file = project / "tunewright.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config[name] = config.get(name, {}) | values
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _accept(project: Path) -> None:
    """Accept every row through the spreadsheet."""
    sheet = project / "review.csv"
    assert tunewright("data", "review", "--reviewer", "ann", "--export", sheet, "-p", project).code == 0
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({**line, "verdict": "right"} for line in lines)
    assert tunewright("data", "review", "--reviewer", "ann", "--import", sheet, "-p", project).code in (0, 4)


@pytest.mark.slow
def test_walk_from_inputs_without_answers_to_a_report_with_every_comparison(tmp_path: Path) -> None:
    """Half of the rows are a teacher's. The report compares with a hosted model, GEPA's prompt and the SFT parent."""
    with teaching(_right) as hosted, reflecting() as reflection:
        project = counting_project(tmp_path / "project", counting_base(tmp_path / "base"), reflection.url)
        endpoint = {"base_url": hosted.url, "model": "hosted", "price_input": 1.0, "price_output": 2.0}
        _section(project, "generate", {**endpoint, "license": LICENSE, "samples": 2})
        _section(project, "evaluate", {"incumbents": [{"name": "hosted", **endpoint}]})

        def run(*arguments: str | Path) -> Any:
            ran = tunewright(*arguments, "-p", project, "--json")
            assert ran.code in (0, 3, 4), ran.stderr
            return ran.document

        made = rows(HUMAN + GENERATED, seed=3)
        run("data", "add", write_jsonl(project / "human.jsonl", made[:HUMAN]))
        inputs = [{"messages": row["messages"][:-1]} for row in made[HUMAN:]]
        generated = run("data", "generate", write_jsonl(project / "inputs.jsonl", inputs))
        assert generated["rows"] > 0.8 * GENERATED
        run("data", "add", generated["out"])
        _accept(project)

        run("optimize-prompt")
        first = run("train")["adapter"]
        held = {"dev", "test"}
        project_rows = library.open(project).data.version().members
        assert {m.split for m in project_rows if m.generated} == {"train"}
        write_jsonl(project / "pairs.jsonl", [_pair(m.example.as_row()) for m in project_rows if m.split == "train"])
        run("data", "add", project / "pairs.jsonl")
        _section(project, "train", {"from": first, "method": "dpo", "learning_rate": 0.001})
        child = run("train")["adapter"]
        assert child != first

        asked_before = len(hosted.bodies)
        evidence = run("evaluate")["evidence"]
        arms = {arm["name"]: arm for arm in evidence["arms"]}
        assert {"incumbent-hosted", "parent", "zero-shot-optimized", "tuned-optimized", "tuned"} <= arms.keys()
        assert arms["incumbent-hosted"]["scores"]["exact_match"]["value"] == 1.0
        assert ONE in str(evidence["prompt_optimization"])
        assert ("tuned", "parent") in {(each["treatment"], each["control"]) for each in evidence["contrasts"]}
        held_out = sum(m.split in held for m in library.open(project).data.version().members)
        assert len(hosted.bodies) == asked_before + held_out, "dev and test, a call for each row"
        paid = len(hosted.bodies), len(reflection.prompts)
        for again in (["evaluate"], ["optimize-prompt"], ["data", "generate", project / "inputs.jsonl"]):
            run(*again)
        assert (len(hosted.bodies), len(reflection.prompts)) == paid, "nothing is paid for twice"
        (outcome,) = run("verdict")["incumbents"]
        assert outcome["name"] == "hosted" and outcome["outcome"] in ("keep", "can't tell")
        page = Path(run("report")["report"]).read_text(encoding="utf-8")
        for shown in ("incumbent-hosted", "parent", "zero-shot-optimized", ONE):
            assert shown in page, shown


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the other letter as its rejected answer, in OpenAI's form."""
    *prompt, chosen = row["messages"]
    rejected = {"role": "assistant", "content": "n" if chosen["content"] == "y" else "y"}
    return {"input": {"messages": prompt}, "preferred_output": [chosen], "non_preferred_output": [rejected]}
