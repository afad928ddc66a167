"""`--estimate` and `--minutes` of `evaluate` and `advise`, and verdicts on the dev split, on a tiny base."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tunewright as library
from making.command_line import Ran, trained_project, tunewright
from tunewright.evaluation import time_limit
from tunewright.evaluation.generations import Generator
from tunewright.evidence.files import load_evidence
from tunewright.evidence.schema import Advice
from tunewright.generation.requests import Request

pytestmark = pytest.mark.slow

CONFIG = "  screening_items: 20\n  margin: 0.5\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter of one short epoch."""
    return trained_project(
        tmp_path_factory.mktemp("budget") / "project",
        tiny_base_folder,
        ("  sources: [pairs.jsonl]\n", "  sources: [pairs.jsonl]\n  val_size: 0.2\n  test_size: 0.2\n"),
        ("  epochs: 2\n", "  epochs: 1\n"),
        ("  num_fewshot: [1, 2]\n", f"  num_fewshot: [1, 2]\n{CONFIG}"),
        count=200,
    )


class Clock:
    """The clock of a machine whose answers take the same time each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.each = 0.7


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """0.7 s for each answer, until a test changes it."""
    found, generate = Clock(), Generator.generate

    def timed(self: Generator, requests: Sequence[Request], *rest: Any, **named: Any) -> Any:
        completions = generate(self, requests, *rest, **named)
        found.now += found.each * len(requests)
        return completions

    monkeypatch.setattr(time_limit, "monotonic", lambda: found.now)
    monkeypatch.setattr(Generator, "generate", timed)
    return found


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return Path(shutil.copytree(trained, tmp_path / "project"))


def said(ran: Ran) -> str:
    """Return stdout and stderr on one line."""
    return " ".join(f"{ran.stdout} {ran.stderr}".split())


def needed(*command: str | Path) -> int:
    """Return the minutes that the refusal of too few names."""
    refused = tunewright(*command, "--minutes", "0.01", "--json")
    assert refused.code == 2, refused.stderr
    found = re.search(r"--minutes (\d+) or more", refused.document["error"]["fix"])
    assert found is not None
    return int(found[1])


def test_evaluate_estimates_its_answers(project: Path) -> None:
    answers = tunewright("evaluate", "--estimate", "--project", project, "--json").document["answers"]
    # 11 arms on 20, zero-shot and 3 finalists on the other 20, 4 on test, and the base twice for the noise floor.
    assert (answers["answers"], answers["kept"]) == (11 * 20 + 4 * 20 + 4 * 40 + 2 * 40, 0)


def test_run_names_its_work_first_and_leaves_out_what_does_not_fit(project: Path) -> None:
    shutil.rmtree(project / "adapters")
    untrained = tunewright("evaluate", "--estimate", "--project", project, "--json").document["answers"]
    assert untrained["answers"] == 11 * 20 + 4 * 20 + 4 * 40 + 2 * 40
    assert "This counts an adapter that is not trained yet." in untrained["text"]
    fewest = needed("run", "--project", project)
    ran = tunewright("run", "--minutes", str(fewest + 1), "--project", project, "--json")
    assert ran.code in {0, 3, 4}, ran.stderr
    plan = "120 rows train an adapter (at most 1 epoch), and the test split compares both. To answer: at most "
    assert plan in said(ran)
    with pytest.raises(ValueError, match="mutually exclusive"):
        library.open(project).evaluate(minutes=5, advice=Advice.model_validate(ran.document["advice"]))
    advised, budget = (ran.document[part]["budget"] for part in ("advice", "evidence"))
    assert advised == budget and budget["minutes"] == fewest + 1
    assert budget["left_out"][0] == "tuned+retrieved" and len(budget["left_out"]) > 1
    assert "tuned+retrieved" not in [arm["name"] for arm in ran.document["evidence"]["arms"]]
    again = tunewright("run", "--minutes", str(fewest + 1), "--project", project, "--json")
    assert again.document["evidence"]["id"] == ran.document["evidence"]["id"]
    assert "To answer" not in said(again)


def test_evaluate_refuses_a_budget_below_the_minimum(project: Path) -> None:
    for none in ("0", "-3", "nan"):
        refused = tunewright("evaluate", "--minutes", none, "--project", project, "--json")
        assert (refused.code, refused.document["error"]["where"]) == (2, "--minutes")
    refused = tunewright("evaluate", "--minutes", "1", "--project", project, "--json")
    assert refused.code == 2
    error = refused.document["error"]
    assert error["where"] == "--minutes"
    assert "1 minutes are too few: the arms that are never left out take about" in error["what"]
    assert "at the speed of the answers so far; still to answer: a finalist, zero-shot, " in error["what"]
    assert "the best prompting arm, tuned" in error["what"]
    fewest = int(re.search(r"--minutes (\d+) or more", error["fix"])[1])  # type: ignore[index]
    assert fewest > 1
    assert not (project / "evaluations" / "access_log.jsonl").exists()
    # Zero-shot and the arm with one retrieved demonstration answered the first 20 items, and are kept; so are the
    # prompts for which another retriever finds the same demonstration.
    stopped = tunewright("evaluate", "--estimate", "--project", project, "--json").document["answers"]
    assert stopped["answers"] == 11 * 20 + 4 * 20 + 4 * 40 + 2 * 40
    assert 2 * 20 <= stopped["kept"] < 3 * 20
    ran = tunewright("evaluate", "--minutes", str(fewest), "--project", project, "--json")
    assert ran.code == 0, ran.stderr


def test_evaluate_leaves_no_arm_out_when_the_prompt_was_chosen_before(project: Path) -> None:
    assert tunewright("advise", "--no-pilot", "--project", project).code in {0, 3, 4}
    ran = tunewright("evaluate", "--dev", "--minutes", "0.01", "--project", project, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["evidence"]["budget"] is None
    assert "--minutes 0.01 leaves no arm out: the best prompting arm was chosen before" in said(ran)


def test_evaluate_with_a_budget_leaves_arms_out_by_the_rule_and_reports_them(project: Path) -> None:
    fewest = needed("evaluate", "--project", project)
    ran = tunewright("evaluate", "--minutes", str(fewest + 1), "--project", project, "--json")
    assert ran.code == 0, ran.stderr
    evidence = load_evidence(Path(ran.document["folder"]))
    budget = evidence.budget
    assert budget is not None
    assert budget.minutes == fewest + 1 >= budget.expected
    # What decides nothing first; then two demonstrations before one, static before retrieved, later draws first.
    order = ["tuned+retrieved", "static-2-seed-3", "static-2-seed-2", "static-2-seed-1", "retrieved-2-tfidf"]
    order += ["retrieved-2", "static-1-seed-3", "static-1-seed-2", "static-1-seed-1", "retrieved-1-tfidf"]
    assert list(budget.left_out) == [name for name in order if name in budget.left_out]
    assert budget.left_out[0] == "tuned+retrieved"
    assert budget.prompting
    tried = {arm.name for arm in (evidence.narrowing.arms if evidence.narrowing else evidence.dev_arms)}
    assert {"zero-shot", "retrieved-1"} <= tried
    assert not tried & set(budget.left_out)
    assert evidence.items == 40
    verdict = said(tunewright("verdict", "--project", project))
    assert "Prompting was not tried as hard as usual" in verdict
    assert budget.prompting[0] in verdict
    assert tunewright("report", "--project", project).code == 0
    page = (Path(ran.document["folder"]) / "report.html").read_text()
    assert "The rule: left out first" in page
    assert "Prompting was not tried as hard as usual" in page


def test_evaluate_reuses_the_same_budget_and_measures_another(project: Path, clock: Clock) -> None:
    first = tunewright("evaluate", "--minutes", "4", "--project", project, "--json")
    assert first.code == 0, first.stderr
    assert first.document["evidence"]["budget"]["left_out"]
    # A machine that has become ten times as fast would leave fewer arms out.
    clock.each = 0.07
    again = tunewright("evaluate", "--minutes", "4", "--project", project, "--json").document
    assert (again["folder"], again["evaluated"]) == (first.document["folder"], False)
    whole = tunewright("evaluate", "--project", project, "--json").document
    assert whole["evidence"]["budget"] is None
    assert whole["folder"] != first.document["folder"]
    assert len(tunewright("access-log", "--project", project, "--json").document["openings"]) == 2


def test_advise_accepts_a_budget(project: Path) -> None:
    ran = tunewright("advise", "--no-pilot", "--minutes", "1.5", "--project", project, "--json")
    assert ran.code in {3, 4}, ran.stderr
    budget = ran.document["advice"]["prompting"]["budget"]
    assert budget["left_out"][0] == "static-2-seed-3"
    assert "retrieved-1" not in budget["left_out"]


# The dev split


def test_verdict_on_dev_is_marked_as_dev_everywhere(project: Path) -> None:
    ran = tunewright("evaluate", "--dev", "--project", project, "--json")
    assert ran.document["split"] == ran.document["evidence"]["split"] == "dev"
    assert tunewright("access-log", "--project", project, "--json").document["openings"] == []
    message = tunewright("verdict", "--project", project, "--json")
    assert message.code == {"ship": 0, "don't ship": 3, "can't tell": 4}[message.document["decision"]]
    assert message.document["split"] == "dev"
    assert "on 40 dev items" in message.document["reasons"][0]
    assert any("does not accept this verdict" in reason for reason in message.document["reasons"])
    assert f"Verdict (on dev): {message.document['decision']}" in said(tunewright("verdict", "--project", project))
    markdown = tunewright("verdict", "--markdown", "--project", project).stdout
    assert "(on dev): " in markdown.splitlines()[0]
    assert tunewright("report", "--project", project).code == 0
    page = (Path(ran.document["folder"]) / "report.html").read_text()
    assert "(on dev)" in page
    assert "Arms on the dev split" in page
    assert "test item" not in page
