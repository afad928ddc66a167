"""Announcements of `evaluate` and `advise`, `--minutes`, and verdicts on the dev split, on a tiny base."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from command_line import Ran, tiny_project, tunewright
from tunewright.evaluation.access_log import ACCESS_LOG
from tunewright.evidence.schema import load_evidence

pytestmark = pytest.mark.slow

CONFIG = "  screening_items: 20\n  margin: 0.5\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter of one short epoch, its speed measured here and then set: 10 ms for each token."""
    folder = tiny_project(tmp_path_factory.mktemp("budget") / "project", tiny_base_folder, count=200)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace(
        "  sources: [pairs.jsonl]\n", "  sources: [pairs.jsonl]\n  val_size: 0.2\n  test_size: 0.2\n"
    )
    text = text.replace("  epochs: 2\n", "  epochs: 1\n")
    config.write_text(text.replace("  num_fewshot: [1, 2]\n", f"  num_fewshot: [1, 2]\n{CONFIG}"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "--project", folder).code == 0
    assert tunewright("train", "--project", folder).code == 0
    refused = tunewright("evaluate", "--minutes", "0.000001", "--project", folder)
    assert refused.code == 2, refused.stderr
    speeds = [(path, json.loads(path.read_text())) for path in (folder / ".tunewright" / "speeds").iterdir()]
    (base, kept), (adapter, timed) = sorted(speeds, key=lambda found: "batches" not in found[1])
    base.write_text(json.dumps({**kept, "read": 0.01, "write": 0.01}))
    adapter.write_text(json.dumps({**timed, "seconds": (timed["read"] + timed["written"]) * 0.01}))
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return Path(shutil.copytree(trained, tmp_path / "project"))


def said(ran: Ran) -> str:
    """Return stdout and stderr on one line."""
    return " ".join(f"{ran.stdout} {ran.stderr}".split())


def expected_minutes(text: str) -> int:
    """Return the minutes of an announcement."""
    found = re.search(r"To answer: .*?: about (\d+) minutes \(timed: ", text)
    assert found is not None, text
    return int(found[1])


def test_evaluate_announces_its_answers_and_duration(project: Path) -> None:
    ran = tunewright("evaluate", "--project", project)
    assert ran.code == 0, ran.stderr
    message = said(ran)
    assert "To answer: 11 prompting arms on 20 of 40 dev items, at most 4 of them on all; " in message
    assert "4 arms on 40 test items and the noise floor. " in message
    answers = int(re.search(r"floor\. ([\d,]+) answers", message)[1].replace(",", ""))  # type: ignore[index]
    # 11 arms on 20, 4 on the other 20, 4 on test, and the base twice for the noise floor.
    assert answers == 11 * 20 + 4 * 20 + 4 * 40 + 2 * 40
    assert expected_minutes(message) > 1
    assert message.index("To answer") < message.index("The test split is opened")


def test_evaluate_refuses_a_budget_below_the_minimum(project: Path) -> None:
    refused = tunewright("evaluate", "--minutes", "1", "--project", project, "--json")
    assert refused.code == 2
    error = refused.document["error"]
    assert error["where"] == "--minutes"
    assert "1 minutes are too few: the arms that are never left out take about" in error["what"]
    assert "(zero-shot, retrieved-1, the best prompting arm, tuned)" in error["what"]
    fewest = int(re.search(r"--minutes (\d+) or more", error["fix"])[1])  # type: ignore[index]
    assert not (project / "evaluations" / "access_log.jsonl").exists()
    assert tunewright("evaluate", "--minutes", str(fewest - 1), "--project", project).code == 2
    assert tunewright("evaluate", "--minutes", str(fewest), "--project", project).code == 0


def test_evaluate_refuses_a_budget_with_the_timing_and_its_date(project: Path) -> None:
    error = tunewright("evaluate", "--minutes", "1", "--project", project, "--json").document["error"]
    assert re.search(r"as timed at 20\d\d-\d\d-\d\dT[\d:+]+: \d+ prompts of \d+ tokens in ", error["what"])
    assert "times again before it refuses" in error["fix"]


def test_evaluate_times_again_before_it_refuses_when_the_kept_speed_is_old(project: Path) -> None:
    for path in (project / ".tunewright" / "speeds").iterdir():
        kept = json.loads(path.read_text())
        if "batches" in kept:
            path.write_text(json.dumps({**kept, "measured": "2025-01-01T00:00:00.000+00:00"}))
    ran = tunewright("evaluate", "--minutes", "1", "--dev", "--project", project)
    assert ran.code == 0, ran.stderr
    assert "Timed at 2025-01-01T00:00:00+00:00, 1 minutes are too few. Timing again." in said(ran)


def test_evaluate_counts_the_finalists_answers_stored_by_advise(project: Path) -> None:
    """Another instruction is not among them: the choice is another, and most of its answers are there."""
    assert tunewright("advise", "--no-pilot", "--project", project).code in {0, 3, 4}
    for file in (project / "evaluations").glob("advice-*.json"):
        file.unlink()
    message = said(tunewright("evaluate", "--dev", "--project", project))
    kept = re.search(r"([\d,]+) answers, ([\d,]+) of them kept", message)
    assert kept is not None, message
    # The arms on the first 20, and zero-shot and some of the finalists on the other 20.
    assert int(kept[2]) > 11 * 20 + 20


@pytest.mark.slow
def test_evaluate_counts_no_prompting_arm_when_advise_has_chosen_with_the_same_arms(project: Path) -> None:
    for path in (project / ".tunewright" / "speeds").iterdir():  # slow: a rounded minute leaves no room for more arms
        kept = json.loads(path.read_text())
        slow = {"read": 0.1, "write": 0.1} if "batches" in kept else {"seconds": 10 * kept["seconds"]}
        path.write_text(json.dumps({**kept, **slow}))

    def fewest(*command: str) -> str:
        refused = tunewright(*command, "--minutes", "0.01", "--project", project, "--json").document["error"]
        return str(re.search(r"--minutes (\d+) or more", refused["fix"])[1])  # type: ignore[index]

    advise, evaluate = ("advise", "--no-pilot"), ("evaluate", "--dev")
    ran = tunewright(*advise, "--minutes", fewest(*advise), "--project", project, "--json")
    left_out = ran.document["advice"]["prompting"]["budget"]["left_out"]
    message = said(tunewright(*evaluate, "--minutes", fewest(*evaluate), "--project", project))
    assert f"left out tuned+retrieved, {', '.join(left_out)}" in message
    assert "To answer: 1 more arm on 40 dev items. 40 answers" in message


@pytest.mark.parametrize("samples", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_advise_names_the_samples_that_it_writes_and_writes_none_when_the_config_has_none(
    project: Path, samples: int
) -> None:
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("samples: 0", f"samples: {samples}"))
    ran = tunewright("advise", "--no-pilot", "--project", project, "--json")
    assert ran.code in {0, 3, 4}, ran.stderr
    named = "Not counted: 96 turns or more of the base's own samples" in said(ran)
    written = list((project / ".tunewright").glob("self-samples/*/*.json"))
    assert (named, bool(written)) == (samples > 0, samples > 0)
    if not samples:
        assert ran.document["advice"]["left_out"]["generic text"] == "regressions.samples is 0"


@pytest.mark.parametrize("minutes", ["0", "-3", "nan"])
def test_minutes_must_be_greater_than_zero(project: Path, minutes: str) -> None:
    for command in ("evaluate", "advise"):
        refused = tunewright(command, "--minutes", minutes, "--project", project)
        assert refused.code == 2, refused.stderr
        assert "Must be greater than 0" in said(refused)


def test_evaluate_with_a_budget_leaves_arms_out_by_the_rule_and_reports_them(project: Path) -> None:
    whole = tunewright("evaluate", "--minutes", "1", "--project", project, "--json").document["error"]
    fewest = int(re.search(r"--minutes (\d+) or more", whole["fix"])[1])  # type: ignore[index]
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


@pytest.mark.slow
def test_evaluate_reuses_the_same_budget_and_measures_another(project: Path) -> None:
    first = tunewright("evaluate", "--minutes", "4", "--project", project, "--json")
    assert first.code == 0, first.stderr
    assert first.document["evidence"]["budget"]["left_out"]
    # A machine that has become twice as fast would leave fewer arms out.
    for path in (project / ".tunewright" / "speeds").iterdir():
        kept = json.loads(path.read_text())
        if "batches" in kept:
            path.write_text(json.dumps({**kept, "read": 0.001, "write": 0.001}))
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
    stored = tunewright("advise", ran.document["file"], "--minutes", "3", "--project", project)
    assert (stored.code, "does not apply to stored advice" in stored.stderr) == (2, True)


@pytest.mark.slow
def test_evaluate_counts_stored_answers_after_a_stop(project: Path) -> None:
    assert tunewright("evaluate", "--project", project).code == 0
    for each in project.glob("evaluations/*"):  # all but the log, without which nothing is opened again
        if each.is_dir():
            shutil.rmtree(each)
        elif each.name != ACCESS_LOG:
            each.unlink()
    again = said(tunewright("evaluate", "--project", project))
    kept = re.search(r"floor\. ([\d,]+) answers, ([\d,]+) of them kept", again)
    assert kept is not None, again
    assert int(kept[2]) >= 11 * 20


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


def test_deploy_refuses_a_verdict_on_dev(project: Path) -> None:
    assert tunewright("evaluate", "--dev", "--project", project).code == 0
    adapter = next((project / "adapters").iterdir()).name
    refused = tunewright("deploy", "court", adapter, "--project", project)
    assert refused.code == 2
    assert "no verdict on the test split, and one on dev does not allow a release" in said(refused)
