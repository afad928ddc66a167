"""A judge behind HTTP and people by way of a sheet, through the command line, until both are in verdict and report.

The judge counts words in common with the reference; the rater goes by rule too, from chrF. So both are known, and
they are not the same.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF

from making.command_line import Ran, tunewright
from making.evidence import COUNTIES, STATES, with_scores
from making.scripted_judge import Asked, Script, honest, scripted, verdict, write_project
from tunewright.core.io import digest
from tunewright.evidence.files import load_evidence
from tunewright.evidence.schema import Evidence, Item
from tunewright.metrics import normalised

pytestmark = pytest.mark.slow

_CHRF = CHRF()


def _items(count: int) -> list[Item]:
    """Answers that lack some words of the reference: the tuned ones the fewest."""
    rng = np.random.default_rng(0)
    words = [f"{county}{state[:4].lower()}" for county in COUNTIES for state in STATES]
    items = []
    for number in range(count):
        reference = rng.choice(words, 6, replace=False).tolist()
        lacking = {"zero-shot": 4, "retrieved-4": rng.integers(4), "tuned": rng.choice([0, 0, 0, 1, 2])}
        answers = {arm: _without(reference, int(count), rng) for arm, count in lacking.items()}
        items.append(
            Item(
                key=digest(f"{number}"),
                cluster=f"c{number}",
                input=f"Which six, by number {number}?",
                reference=" ".join(reference),
                answers=answers,
                scores={},
            )
        )
    return with_scores(items)


def _without(words: list[str], lacking: int, rng: np.random.Generator) -> str:
    places = sorted(rng.permutation(len(words))[lacking:].tolist())
    return " ".join(words[place] for place in places)


ITEMS = _items(150)


def counts_words(asked: Asked) -> str:
    """Correct is what equals the reference; of two answers that with more words in common with it is better."""
    if len(asked.answers) == 1:
        return honest(asked)
    a, b = (_in_common(answer, asked.reference) for answer in asked.answers)
    return verdict("TIE" if a == b else "A" if a > b else "B")


def _in_common(answer: str, reference: str) -> float:
    ours, theirs = Counter(normalised(answer).split()), Counter(normalised(reference).split())
    return (ours & theirs).total() / max(ours.total() + theirs.total(), 1)


def _rated(row: dict[str, str]) -> str:
    a, b = (_CHRF.sentence_score(row[side], [row["reference"]]).score for side in ("A", "B"))
    return "both" if abs(a - b) < 3 else "A" if a > b else "B"


def _filled_in(sheet: Path, *, turned: bool = False) -> None:
    """A sheet with a verdict in each row; turned: the other answer's."""
    with sheet.open(encoding="utf-8-sig", newline="") as written:
        rows = list(csv.DictReader(written))
    for row in rows:
        row["verdict"] = _rated(row)
        if turned:
            row["verdict"] = {"A": "B", "B": "A"}.get(row["verdict"], row["verdict"])
    with sheet.open("w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _asked(folder: Path, script: Script, *, turned: bool = False) -> tuple[Ran, Evidence]:
    """Run judge, review and results."""
    project = folder / "project"
    with scripted(script) as server:
        evaluation = write_project(project, {"base_url": server.url, "model": "counts-words"}, ITEMS)
        ran = tunewright("judge", "-p", project)
        assert ran.code == 0, ran.stderr
    sheet = folder / "pairs.csv"
    out = tunewright("human-eval", "-p", project, "--export", sheet, "--reference", "--reviewer", "ada")
    assert out.code == 0, out.stderr
    _filled_in(sheet, turned=turned)
    ran = tunewright("human-eval", "-p", project, "--import", sheet, "--reviewer", "ada")
    assert ran.code == 0, ran.stderr
    return ran, load_evidence(evaluation)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran, Evidence]:
    folder = tmp_path_factory.mktemp("heard")
    return folder / "project", *_asked(folder, counts_words)


def test_judge_that_agrees_with_people_narrows_their_win_rate(heard: tuple[Path, Ran, Evidence]) -> None:
    _, ran, evidence = heard
    review = evidence.human_eval
    assert review is not None and review.win_rate is not None and review.powered is not None
    alone, helped = review.win_rate, review.powered.win_rate
    assert 0 < review.powered.tuning <= 1
    assert helped.interval.high - helped.interval.low < alone.interval.high - alone.interval.low
    true = sum(map(_preference, ITEMS)) / len(ITEMS)
    assert helped.interval.low <= true <= helped.interval.high, "of all items, which the rater never saw"
    assert f"people and the judge (lambda {review.powered.tuning:.2f})" in ran.stdout
    (agreed,) = review.agreements
    assert agreed.raters == ("ada", "judge counts-words")
    assert re.search(rf"^ada and judge counts-words +50 +{agreed.agreed} ", ran.stdout, re.MULTILINE)


def _preference(item: Item) -> float:
    """Return the rater's preference for an item: 1 for tuned, 0 for the other, a half for neither."""
    ours, theirs = (_CHRF.sentence_score(item.answers[n], [item.reference]).score for n in ("tuned", "retrieved-4"))
    return 0.5 if abs(ours - theirs) < 3 else float(ours > theirs)


def test_verdict_comment_and_report_include_judge_and_people(heard: tuple[Path, Ran, Evidence]) -> None:
    project, _, evidence = heard
    message = tunewright("verdict", "-p", project)
    comment = tunewright("verdict", "--markdown", "-p", project)
    report = tunewright("report", "-p", project)
    assert report.code == 0, report.stderr
    page = (project / "evaluations" / evidence.id / "report.html").read_text()
    for text in (message.stdout, comment.stdout, page):
        assert "People, blind: 50 of 50 pairs judged" in text
        assert "with the judge" in text
        assert "counts" in text
    assert "people and the judge" in page
