"""Free arms: each against scikit-learn or a plain loop, fitted on training rows only, and compared with the adapter."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeClassifierCV, SGDClassifier
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

import tunewright as package
from making.base_and_tuned import plain_base
from making.command_line import pairs, tiny_project, write_jsonl
from making.command_line import tunewright as command
from making.evidence import pair
from tunewright.adapters.registry import find_adapter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.free_arms import HIDDEN, MAJORITY, NEAREST, TFIDF, FittedArms, free_on_dev, why_free
from tunewright.evaluation.prompt_search import advise
from tunewright.evaluation.runner import plan_comparison
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.evidence.files import load_evidence, load_items

FEW_ARMS = (
    "  num_fewshot: [1]\n  static_seeds: 0\n  retrievers: [bm25]\n  tuned_retrieved: false\n  max_new_tokens: 8\n"
    "  margin: 0.05\n"
)


@pytest.mark.parametrize(
    ("trained", "dev", "found"),
    [
        ([], ["yes"], None),
        (["yes", "no"] * 30, ["yes"], ("2 different answers", True)),
        ([f"label {n % 50}" for n in range(100)], ["label 1"], ("50 different answers", True)),
        # Each once is no label, and only 95% that are seen make more than 50 labels.
        ([f"label {n}" for n in range(40)], ["other"], ("40 of 40 training answers have at most 80", False)),
        ([f"label {n % 51}" for n in range(102)], ["label 1"] * 19 + ["other"], ("19 of 20 dev answers", True)),
        ([f"label {n % 51}" for n in range(102)], ["label 1"] * 18 + ["other"] * 2, ("102 of 102 training", False)),
        ([f"{n} {'long ' * 20}" for n in range(60)], ["other"], None),
        ([f"line\n{n}" for n in range(60)], ["other"], None),
    ],
)
def test_free_arms_answer_labels_and_short_answers_only(
    trained: list[str], dev: list[str], found: tuple[str, bool] | None
) -> None:
    rule = why_free(trained, dev)
    assert (rule is None) == (found is None)
    if rule is not None and found is not None:
        assert found[0] in rule[0]
        assert rule[1] == found[1]


@pytest.fixture(scope="module")
def arm_runner(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> ArmRunner:
    folder = tiny_project(tmp_path_factory.mktemp("free") / "project", tiny_base_folder, count=200)
    project = package.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return open_arm_runner(project)


def _texts(runner: ArmRunner, name: str, rows: list[Member]) -> list[str]:
    return FittedArms(runner).answers(name, rows)


def test_each_free_arm_is_what_scikit_learn_gives_on_the_training_rows(
    arm_runner: ArmRunner, tiny_base_folder: Path
) -> None:
    import torch

    rows, train = list(arm_runner.version.examples("dev")), arm_runner.version.domain_of("train")
    texts, answers = [m.example.input_text for m in train], [m.example.output for m in train]
    asked = [m.example.input_text for m in rows]
    usual, count = Counter(answers).most_common(1)[0]
    assert count > 1
    assert _texts(arm_runner, MAJORITY, rows) == [usual] * len(rows)

    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True).fit(texts)
    known, new = features.transform(texts), features.transform(asked)
    nearest = [answers[max(range(len(texts)), key=lambda n: similar[n])] for similar in cosine_similarity(new, known)]
    assert _texts(arm_runner, NEAREST, rows) == nearest

    model = SGDClassifier(loss="log_loss", alpha=1e-5, random_state=arm_runner.project.config.seed).fit(known, answers)
    assert _texts(arm_runner, TFIDF, rows) == model.predict(new).tolist()

    base, tokenizer = plain_base(tiny_base_folder), arm_runner.generator.chat.tokenizer
    with torch.inference_mode():
        states = [
            base(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
            for text in [*texts, *asked]
        ]
    means = np.stack([each[len(each) // 3][0].mean(dim=0).numpy() for each in states])
    scaler = StandardScaler().fit(means[: len(texts)])
    head = RidgeClassifierCV(alphas=np.logspace(0, 5, 6)).fit(scaler.transform(means[: len(texts)]), answers)
    expected = head.predict(scaler.transform(means[len(texts) :]))
    assert np.mean(np.array(_texts(arm_runner, HIDDEN, rows)) == expected) > 0.95  # padding changes last digits


def test_answers_of_held_out_rows_decide_nothing(arm_runner: ArmRunner) -> None:
    rows = list(arm_runner.version.examples("test"))
    hidden = [replace(m, example=pair(m.example.input_text, "never seen")) for m in rows]
    for name in (MAJORITY, NEAREST, TFIDF, HIDDEN):
        assert _texts(arm_runner, name, rows) == _texts(arm_runner, name, hidden)


def test_best_on_dev_is_compared_and_the_simplest_of_equal_ones(arm_runner: ArmRunner) -> None:
    free, scored = free_on_dev(arm_runner)
    assert free is not None
    scores = {arm.name: arm.score("exact_match").value for arm in free.dev}
    assert list(scores) == [MAJORITY, NEAREST, TFIDF, HIDDEN]
    assert free.best == next(name for name, value in scores.items() if value == max(scores.values()))
    rows = arm_runner.version.examples("dev")
    answers = _texts(arm_runner, TFIDF, list(rows))
    right = [answer == m.example.output for answer, m in zip(answers, rows, strict=True)]
    assert scored.by_metric["exact_match"][TFIDF].values.tolist() == right


def test_engine_without_hidden_states_leaves_the_linear_head_out_by_name(
    arm_runner: ArmRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm_runner.generator, "engine", SimpleNamespace(environment="vLLM's"))
    monkeypatch.setattr(arm_runner.generator, "workers", None)
    found, _ = free_on_dev(arm_runner)
    assert found is not None
    assert [(each.name, "vLLM" in each.why) for each in found.left_out] == [(HIDDEN, True)]
    assert [arm.name for arm in found.dev] == [MAJORITY, NEAREST, TFIDF]


def test_limited_time_leaves_the_linear_head_out_by_name(arm_runner: ArmRunner) -> None:
    found, _ = free_on_dev(arm_runner, timed=True)
    assert found is not None
    assert [(each.name, "--minutes" in each.why) for each in found.left_out] == [(HIDDEN, True)]


def test_short_answers_that_do_not_repeat_have_the_nearest_row_only(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    write_jsonl(folder / "pairs.jsonl", [{**row, "completion": row["prompt"]} for row in pairs(120)])
    project = package.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    found, _ = free_on_dev(open_arm_runner(project))
    assert found is not None
    assert [arm.name for arm in found.dev] == [NEAREST]
    assert {each.name for each in found.left_out} == {MAJORITY, TFIDF, HIDDEN}


def test_evaluate_on_labels_of_one_class_says_first_that_no_model_is_needed(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    rows = [{**row, "completion": "bad" if n % 90 == 0 else "ok"} for n, row in enumerate(pairs(270))]
    write_jsonl(folder / "pairs.jsonl", rows)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace("  num_fewshot: [1, 2]\n", FEW_ARMS).replace("epochs: 2", "epochs: 1")
    config.write_text(text.replace("sources: [pairs.jsonl]", "sources: [pairs.jsonl]\n  test_size: 0.4"))
    for arguments in (("data", "add", folder / "pairs.jsonl"), ("train",), ("evaluate",)):
        ran = command(*arguments, "-p", folder)
        assert ran.code == 0, ran.stderr
    before, after = ran.stderr.index("Without a model, on dev"), ran.stderr.index("Without a model, on test")
    assert before < ran.stderr.index("The test split is opened") < after
    assert before < ran.stderr.index("Answers are computed by")

    (place,) = (folder / "evaluations").glob("*/evidence.json")
    evidence, items = load_evidence(place), load_items(place.parent)
    assert evidence.free is not None
    assert evidence.free.best == MAJORITY
    project = package.open(folder)
    adapter = find_adapter(project.folder.adapters)
    runner = open_arm_runner(project, adapter)
    planned = plan_comparison(runner, adapter, advise(runner).advice, "test")
    assert [arm.name for arm in evidence.arms] == planned.names
    assert planned.identity == evidence.id
    assert planned.names[-4:] == planned.free == [MAJORITY, NEAREST, TFIDF, HIDDEN]
    assert replace(planned, declared=planned.declared[:1]).free == [], "an earlier version declared no free arm"
    right = sum(item.reference == "ok" for item in items)
    assert evidence.arm(MAJORITY).score("exact_match").value == right / len(items)
    assert {item.answers[MAJORITY] for item in items} == {"ok"}
    assert not any(name.startswith("free") for item in items for name in item.prompts or ())
    line = json.loads((folder / "evaluations" / "access_log.jsonl").read_text().splitlines()[1])
    compared = [(each["treatment"], each["control"]) for each in line["declared"] if "non_inferiority_margin" in each]
    assert compared == [(MAJORITY, "tuned"), (MAJORITY, evidence.best_prompting)]

    verdict = command("verdict", "-p", folder, "--json")
    assert verdict.code == 3
    assert verdict.document["reasons"][0].startswith(f"No model is needed: {MAJORITY}")
    page = command("report", "-p", folder)
    assert page.code == 0, page.stderr
    html = (place.parent / "report.html").read_text()
    assert "no model" in html
    assert "Free arms need no language model" in html


def test_free_arms_read_rows_with_functions(arm_runner: ArmRunner) -> None:
    tools = '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'
    row = arm_runner.version.examples("dev")[0]
    asked = replace(row, example=Example((Message("tools", tools), *row.example.messages)))
    assert _texts(arm_runner, NEAREST, [asked]) == _texts(arm_runner, NEAREST, [row])
