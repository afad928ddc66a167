"""AST match on all of BFCL's items: its acceptable answers are right, changed ones wrong, as its own checker says."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from making.bfcl_examples import Call, Item, answer_text, gold, items, needs_bfcl, perturbed, respelled
from making.evidence import scorers
from tunewright.metrics import Scorer, Unscored
from tunewright.metrics.calls import call_ast_match
from tunewright.metrics.scorer import AnsweredItem

pytestmark = needs_bfcl

MOST = 64


def _ast(rows: Sequence[Item]) -> Scorer:
    return call_ast_match(
        "call_ast_match", {i.example.pair_key: i.row["acceptable"] for i in rows if "acceptable" in i.row}
    )


def _value(scorer: Scorer, item: Item, answer: str) -> float:
    score = scorer.item(AnsweredItem(answer, item.example, (item.example.output,)))
    assert not isinstance(score, Unscored)
    return score.value


def _called() -> list[Item]:
    return [item for item in items() if item.truth]


@pytest.mark.slow
def test_ast_match_accepts_every_acceptable_answer_of_bfcl() -> None:
    scorer, checked = _ast(items()), Counter[str]()
    for item in _called():
        for calls in gold(item, 8, random.Random(item.row["id"])):
            assert _value(scorer, item, answer_text(calls)) == 1, (item.row["id"], calls)
            checked[item.category] += 1
    assert checked.keys() == {
        "simple_python",
        "multiple",
        "parallel",
        "parallel_multiple",
        "live_simple",
        "live_multiple",
    }
    assert checked.total() > 3_000


@pytest.mark.slow
def test_ast_match_refuses_changed_answers_of_bfcl() -> None:
    scorer, checked = _ast(items()), Counter[str]()
    for item in _called():
        draw = random.Random(item.row["id"])
        for change, calls in perturbed(item, next(gold(item, MOST, draw)), draw):
            assert _value(scorer, item, answer_text(calls)) == 0, (item.row["id"], change, calls)
            checked[change] += 1
    assert min(checked.values()) > 100, checked


def test_irrelevant_items_of_bfcl_want_no_call() -> None:
    (irrelevance,) = scorers(["irrelevance_detection"])
    ast = _ast(items())
    rows = [item for item in items() if not item.truth]
    assert len(rows) == 240
    for item in rows:
        name = item.row["tools"][0]["function"]["name"]
        for scorer in (irrelevance, ast):
            assert _value(scorer, item, item.example.output) == 1
            assert _value(scorer, item, answer_text([(name, {})])) == 0


# BFCL's own checker, where `pip install --no-deps bfcl-eval` has put it


@pytest.fixture(scope="module")
def checker() -> Any:
    pytest.importorskip("bfcl_eval", reason="needs `pip install --no-deps bfcl-eval`")
    # Its table of models imports the SDK of each; the checker only asks it whether dots became underscores.
    table = ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = {"any": SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
    sys.modules[table.__name__] = table
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(item: Item, calls: Sequence[Call]) -> bool:
        output = [{name.replace(".", "_"): arguments} for name, arguments in calls]
        result = ast_checker(item.functions, output, item.truth, Language.PYTHON, item.category, "any")
        return bool(result["valid"])

    return check


def test_ast_match_agrees_with_bfcls_checker(checker: Any) -> None:
    scorer, counts, paired = _ast(items()), Counter[bool](), 0
    for item in _called():
        draw = random.Random(item.row["id"])
        answers = list(gold(item, MOST, draw))
        changed = [calls for answer in answers[:3] for _, calls in perturbed(item, answer, draw)]
        spelled = [respelled(draw.choice(answers), draw) for _ in range(30)]
        for calls in [*answers, *changed, *spelled]:
            theirs, ours = checker(item, calls), bool(_value(scorer, item, answer_text(calls)))
            counts[theirs] += 1
            if ours and not theirs and len(calls) > 1:
                # It pairs parallel calls with the first that match, so that it accepts some orders only.
                theirs = any(checker(item, order) for order in itertools.permutations(calls))
                paired += 1
            assert theirs == ours, (item.row["id"], calls)
    assert min(counts.values()) > 10_000, counts
    assert 0 < paired < 200
