"""Pairs kept from blind A/B and from a judge: only preferences, with who judged, when and which arms."""

from __future__ import annotations

from pathlib import Path

import pytest

from making.command_line import pairs, tunewright, write_jsonl
from making.evidence import make_evidence, with_scores
from making.full_evidence import JUDGE
from making.human_evaluations import begin, save, side_of_treatment
from tunewright.data.versions import load_version
from tunewright.data.versions.logs import read_kept_pairs
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.human_eval.sample import FOLDER
from tunewright.evaluation.judge.questions import (
    ROWS_FILE,
    ArmCorrectness,
    ArmPreference,
    JudgedItem,
    JudgedPair,
    Outcome,
)
from tunewright.evidence.files import load_items
from tunewright.evidence.schema import Item

ID = "0123456789ab"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A dataset, and an evaluation of rows of all of its splits, as a cross-validation has."""
    (tmp_path / "tunewright.yaml").write_text("name: tiny\n")
    assert tunewright("data", "add", write_jsonl(tmp_path / "pairs.jsonl", pairs(60)), "-p", tmp_path).code == 0
    version = load_version(tmp_path / "dataset")
    items = [
        Item(
            key=m.key,
            cluster=m.cluster,
            input=m.example.input_text,
            reference=m.example.output,
            answers={"zero-shot": "no", "retrieved-4": "an answer " * (1 + n % 2), "tuned": m.example.output},
            scores={},
        )
        for n, m in enumerate(version.members[:24])
    ]
    scored = with_scores(items)
    evidence = make_evidence(scored)
    lineage = {**evidence.lineage, "dataset": version.digest}
    save(tmp_path / "evaluations" / ID, scored, evidence.model_copy(update={"lineage": lineage, "judge": JUDGE}))
    return tmp_path


def test_people_and_their_preferences_become_pairs(project: Path) -> None:
    folder = project / "evaluations" / ID
    review = begin(folder, items=20)
    asked = review.sample.order
    for number, key in enumerate(asked[:6]):
        pair = review.item(key)
        treatment = side_of_treatment(review, pair)
        other = "B" if treatment == "A" else "A"
        review.answer(pair, [treatment, other, "both", "neither", "skip", treatment][number])  # type: ignore[arg-type]
    for _ in range(2):
        ran = tunewright("human-eval", ID, "--keep-preferences", "-p", project, "--json")
        assert ran.code == 0, ran.stderr
    kept = {pair.key: pair for pair in read_kept_pairs(project / "dataset")}
    answers = {item.key: item.answers for item in load_items(folder)}
    assert kept.keys() == {asked[0], asked[1], asked[5]}
    first, second = kept[asked[0]], kept[asked[1]]
    assert (first.chosen, first.rejected) == (answers[asked[0]]["tuned"], answers[asked[0]]["retrieved-4"].strip())
    assert first.arms == ("tuned", "retrieved-4")
    assert second.arms == ("retrieved-4", "tuned")
    assert (first.by, first.kind, first.evaluation) == ("ada", "person", ID)
    assert first.version == load_version(project / "dataset").digest
    assert ran.document["left_out"] == {"no preference": 2}
    assert (ran.document["kept"], ran.document["new"]) == (3, 0)
    assert sum(ran.document["splits"].values()) == 3
    assert (folder / FOLDER).is_dir()


def test_withdrawn_preference_is_withdrawn_from_the_pairs(project: Path) -> None:
    review = begin(project / "evaluations" / ID, items=20)
    review.answer(review.item(review.sample.order[0]), "A")
    assert tunewright("human-eval", ID, "--keep-preferences", "-p", project).code == 0
    assert len(read_kept_pairs(project / "dataset")) == 1
    review.undo()
    assert tunewright("human-eval", ID, "--keep-preferences", "-p", project).code == 0
    assert read_kept_pairs(project / "dataset") == []


def _judged(key: str, outcome: Outcome | None, *, flipped: bool = False) -> str:
    pair = JudgedPair(plain=ArmPreference(outcome=outcome, flipped=flipped))
    row = JudgedItem(key=key, correctness={"tuned": ArmCorrectness(correct=True)}, pairs={"retrieved-4": pair})
    return f"{row.model_dump_json()}\n"


def test_judged_preferences_become_pairs_where_both_orders_agree(project: Path) -> None:
    folder = project / "evaluations" / ID
    keys = [item.key for item in load_items(folder)]
    rows = [
        _judged(keys[0], "win"),
        _judged(keys[1], "loss"),
        _judged(keys[2], "tie", flipped=True),
        _judged(keys[3], "tie"),
        _judged(keys[4], None),
    ]
    AccessLog(folder.parent).write(folder / ROWS_FILE, "".join(rows))
    ran = tunewright("judge", ID, "--keep-preferences", "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    kept = {pair.key: pair for pair in read_kept_pairs(project / "dataset")}
    assert {key: pair.arms[0] for key, pair in kept.items() if pair.arms} == {
        keys[0]: "tuned",
        keys[1]: "retrieved-4",
    }
    assert {(pair.kind, pair.by) for pair in kept.values()} == {("judge", JUDGE.model)}
    assert ran.document["left_out"] == {"the two orders disagree": 1, "no preference": 1, "no verdict": 1}
    outside = sum(count for split, count in ran.document["splits"].items() if split != "train")
    assert (f"{outside} of 2 pairs are of inputs outside the training split" in ran.stderr) == (outside > 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["human-eval", ID, "--keep-preferences"], "The evaluation has no reviews"),
        (["human-eval", ID, "--keep-preferences", "--results"], "mutually exclusive"),
        (["human-eval", ID, "--keep-preferences", "--items", "5"], "does not use --items"),
        (["judge", ID, "--keep-preferences", "--estimate"], "mutually exclusive"),
        (["judge", ID, "--keep-preferences"], "has no judged items"),
    ],
)
def test_nothing_to_keep_is_one_error(project: Path, options: list[str], words: str) -> None:
    ran = tunewright(*options, "-p", project)
    assert ran.code == 2
    assert words in ran.stderr
    assert read_kept_pairs(project / "dataset") == []


def test_vetoed_judge_gives_no_pairs(project: Path) -> None:
    folder = project / "evaluations" / ID
    vetoed = JUDGE.model_copy(
        update={"vetoed": ("it prefers the first answer",), "arms": (), "contrast": None, "preferences": ()}
    )
    AccessLog(folder.parent).amend(folder, judge=vetoed)
    ran = tunewright("judge", ID, "--keep-preferences", "-p", project)
    assert ran.code == 2
    assert "failed its controls, so its preferences are not kept" in ran.stderr
