"""``review``: answers compared by keys, blind, on a terminal and without one, and by way of a spreadsheet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from making.command_line import tunewright
from making.human_evaluations import begin, evaluation, evaluation_with_incumbent, side_of_treatment
from making.terminal import Terminal
from tunewright.cli import commands
from tunewright.evidence.files import load_evidence
from tunewright.evidence.human_eval import human_eval_line
from tunewright.evidence.verdict import decisive_preferences
from tunewright.report.verbs import markdown_of

ID = "0123456789ab"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    evaluation(tmp_path / "evaluations" / ID)
    return tmp_path


@pytest.fixture
def folder(project: Path) -> Path:
    return project / "evaluations" / ID


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that the reviewer will press, and a note after each n; all of them have to be asked for."""
    import tunewright.cli.data_review as cli
    import tunewright.cli.preferences as human_eval

    commands()
    keys: list[str] = []
    monkeypatch.setattr(cli, "interactive", lambda: True)
    monkeypatch.setattr(cli, "read_key", lambda: keys.pop(0))
    monkeypatch.setattr(human_eval, "read_note", lambda _: keys.pop(0))
    yield keys
    assert keys == []


def _review(project: Path, *options: str | Path, reviewer: str | None = "ada"):  # type: ignore[no-untyped-def]
    who = ["--reviewer", reviewer] if reviewer else []
    return tunewright("human-eval", ID, "-p", project, *who, *options)


def test_human_eval_shows_both_answers_without_naming_arms(project: Path, folder: Path, press: list[str]) -> None:
    press += ["a", "b", "g", "x", "s", "w", "q"]
    ran = _review(project)
    assert ran.code == 0
    review = begin(folder)
    for key in review.sample.order[:5]:
        pair = review.item(key)
        assert pair.a.split()[0] in ran.stderr
    assert not any(word in ran.stderr for word in ("tuned", "retrieved", "fixed", "broken", "Reference"))
    assert "Unknown key 'w'" in ran.stderr
    assert "4 of 50 pairs judged, 1 skipped" in ran.stderr
    assert [j.verdict for j in review.log.standing.values()] == ["A", "B", "both", "neither", "skip"]


def test_incumbent_is_compared_apart_and_decides_nothing(tmp_path: Path, press: list[str]) -> None:
    folder = evaluation_with_incumbent(tmp_path / "evaluations" / ID, count=24)
    before = tunewright("verdict", ID, "-p", tmp_path, "--json").document
    asked = len(begin(folder, against="hosted").sample.order)
    press += ["a"] * asked
    ran = _review(tmp_path, "--against", "hosted")
    assert ran.code in (0, 3, 4) and not any(word in ran.stderr for word in ("tuned", "incumbent"))
    shown = tunewright("human-eval", ID, "-p", tmp_path, "--results", "--against", "hosted", "--json")
    assert (shown.document["control"], shown.document["answered"]) == ("incumbent-hosted", asked)
    evidence = load_evidence(folder)
    found = evidence.human_eval_incumbents["hosted"]
    assert {**found.model_dump(mode="json"), "decision": found.decision} == shown.document
    assert evidence.human_eval is None and decisive_preferences(evidence)[0] is None
    after = tunewright("verdict", ID, "-p", tmp_path, "--json").document
    (replaced,), (earlier,) = after.pop("incumbents"), before.pop("incumbents")
    assert after == before, "it decides nothing"
    assert replaced.pop("human_eval") == shown.document and earlier.pop("human_eval") is None
    line = f"{human_eval_line(found)} This comparison decides nothing."
    assert replaced["reasons"] == [*earlier["reasons"], line]
    assert {**replaced, "reasons": []} == {**earlier, "reasons": []}
    assert line in " ".join(tunewright("verdict", ID, "-p", tmp_path).stdout.split())
    markdown = markdown_of(evidence)
    assert markdown.index("| hosted |") < markdown.index("This comparison decides nothing")
    lines = (tmp_path / "evaluations" / "access_log.jsonl").read_bytes()
    tunewright("human-eval", ID, "-p", tmp_path, "--results", "--against", "hosted")
    assert (tmp_path / "evaluations" / "access_log.jsonl").read_bytes() == lines, "the same results are written once"
    lacking = tunewright("human-eval", ID, "-p", tmp_path, "--results")
    assert lacking.code == 2 and "no reviews" in lacking.stderr


def test_undo_reference_and_note_by_key(project: Path, folder: Path, press: list[str]) -> None:
    press += ["u", "a", "u", "v", "n", "the county is missing", "b", "q"]
    ran = _review(project)
    assert "There is nothing to take back." in ran.stderr
    assert "Taken back." in ran.stderr
    assert "Your note: the county is missing" in ran.stderr
    journal = begin(folder).log
    (judged,) = journal.standing.values()
    assert (judged.verdict, judged.reference, journal.notes[judged.key]) == (
        "B",
        True,
        {"ada": "the county is missing"},
    )
    assert begin(folder).item(judged.key).reference is not None
    assert ran.stderr.count("Reference") >= 1


def test_human_eval_adds_results_to_the_evidence_after_the_last_verdict(
    project: Path, folder: Path, press: list[str]
) -> None:
    review = begin(folder, items=30)
    press += [side_of_treatment(review, review.item(key)).lower() for key in review.sample.order]
    ran = _review(project, "--items", "30", "--json")
    assert ran.code == 0
    assert (ran.document["preferred"], ran.document["decision"]) == ([30, 0], "treatment")
    section = load_evidence(folder).human_eval
    assert section is not None
    assert {**section.model_dump(mode="json"), "decision": section.decision} == ran.document
    message = _review(project, "--results", reviewer=None)
    assert message.code == 0
    assert "tuned is preferred on 30, retrieved-4 on 0" in message.stdout
    assert "People prefer tuned." in message.stdout
    assert tunewright("verdict", ID, "-p", project).code in (0, 3, 4)


@pytest.mark.parametrize(("better", "code"), [("control", 3), ("neither", 4)])
def test_human_eval_results_exits_with_the_preference(
    project: Path, folder: Path, press: list[str], better: str, code: int
) -> None:
    review = begin(folder, items=30)
    for key in review.sample.order:
        press.append("x" if better == "neither" else "ba"[side_of_treatment(review, review.item(key)) == "B"])
    assert _review(project, "--items", "30").code == 0
    assert _review(project, "--results", reviewer=None).code == code


@pytest.mark.slow
def test_human_eval_keeps_verdicts_and_resumes_after_a_kill(project: Path, folder: Path) -> None:
    arguments = ("human-eval", ID, "-p", project, "--reviewer", "ada")
    terminal = Terminal(*arguments)
    terminal.wait_for("q quit")
    for key, shown in (("a", "1 of 50"), ("b", "2 of 50"), ("v", "Reference")):
        terminal.press(key)
        terminal.wait_for(shown)
    terminal.kill()
    again = Terminal(*arguments)
    again.wait_for("q quit")
    assert "2 of 50" in again.screen
    assert "Reference" in again.screen  # shown before the kill: it stays on the record and on the screen
    again.press("u")
    again.wait_for("1 of 50")
    again.press("g")
    again.wait_for("2 of 50")
    again.press("q")
    again.wait_for("The same command resumes")
    assert again.code() == 0
    standing = begin(folder).log.standing
    assert [standing[key].verdict for key in begin(folder).sample.order[:2]] == ["A", "both"]
