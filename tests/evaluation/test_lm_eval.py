"""lm-eval's tasks as suites, through lm-eval itself: against one choice at a time by plain transformers and peft."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tunewright
from making.base_and_tuned import likeliest_choice, only_adapter, plain_base, plain_tuned
from making.command_line import pairs, tiny_project, write_jsonl
from making.command_line import tunewright as command
from tunewright.api import Project
from tunewright.evaluation.benchmarks import runner as suites

installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK = {
    "task": "substances",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
CONFIG = "regressions:\n  samples: 0\n  lm_eval: [{task: substances, include_path: tasks}]\n  margin: 0.05\n"


def _questions() -> list[dict[str, Any]]:
    """Sixteen, of which the last two are almost the same."""
    rng = np.random.default_rng(0)
    words = ["stone", "water", "a long river", "sun", "ice and snow"]
    asked = [pair["prompt"] for pair in pairs(14)]
    asked += [
        f"which of the counties of the old kingdom in the north lies nearest to the {sea}" for sea in ("sea", "sea?")
    ]
    return [
        {"question": text, "choices": rng.permutation(words)[:4].tolist(), "gold": place % 4}
        for place, text in enumerate(asked)
    ]


@pytest.fixture
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval lists the project's task files alone: reading its thousands takes seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Project:
    """A project with an adapter and a task file of its own, with its data next to it."""
    folder = tiny_project(tmp_path_factory.mktemp("lm-eval") / "project", tiny_base_folder)
    file = folder / "tunewright.yaml"
    file.write_text(file.read_text().replace("regressions:\n  samples: 0\n", CONFIG))
    (folder / "tasks").mkdir()
    data = write_jsonl(folder / "substances.jsonl", _questions())
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "tasks" / "substances.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return project


@pytest.mark.slow
@installed
@pytest.mark.usefixtures("own_tasks")
def test_lm_eval_task_equals_one_choice_at_a_time_with_adapter_off_and_on(
    project: Project, tiny_base_folder: Path
) -> None:
    ran = command("regressions", "-p", project.folder.root, "--json")
    assert ran.code == 4, ran.stderr  # a base of random weights is not above guessing
    (suite,) = ran.document["regressions"]["suites"]
    models = {
        "base": plain_base(tiny_base_folder),
        "tuned": plain_tuned(tiny_base_folder, only_adapter(project).folder),
    }
    for name, model in models.items():
        right = [
            likeliest_choice(model, project.chat.tokenizer, f"Question: {q['question']}", tuple(q["choices"]))
            == q["gold"]
            for q in _questions()
        ]
        assert suite[name] == pytest.approx(np.mean(right)), name
    assert (suite["kind"], suite["metric"], suite["items"], suite["clusters"]) == ("lm_eval", "acc_norm", 16, 15)
    (control,) = suite["controls"]
    assert control["name"] == "the base, where guessing gives 25.0%"
    again = command("regressions", "-p", project.folder.root, "--json")
    assert not again.document["measured"]
    assert "Loading" not in again.stderr


@pytest.mark.slow
@installed
@pytest.mark.usefixtures("own_tasks")
@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ("{task: substance, include_path: tasks}", "lm-eval has no task 'substance'"),
        ("{task: substances, include_path: tasks, metric: f1}", "The task has no metric 'f1'"),
    ],
)
def test_lm_eval_refuses_an_unknown_task_or_metric(project: Project, suite: str, words: str) -> None:
    file = project.folder.root / "tunewright.yaml"
    before = file.read_text()
    file.write_text(before.replace("{task: substances, include_path: tasks}", suite))
    try:
        ran = command("regressions", "-p", project.folder.root)
    finally:
        file.write_text(before)
    assert ran.code == 2
    assert words in ran.stderr


def test_lm_eval_task_names_the_missing_package_before_measuring(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "find_spec", lambda _name: None)
    ran = command("regressions", "-p", project.folder.root)
    assert ran.code == 2
    assert "pip install 'tunewright[lm-eval]'" in ran.stderr
    assert "Loading" not in ran.stderr
