"""Forgetting and multiple choice against plain computations, and the choice of a scale."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tunewright
from base_and_tuned import likeliest_choice, only_adapter, plain_base, plain_tuned, short_turns
from command_line import tiny_project
from command_line import tunewright as command
from tunewright.adapters.registry import Adapter
from tunewright.adapters.scaling import scale_weights
from tunewright.api import Project
from tunewright.api.context import ProjectContext
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.examples import normalised
from tunewright.evaluation.benchmarks.choices import Question, chosen, read_questions
from tunewright.evaluation.forgetting import Forgetting, ForgettingMeter
from tunewright.evaluation.scaling import Scaled, choose
from tunewright.evidence.common import Interval


@pytest.fixture(scope="module", autouse=True)
def turns_end() -> Iterator[None]:
    with short_turns(150):
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Project:
    """A project with an adapter that was trained with replay."""
    folder = tiny_project(tmp_path_factory.mktemp("forgetting") / "project", tiny_base_folder)
    file = folder / "tunewright.yaml"
    file.write_text(file.read_text().replace("train:\n", "train:\n  replay: {samples: 4, kl_coef: null}\n"))
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return project


@pytest.fixture(scope="module")
def adapter(project: Project) -> Adapter:
    return only_adapter(project)


def _meter(project: Project, samples: int = 8) -> ForgettingMeter:
    arm_runner = ProjectContext(project.folder, project.reporter).arm_runner()
    return ForgettingMeter(project.folder, arm_runner.version, arm_runner.generator, samples)


def test_forgetting_is_the_likelihood_loss_of_the_bases_own_answers(
    project: Project, adapter: Adapter, tiny_base_folder: Path
) -> None:
    meter = _meter(project)
    found = meter.measure(adapter)
    plain, tuned = plain_base(tiny_base_folder), plain_tuned(tiny_base_folder, adapter.folder)
    before = after = 0.0
    tokens = 0
    for sample in meter.drawn.used:
        prompt = project.chat.prompt(sample.example.prompt)
        row = [*prompt, *sample.ids, *([project.chat.tokenizer.eos_token_id] if sample.stopped else [])]
        ids = torch.tensor([row])
        places = range(len(prompt), len(row))
        with torch.inference_mode():
            for model, adds in ((plain, "before"), (tuned, "after")):
                log_p = model(ids).logits[0].double().log_softmax(-1)
                loss = -sum(float(log_p[place - 1, row[place]]) for place in places)
                before, after = (before + loss, after) if adds == "before" else (before, after + loss)
        tokens += len(places)
    assert {sample.stopped for sample in meter.drawn.used} == {True, False}
    assert (found.samples, found.tokens) == (8, tokens)
    assert found.base == pytest.approx(before / tokens, rel=1e-4)
    assert found.tuned == pytest.approx(after / tokens, rel=1e-4)
    assert found.increase == pytest.approx((after - before) / tokens, rel=1e-3, abs=1e-4)
    assert found.interval.low <= found.increase <= found.interval.high


def test_held_out_samples_exclude_trained_ones(project: Project, adapter: Adapter) -> None:
    replayed = {normalised(messages[0]["content"]) for messages in adapter.replayed}
    held_out = {normalised(sample.instruction) for sample in _meter(project).drawn.used}
    assert len(replayed) == 4
    assert not replayed & held_out


def test_forgetting_reuses_measured_losses(project: Project, adapter: Adapter) -> None:
    first = _meter(project).measure(adapter)
    again = _meter(project)
    again.generator.model_with = None  # type: ignore[method-assign, assignment]
    assert again.measure(adapter) == first


def test_scaled_adapter_adds_a_fraction_of_the_change(adapter: Adapter, tmp_path: Path, tiny_base_folder: Path) -> None:
    """Against peft's own scaling of the layers."""
    from peft.tuners.lora.layer import LoraLayer

    scale_weights(adapter.folder, 0.3, tmp_path / "scaled")
    ids = torch.arange(30)[None]
    reference = plain_tuned(tiny_base_folder, adapter.folder)
    for layer in reference.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.3)
    with torch.inference_mode():
        expected = reference(ids).logits
        found = plain_tuned(tiny_base_folder, tmp_path / "scaled")(ids).logits
        unscaled = plain_tuned(tiny_base_folder, adapter.folder)(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - unscaled).abs().max() > 0.01


@pytest.mark.slow
def test_scaling_writes_a_new_adapter_with_its_lineage_and_it_is_evaluated(project: Project, adapter: Adapter) -> None:
    ran = command("adapters", "scale", "--factor", "0.5", "--factor", "0.05", "-p", project.folder.root, "--json")
    assert ran.code == 0, ran.stderr
    message = ran.document
    assert [row["factor"] for row in message["tried"]] == [0.05, 0.5, 1.0]
    lost = [row["forgetting"]["increase"] for row in message["tried"]]
    assert lost[0] < lost[1] < lost[2]
    assert message["parent"] == adapter.name
    chosen = Adapter(project.folder.adapters / message["adapter"])
    if message["factor"] == 1:  # the task needs all of it
        assert message["adapter"] == adapter.name
        return
    chosen.verify()
    assert chosen.lineage["scaled"]["parent"] == adapter.name
    assert chosen.lineage["scaled"]["factor"] == message["factor"]
    assert chosen.replayed == adapter.replayed
    assert project.evaluate(chosen.name).evidence.lineage["adapter"]["name"] == chosen.name
    assert not project.train().trained, "the config's own adapter is still the one that it trained"
    assert project.train().adapter == adapter
    again = command("adapters", "scale", chosen.name, "-p", project.folder.root)
    assert again.code == 2
    assert f"tunewright adapters scale {adapter.name}" in again.stderr


def test_scale_refuses_an_invalid_factor(project: Project, adapter: Adapter) -> None:
    with pytest.raises(UserError, match="above 0"):
        project.adapters.scale(adapter.name, [0.0])


def _at(factor: float, score: float, lost: float) -> Scaled:
    return Scaled(factor, score, Forgetting(10, 100, 1.0, 1.0 + lost, lost, Interval(low=0, high=1)))


@pytest.mark.parametrize(
    ("scores", "margin", "expected"),
    [
        ([0.50, 0.80, 0.85, 0.86], 0.02, 0.75),  # one point less, and less forgotten
        ([0.50, 0.85, 0.85, 0.86], 0.02, 0.5),
        ([0.50, 0.80, 0.84, 0.86], 0.02, 1.0),  # a loss of the margin is one
        ([0.50, 0.80, 0.86, 0.86], 0.0, 0.75),  # a margin of nothing: equal scores
        ([0.90, 0.80, 0.86, 0.86], 0.0, 0.25),
    ],
)
def test_scale_chooses_least_forgetting_within_the_margin(scores: list[float], margin: float, expected: float) -> None:
    tried = [_at(f, s, lost) for f, s, lost in zip((0.25, 0.5, 0.75, 1.0), scores, (0.1, 0.2, 0.3, 0.4), strict=True)]
    assert choose(tried, margin).factor == expected


# Multiple choice


def _questions() -> list[Question]:
    generator = np.random.default_rng(0)
    words = ["stone", "water", "a very long river of light", "sun", "ice and snow"]
    return [
        Question(f"Question: what is {n}?", tuple(generator.permutation(words)[: 2 + n % 3].tolist()), n % 2)
        for n in range(12)
    ]


def test_choice_maximizes_likelihood_per_character(project: Project, tiny_base_folder: Path) -> None:
    model, tokenizer = plain_base(tiny_base_folder), project.chat.tokenizer
    expected = [likeliest_choice(model, tokenizer, q.text, q.choices) for q in _questions()]
    with LogReporter().task("", 12, "") as task:
        assert chosen(model, tokenizer, _questions(), task) == expected
    assert len(set(expected)) > 1


def test_read_questions_names_faulty_lines(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    good = {"query": "Question: Why?", "choices": ["so", "not"], "gold": 1}
    file.write_text(json.dumps(good) + "\n")
    assert read_questions(file) == [Question("Question: Why?", ("so", "not"), 1)]
    file.write_text(json.dumps({**good, "group": 7}) + "\n")
    assert read_questions(file)[0].group == "7"
    bad: Any
    for bad in ({**good, "gold": 2}, {**good, "choices": ["", "a"]}, {"query": "x"}, []):
        file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(UserError) as caught:
            read_questions(file)
        assert caught.value.where == f"{file}:2"
