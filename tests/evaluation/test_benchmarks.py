"""Suites of general ability against plain computations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tunewright
from making.base_and_tuned import likeliest_choice, only_adapter, plain_base, plain_tuned, short_turns
from making.command_line import tiny_project, write_jsonl
from making.command_line import tunewright as command
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.evaluation.benchmarks.bench import draw
from tunewright.evaluation.benchmarks.likelihoods import OwnSamples, read_questions
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.evidence.benchmarks import Benchmarks, Suite
from tunewright.open_project import OpenProject
from tunewright.training import self_samples

CONFIG = """regressions:
  samples: 6
  multiple_choice: [{file: questions.jsonl, limit: 12}]
  instruction_following: [{file: prompts.jsonl, max_new_tokens: 12}]
  margin: 0.05
"""


@pytest.fixture(scope="module", autouse=True)
def turns_end() -> Iterator[None]:
    with short_turns(100):
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Project:
    """A project with suites of each kind and an adapter."""
    folder = tiny_project(tmp_path_factory.mktemp("regressions") / "project", tiny_base_folder)
    file = folder / "tunewright.yaml"
    file.write_text(file.read_text().replace("regressions:\n  samples: 0\n", CONFIG))
    words = ["stone", "water", "a long river", "sun", "ice and snow"]
    rng = np.random.default_rng(0)
    write_jsonl(
        folder / "questions.jsonl",
        [
            {"query": f"Question: what is {n}?", "choices": rng.permutation(words)[:4].tolist(), "gold": n % 4}
            for n in range(15)
        ],
    )
    write_jsonl(
        folder / "prompts.jsonl",
        [{"prompt": f"Say {n}.", "checks": [{"check": "occurrences", "of": "e", "at_most": n % 2}]} for n in range(8)],
    )
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return project


@pytest.fixture(scope="module")
def measured(project: Project) -> dict[str, Any]:
    ran = command("regressions", "-p", project.folder.root, "--json")
    assert ran.code == 4, ran.stderr  # a base of random weights is above no floor: nothing may decide
    return ran.document


@pytest.fixture(scope="module")
def adapter(project: Project) -> Adapter:
    return only_adapter(project)


def _two(base: Path, adapter: Adapter) -> dict[str, Any]:
    return {"base": plain_base(base), "tuned": plain_tuned(base, adapter.folder)}


def _suite(document: dict[str, Any], kind: str) -> Suite:
    (found,) = (s for s in document["regressions"]["suites"] if s["kind"] == kind)
    return Suite.model_validate(found)


def test_samples_suite_equals_plain_likelihoods_and_divergences(
    project: Project, adapter: Adapter, measured: dict[str, Any], tiny_base_folder: Path
) -> None:
    """One answer at a time, by log-softmax over the whole vocabulary in double precision."""
    arm_runner = open_arm_runner(OpenProject(project.folder, project.reporter))
    rows = OwnSamples(project.folder, arm_runner.version, arm_runner.generator, 6).unseen(adapter)
    models = _two(tiny_base_folder, adapter)
    sums = {"base": 0.0, "tuned": 0.0, "divergence": 0.0}
    count = 0
    for row in rows.values():
        places = [place for place, judged in enumerate(row.loss_mask) if judged]
        with torch.inference_mode():
            log_p = {n: m(torch.tensor([row.ids])).logits[0].double().log_softmax(-1) for n, m in models.items()}
        for place in places:
            p, q = log_p["base"][place - 1], log_p["tuned"][place - 1]
            sums["base"] -= float(p[row.ids[place]])
            sums["tuned"] -= float(q[row.ids[place]])
            sums["divergence"] += float((p.exp() * (p - q)).sum())
        count += len(places)
    suite = _suite(measured, "samples")
    assert (suite.items, suite.unit, suite.margin, suite.gates) == (6, "nats per token", None, False)
    assert suite.base == pytest.approx(sums["base"] / count, rel=1e-4)
    assert suite.tuned == pytest.approx(sums["tuned"] / count, rel=1e-4)
    assert suite.drop == pytest.approx(suite.tuned - suite.base, abs=1e-9)
    assert suite.divergence == pytest.approx(sums["divergence"] / count, rel=1e-3)
    same, hurt = suite.controls
    assert same.passed and same.score < 1e-6
    assert hurt.name == "the base without layer 2 of its 2"


def test_choices_suite_equals_one_choice_at_a_time(
    project: Project, adapter: Adapter, measured: dict[str, Any], tiny_base_folder: Path
) -> None:
    tokenizer = project.chat.tokenizer
    asked = draw(read_questions(project.folder.root / "questions.jsonl"), 12, project.folder.config.seed)
    right = {
        name: sum(likeliest_choice(model, tokenizer, q.text, q.choices) == q.gold for q in asked)
        for name, model in _two(tiny_base_folder, adapter).items()
    }
    suite = _suite(measured, "choices")
    assert (suite.items, suite.clusters) == (12, 12)
    assert (suite.base, suite.tuned) == (right["base"] / 12, right["tuned"] / 12)
    assert suite.drop == pytest.approx(suite.base - suite.tuned)
    assert not suite.gates, "a base of random weights is not above guessing"
    assert [c.passed for c in suite.controls][1] is False


def test_instructions_are_checked_on_greedy_answers(
    project: Project, adapter: Adapter, measured: dict[str, Any], tiny_base_folder: Path
) -> None:
    """Against transformers' own greedy decoding."""
    tokenizer = project.chat.tokenizer
    followed = {}
    for name, model in _two(tiny_base_folder, adapter).items():
        followed[name] = 0
        for n in range(8):
            ids: Any = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"Say {n}."}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.inference_mode():
                out = model.generate(**ids, max_new_tokens=12, do_sample=False)
            text = str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
            followed[name] += bool(text.strip()) and text.lower().count("e") <= n % 2
    suite = _suite(measured, "instructions")
    assert (suite.items, suite.base, suite.tuned) == (8, followed["base"] / 8, followed["tuned"] / 8)
    assert suite.controls[0].passed


def test_regressions_reuses_suites_and_adds_them_to_the_evidence(project: Project, measured: dict[str, Any]) -> None:
    assert measured["evaluation"] is None
    again = command("regressions", "-p", project.folder.root)
    assert again.code == 4
    assert "Loading" not in again.stderr
    assert "decides nothing" in again.stdout
    evidence = project.evaluate().evidence
    assert evidence.regressions == Benchmarks.model_validate(measured["regressions"])
    message = command("verdict", "-p", project.folder.root).stdout
    assert "It decides nothing" in message


def test_regressions_measures_only_new_suites(project: Project, measured: dict[str, Any]) -> None:
    """Items of an earlier measurement are kept, so the model is not even loaded for another margin."""
    file = project.folder.root / "tunewright.yaml"
    before = file.read_text()
    file.write_text(before.replace("margin: 0.05\n", "margin: 0.3\n"))
    ran = command("regressions", "-p", project.folder.root, "--json")
    file.write_text(before)
    assert ran.document["measured"]
    assert "Loading" not in ran.stderr
    assert ran.document["regressions"]["id"] != measured["regressions"]["id"]
    wide, narrow = _suite(ran.document, "choices"), _suite(measured, "choices")
    assert (wide.margin, wide.limit, wide.base) == (0.3, narrow.limit, narrow.base)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("regressions: {samples: 0}", "has no suite"),
        ("regressions: {multiple_choice: [nowhere.jsonl]}", "nowhere.jsonl"),
        (
            "regressions: {multiple_choice: [{file: questions.jsonl}, {file: questions.jsonl, limit: 3}]}",
            "Two suites have the name",
        ),
        (
            "regressions: {instruction_following: [{file: prompts.jsonl, max_new_token: 3}]}",
            "instruction_following.0.max_new_tokens?",
        ),
    ],
)
def test_regressions_refuses_wrong_settings_before_measuring(project: Project, section: str, words: str) -> None:
    file = project.folder.root / "tunewright.yaml"
    before = file.read_text()
    file.write_text(before.replace(CONFIG, section + "\n"))
    try:
        ran = command("regressions", "-p", project.folder.root)
    finally:
        file.write_text(before)
    assert ran.code == 2
    assert words in ran.stderr
    assert "Loading" not in ran.stderr


def test_regressions_skips_samples_when_the_base_writes_none(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_self: object, wanted: int, *_args: object, **_kwargs: object) -> None:
        raise UserError(f"nothing that the base writes can be used, of {wanted}")

    monkeypatch.setattr(self_samples.Sampler, "draw", nothing)
    file = project.folder.root / "tunewright.yaml"
    before = file.read_text()
    try:
        file.write_text(before.replace("samples: 6", "samples: 5\n  samples_margin: 0.1"))
        asked = command("regressions", "-p", project.folder.root)
        file.write_text(before.replace("samples: 6", "samples: 5"))
        ran = command("regressions", "-p", project.folder.root, "--json")
    finally:
        file.write_text(before)
    assert asked.code == 2, "a suite that was to decide is not left out"
    assert [s["kind"] for s in ran.document["regressions"]["suites"]] == ["choices", "instructions"]
    assert ran.document["regressions"]["not_measured"] == [
        "the base's own samples: nothing that the base writes can be used, of 5"
    ]
    assert "Warning: Not measured: the base's own samples" in ran.stderr


def test_similar_and_grouped_questions_form_clusters(project: Project) -> None:
    """Two groups of the file, one of which holds one of two questions that are almost the same; eight stand alone."""
    asked = ["stone", "water", "a long river", "sun", "ice", "snow", "clay", "moss"]
    rows = [{"query": f"Question: what is {word}?", "choices": ["a thing", "no thing"], "gold": 0} for word in asked]
    passage = "Question: which of the counties of the old kingdom in the north lies nearest to the sea"
    rows += [{**rows[0], "query": f"{passage} {end}"} for end in ("today?", "today!")]
    rows[-1]["group"] = rows[0]["group"] = "p"
    rows[1]["group"] = rows[2]["group"] = rows[3]["group"] = "q"
    write_jsonl(project.folder.root / "grouped.jsonl", rows)
    file = project.folder.root / "tunewright.yaml"
    before = file.read_text()
    file.write_text(before.replace(CONFIG, "regressions: {samples: 0, multiple_choice: [grouped.jsonl]}\n"))
    try:
        ran = command("regressions", "-p", project.folder.root, "--json")
    finally:
        file.write_text(before)
    assert _suite(ran.document, "choices").clusters == 4 + 1 + 1
    assert "grouped: 10 items in 6 clusters of similar or grouped items" in ran.stderr
