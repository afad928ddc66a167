"""A metric of the project's own: where it is found, what it is given, and what it may do."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from making.evidence import pair, scorers
from tunewright.config.metrics import Json, Python, Regex
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.metrics import Scores, check_references, metric_inputs, score_all, scorer_of


def _scores(root: Path, code: str, answers: list[str], name: str = "scoring:worth") -> Scores:
    (root / "scoring.py").write_text(code, encoding="utf-8")
    examples = [pair(f"question {n}", "ref") for n in range(len(answers))]
    return score_all(scorer_of(Python(python=name), root), answers, examples)


def test_custom_metric_gets_answer_reference_and_example(tmp_path: Path) -> None:
    code = """
def worth(answer, reference, example):
    assert reference == example.output == "ref"
    return len(answer) / 10 if example.input_text == "question 1" else 1
"""
    scores = _scores(tmp_path, code, ["abc", "abc"])
    assert scores.values.tolist() == [1, 0.3]
    assert scores.total() == pytest.approx(0.65)
    assert scores.scorer.kind == "mean"


def test_custom_metric_may_import_neighbours_and_return_numpy_numbers(tmp_path: Path) -> None:
    (tmp_path / "its_neighbour.py").write_text("HALF = 0.5\n")
    code = "import numpy as np\nfrom its_neighbour import HALF\ndef worth(a, r, e): return np.float32(HALF)\n"
    assert _scores(tmp_path, code, ["x"]).total() == 0.5


def test_custom_metric_modules_of_two_projects_are_separate(tmp_path: Path) -> None:
    for name, value in (("one", 0.25), ("two", 0.75)):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "metrics.py").write_text(f"def f(a, r, e): return {value}\n")
        scorer = scorer_of(Python(python="deep.metrics:f"), tmp_path / name)
        assert score_all(scorer, ["x"], [pair("?", "y")]).total() == value


def test_custom_metric_returning_none_is_unscored(tmp_path: Path) -> None:
    code = "def worth(a, r, e): return None if a == '?' else 1.0\n"
    scores = _scores(tmp_path, code, ["x", "?", "?"])
    assert (scores.total(), scores.reasons) == (1.0, {"scoring:worth returned None": 2})


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (
            "raise KeyError('court')",
            r"scoring:worth raised KeyError \('court'\) for example [0-9a-f]{12} \('question 1'\)",
        ),
        ("return 1.5", "scoring:worth returned 1.5 for example"),
        ("return float('nan')", "scoring:worth returned nan for example"),
        ("return True", "scoring:worth returned True for example"),
        ("return 'good'", "scoring:worth returned 'good' for example"),
    ],
)
def test_custom_metric_error_names_the_item(tmp_path: Path, body: str, what: str) -> None:
    code = f"def worth(a, r, e):\n    if a == 'fine': return 0\n    {body}\n"
    with pytest.raises(UserError, match=what):
        _scores(tmp_path, code, ["fine", "x"])


@pytest.mark.parametrize(
    ("code", "name", "what"),
    [
        ("def worth(a, r, e): return 1\n", "other:worth", "No module 'other' in the project's folder"),
        ("def worth(a, r, e): return 1\n", "scoring:wrth", "The module has no function 'wrth'"),
        ("import no_such_thing\n", "scoring:worth", "Importing it raised ModuleNotFoundError"),
        ("def worth(:\n", "scoring:worth", "Importing it raised SyntaxError"),
    ],
)
def test_missing_or_broken_custom_metric_is_reported(tmp_path: Path, code: str, name: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        _scores(tmp_path, code, ["x"], name)


def test_changed_module_changes_the_digest(tmp_path: Path) -> None:
    metric = Python(python="scoring:worth")
    before = _scores(tmp_path, "def worth(a, r, e): return 1\n", ["x"]).scorer.definition
    inputs = metric_inputs(metric, tmp_path)
    after = _scores(tmp_path, "def worth(a, r, e): return 0\n", ["x"])
    assert metric_inputs(metric, tmp_path) != inputs
    assert after.scorer.definition != before
    assert after.total() == 0


def test_documented_sql_metric_compares_results(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "metrics.md").read_text(encoding="utf-8")
    (code,) = (block.split("```")[0] for block in page.split("```python\n")[1:] if "sqlite3" in block)
    with closing(sqlite3.connect(tmp_path / "shop.sqlite")) as database, database:
        database.executescript("CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x'), (2, 'y');")
    reference = "SELECT b, a FROM t WHERE a = 2"
    answers = ["select b, a from t where a > 1", "SELECT a, b FROM t", "DROP TABLE t", "SELECT b, a FROM t WHERE a = 2"]
    (tmp_path / "scoring.py").write_text(code)
    scorer = scorer_of(Python(python="scoring:same_rows"), tmp_path)
    scores = score_all(scorer, answers, [pair(f"question {n}", reference) for n in range(4)])
    assert scores.values.tolist() == [1, 0, 0, 1]
    assert score_all(scorer, ["SELECT 1"], [pair("question", "SELECT")]).unscored


# References that a metric does not suit


class _Heard(LogReporter):
    def __init__(self) -> None:
        super().__init__()
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def test_unscorable_references_are_reported_before_answering() -> None:
    heard = _Heard()
    fields: Any = Json.model_validate({"json": {"fields": ["a"]}})
    examples = [pair("one?", '{"a": 1}'), pair("two?", "abc")]
    check_references(scorers([fields, Regex(regex="[a-z]+")]), examples, "dev", heard)
    assert heard.warned == [
        "1 of 2 dev items cannot be scored by json a and are left out: the reference is not JSON (1)",
        "By regex [a-z]+ 1 of 2 dev references score less than 1 themselves: no answer can be right there. Look at "
        "the metric's settings, or at the data.",
    ]


def test_metric_that_scores_no_reference_is_refused() -> None:
    with pytest.raises(UserError, match="No item can be scored by json"):
        check_references(scorers(["json"]), [pair("?", "abc")], "test", _Heard())
