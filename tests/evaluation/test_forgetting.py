"""Held-out samples of the base, and faults in a file of multiple choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.base_and_tuned import only_adapter, short_turns
from making.command_line import tiny_project
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.data.examples import normalised
from tunewright.evaluation.benchmarks.likelihoods import ChoiceQuestion, OwnSamples, read_questions
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.open_project import OpenProject

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def turns_end() -> Iterator[None]:
    with short_turns(150):
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Project:
    """A project with an adapter that was trained with replay."""
    folder = tiny_project(tmp_path_factory.mktemp("forgetting") / "project", tiny_base_folder)
    file = folder / "tunewright.yaml"
    text = file.read_text().replace("epochs: 2", "epochs: 1")
    file.write_text(text.replace("train:\n", "train:\n  replay: {samples: 4, kl_coef: null}\n"))
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return project


@pytest.fixture(scope="module")
def adapter(project: Project) -> Adapter:
    return only_adapter(project)


@pytest.fixture(scope="module")
def samples(project: Project) -> OwnSamples:
    arm_runner = open_arm_runner(OpenProject(project.folder, project.reporter))
    return OwnSamples(project.folder, arm_runner.version, arm_runner.generator, 8)


def test_sample_is_encoded_with_the_end_token_where_the_base_stopped(
    project: Project, adapter: Adapter, samples: OwnSamples
) -> None:
    rows = samples.unseen(adapter)
    assert {sample.stopped for sample in samples.drawn.used} == {True, False}
    for sample in samples.drawn.used:
        prompt = project.chat.prompt(sample.example.prompt)
        end = [project.chat.tokenizer.eos_token_id] if sample.stopped else []
        row = rows[sample.example.pair_key]
        assert row.ids == (*prompt, *sample.ids, *end)
        assert row.loss_mask == (False,) * len(prompt) + (True,) * (len(row.ids) - len(prompt))


def test_held_out_samples_exclude_trained_ones(adapter: Adapter, samples: OwnSamples) -> None:
    replayed = {normalised(messages[0]["content"]) for messages in adapter.replayed}
    held_out = {normalised(sample.instruction) for sample in samples.drawn.used}
    assert len(replayed) == 4
    assert not replayed & held_out


def test_read_questions_names_faulty_lines(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    good = {"query": "Question: Why?", "choices": ["so", "not"], "gold": 1}
    file.write_text(json.dumps(good) + "\n")
    assert read_questions(file) == [ChoiceQuestion("Question: Why?", ("so", "not"), 1)]
    file.write_text(json.dumps({**good, "group": 7}) + "\n")
    assert read_questions(file)[0].group == "7"
    bad: Any
    for bad in ({**good, "gold": 2}, {**good, "choices": ["", "a"]}, {"query": "x"}, []):
        file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(UserError) as caught:
            read_questions(file)
        assert caught.value.where == f"{file}:2"
    file.write_bytes(b'{"query": "\xff"}')
    with pytest.raises(UserError, match="Not UTF-8") as caught:
        read_questions(file)
    assert caught.value.where == str(file)
