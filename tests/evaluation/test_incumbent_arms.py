"""Incumbents through the command line: asked, frozen, compared, priced, and used again when the endpoint is gone."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import tunewright as package
from making.command_line import Ran, tiny_project, tunewright
from making.hosted_model import first_word, stand_in, with_incumbents
from tunewright.evidence.files import load_evidence, load_items

PRICES = {"price_input": 10.0, "price_output": 100.0}  # 100 prompt and 10 reply tokens: 0.002 a call
FEW_ARMS = {"num_fewshot": [1], "static_seeds": 0, "retrievers": ["bm25"], "tuned_retrieved": False}


def wrong_for_every_fifth(body: dict[str, Any]) -> dict[str, Any]:
    """Right for four of five rows, by the number in the row."""
    number = int(body["messages"][-1]["content"].split()[-1])
    return first_word(body) if number % 5 else {"content": "no idea"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter, before any evaluation."""
    folder = tiny_project(tmp_path_factory.mktemp("trained") / "project", tiny_base_folder)
    with_incumbents(folder, evaluate=FEW_ARMS)
    project = package.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return folder


@dataclass
class Evaluated:
    """A project after `evaluate`, and what the endpoint was asked."""

    folder: Path
    estimate: Ran
    ran: Ran
    asked: list[dict[str, Any]]

    @property
    def evaluation(self) -> Path:
        return Path(self.ran.document["folder"])


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """After this the endpoint is gone."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "project"))
    with stand_in(wrong_for_every_fifth) as server:
        incumbent = {"name": "hosted", "base_url": server.url, "model": "stand-in", **PRICES}
        with_incumbents(folder, incumbent, advise={"prices": {"hour": 2.0}})
        estimate = tunewright("evaluate", "--estimate", "-p", folder, "--json")
        assert server.bodies == []
        ran = tunewright("evaluate", "-p", folder, "--json")
    return Evaluated(folder, estimate, ran, server.bodies)


def test_estimate_counts_the_calls_that_evaluate_sends(evaluated: Evaluated) -> None:
    (expected,) = evaluated.estimate.document["incumbents"]
    assert expected["calls"] == len(evaluated.asked)
    assert expected["most_completion_tokens"] == 1024 * len(evaluated.asked)
    characters = sum(len(body["messages"][-1]["content"]) for body in evaluated.asked)
    assert expected["prompt_tokens"] == pytest.approx(characters / 4, rel=0.1)


def test_evaluate_asks_each_dev_and_test_row_once_with_the_configured_parameters(evaluated: Evaluated) -> None:
    assert evaluated.ran.code == 0, evaluated.ran.stderr
    version = package.open(evaluated.folder).data.version()
    rows = [m.example.input_text for split in ("dev", "test") for m in version.examples(split)]
    assert sorted(body["messages"][-1]["content"] for body in evaluated.asked) == sorted(rows)
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in evaluated.asked} == {("stand-in", 0, 1024)}


def test_evidence_compares_tuned_with_the_incumbent_by_its_own_answers(evaluated: Evaluated) -> None:
    evidence, items = load_evidence(evaluated.evaluation), load_items(evaluated.evaluation)
    assert evidence.incumbents is not None
    (found,) = evidence.incumbents.compared
    right = {
        arm: sum(item.answers[arm].strip() == item.reference for item in items) for arm in ("tuned", "incumbent-hosted")
    }
    assert right["incumbent-hosted"] == sum(int(item.input.split()[-1]) % 5 != 0 for item in items)
    assert found.drop.value == pytest.approx((right["incumbent-hosted"] - right["tuned"]) / len(items))
    assert found.cost == pytest.approx(0.002 * len(items))
    assert found.versions == {"stand-in-2026-11-01": len(items)}
    assert found.serving.latency is not None and found.serving.latency.answers == len(items)
    assert evidence.incumbents.tuned.latency is not None
    assert evidence.incumbents.tuned.cost_per_1000 == pytest.approx(
        1000 * evidence.incumbents.tuned.seconds_per_call / 3600 * 2.0
    )
    # Holm's method adjusts for the contrasts that decide about shipping, as without incumbents.
    assert {c.control for c in evidence.deciding} <= {"zero-shot", evidence.best_prompting}


def test_contrast_with_the_incumbent_is_declared_before_test_is_opened(evaluated: Evaluated) -> None:
    (opening,) = tunewright("access-log", "-p", evaluated.folder, "--json").document["openings"]
    assert opening["declared"][-1] == {
        "treatment": "tuned",
        "control": "incumbent-hosted",
        "metric": "exact_match",
        "margin": None,
        "non_inferiority_margin": 0.02,
    }
    assert "non_inferiority_margin" not in opening["declared"][0]


def test_verdict_names_outcome_cost_break_even_and_latency(evaluated: Evaluated) -> None:
    ran = tunewright("verdict", "-p", evaluated.folder, "--json")
    (shown,) = ran.document["incumbents"]
    evidence = load_evidence(evaluated.evaluation)
    assert evidence.incumbents is not None
    tuned, (found,) = evidence.incumbents.tuned, evidence.incumbents.compared
    assert shown["outcome"] == found.drop.outcome
    assert shown["cost_per_1000"]["incumbent"] == pytest.approx(2.0)
    assert tuned.training is not None and tuned.cost_per_1000 is not None
    assert shown["break_even_calls"] == pytest.approx(tuned.training / (2.0 - tuned.cost_per_1000) * 1000)
    assert shown["break_even_calls_per_month"] == pytest.approx(730 * 2.0 / 0.002)
    text = tunewright("verdict", "-p", evaluated.folder).stdout
    assert f"Incumbent hosted: {found.drop.outcome}" in text
    assert "Cost of 1,000 calls: tuned" in text and "Latency, 95th percentile: tuned" in text
    markdown = tunewright("verdict", "--markdown", "-p", evaluated.folder).stdout
    assert re.search(rf"^\| hosted \| .* \| {found.drop.outcome} \|$", markdown, re.MULTILINE)
    report = tunewright("report", "-p", evaluated.folder, "--json").document["report"]
    assert "Against the models in use" in Path(report).read_text(encoding="utf-8")


def test_frozen_file_holds_each_answer_and_is_bound_by_the_access_log(evaluated: Evaluated, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(evaluated.folder, tmp_path / "project"))
    evidence = load_evidence(evaluated.evaluation)
    assert evidence.incumbents is not None
    (found,) = evidence.incumbents.compared
    file = folder / found.file
    header, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert (header["model"], header["split"]) == ("stand-in", "test")
    assert len(lines) == evidence.items
    assert all(line["model"] == "stand-in-2026-11-01" and line["seconds"] > 0 and line["time"] for line in lines)
    assert all(line["cost"] == pytest.approx(0.002) for line in lines)
    file.write_text(file.read_text(encoding="utf-8").replace("no idea", "red"), encoding="utf-8")
    ran = tunewright("evaluate", "--estimate", "-p", folder)
    assert ran.code == 2
    assert "was changed after it was written" in ran.stderr


def test_later_adapter_is_compared_with_frozen_answers_when_the_endpoint_is_gone(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    """Even without the journal of replies, which git ignores."""
    folder = Path(shutil.copytree(evaluated.folder, tmp_path / "project"))
    shutil.rmtree(folder / ".tunewright" / "incumbents")
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 1"))
    package.open(folder).train()
    ran = tunewright("evaluate", "-p", folder, "--json")
    assert ran.code == 0, ran.stderr
    (before,) = load_evidence(evaluated.evaluation).incumbents.compared  # type: ignore[union-attr]
    (after,) = load_evidence(Path(ran.document["folder"])).incumbents.compared  # type: ignore[union-attr]
    assert ran.document["folder"] != str(evaluated.evaluation)
    assert (after.file_digest, after.versions, after.first) == (before.file_digest, before.versions, before.first)
    assert "are sent to" not in ran.stderr


def test_price_added_later_changes_the_cost_and_nothing_else(evaluated: Evaluated, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(evaluated.folder, tmp_path / "project"))
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("price_input: 10.0", "price_input: 20.0"))
    ran = tunewright("evaluate", "-p", folder, "--json")
    assert (ran.code, ran.document["evaluated"]) == (0, False)
    (shown,) = tunewright("verdict", "-p", folder, "--json").document["incumbents"]
    assert shown["cost_per_1000"]["incumbent"] == pytest.approx(3.0)
    assert len(tunewright("access-log", "-p", folder, "--json").document["openings"]) == 1


def test_missing_prices_are_named_and_not_taken_for_zero(evaluated: Evaluated, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(evaluated.folder, tmp_path / "project"))
    config = folder / "tunewright.yaml"
    settings = yaml.safe_load(config.read_text())
    del settings["advise"]
    for key in PRICES:
        del settings["evaluate"]["incumbents"][0][key]
    config.write_text(yaml.safe_dump(settings))
    assert tunewright("evaluate", "-p", folder).code == 0
    ran = tunewright("verdict", "-p", folder, "--json")
    (shown,) = ran.document["incumbents"]
    assert shown["cost_per_1000"] == {"tuned": None, "incumbent": None}
    assert shown["break_even_calls"] is None
    assert "price_input and price_output are not set" in shown["missing"]["incumbent"]["cost"]
    assert "advise.prices has no hour" in shown["missing"]["tuned"]["cost"]


def test_evaluate_on_dev_asks_dev_only_and_counts_rows_that_the_incumbent_has_seen(
    trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "project"))
    with stand_in() as server:
        incumbent = {"name": "hosted", "base_url": server.url, "model": "stand-in"}
        with_incumbents(folder, {**incumbent, "trained_on": ["other.jsonl"]})
        ran = tunewright("evaluate", "--dev", "-p", folder)
        assert ran.code == 2 and "No row was read from a file other.jsonl" in ran.stderr
        with_incumbents(folder, {**incumbent, "trained_on": ["pairs.jsonl"]})
        ran = tunewright("evaluate", "--dev", "-p", folder, "--json")
        assert ran.code == 0, ran.stderr
        dev = [m.example.input_text for m in package.open(folder).data.version().examples("dev")]
        assert sorted(server.prompts) == sorted(dev)
    said = tunewright("verdict", ran.document["evidence"]["id"], "-p", folder).stdout
    assert f"{len(dev)} of the items are from files that hosted was trained on" in said


def test_missing_key_is_reported_before_anything_is_sent_or_computed(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "project"))
    with stand_in() as server:
        first = {"name": "paid", "base_url": server.url, "model": "stand-in"}
        with_incumbents(folder, first, {**first, "name": "keyless", "api_key_env": "NO_SUCH_KEY"})
        ran = tunewright("evaluate", "-p", folder, "--json")
        assert ran.code == 2
        assert ran.document["error"]["where"] == "evaluate.incumbents.keyless.api_key_env"
        assert server.bodies == []
        assert "Loading" not in ran.stderr
    assert not (folder / "evaluations" / "access_log.jsonl").exists()
