"""Several references of one input: every metric takes them all, and the evidence counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from making.evidence import pair, scorers
from tunewright.config import Metric
from tunewright.config.metrics import Choices, Python
from tunewright.evidence.common import References
from tunewright.evidence.scoring import count_references, measured_metrics
from tunewright.metrics import references_of, score_all, scorer_of

ITEMS = [
    pair("name[Aromi] food[English]", "Aromi serves English food in the city centre."),
    pair("name[Wildwood]", "Wildwood is a cheap coffee shop by the river."),
    pair("Name[Aromi]  food[English]", "There is an English place called Aromi."),
]
ANSWERS = ["There is an English place called Aromi.", "Wildwood is a pub by the river.", "Aromi is a pub."]
STREAMS = [[e.output for e in ITEMS], [ITEMS[2].output, None, ITEMS[0].output]]


def test_references_of_are_the_outputs_of_the_same_input_with_the_own_one_first() -> None:
    assert references_of(ITEMS) == [
        (ITEMS[0].output, ITEMS[2].output),
        (ITEMS[1].output,),
        (ITEMS[2].output, ITEMS[0].output),
    ]
    assert references_of(ITEMS[:1], ITEMS) == [(ITEMS[0].output, ITEMS[2].output)]


@pytest.mark.parametrize(("metric", "theirs"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_score_all_is_sacrebleus_corpus_score_when_inputs_have_several_references(
    metric: Metric, theirs: BLEU | CHRF
) -> None:
    scores = score_all(scorers([metric])[0], ANSWERS, ITEMS)
    assert scores.total() == pytest.approx(theirs.corpus_score(ANSWERS, STREAMS).score / 100)  # type: ignore[arg-type]
    (measured,) = measured_metrics(scorers([metric]), several=True).values()
    assert str(theirs.get_signature()) in measured.definition


@pytest.mark.parametrize("metric", ["exact_match", "token_f1", "rouge_l"])
def test_score_all_takes_the_best_reference(metric: Metric) -> None:
    scores = score_all(scorers([metric])[0], ANSWERS, ITEMS)
    assert scores.values[0] == 1
    assert scores.values[1] < 1
    (measured,) = measured_metrics(scorers([metric]), several=True).values()
    assert measured.definition.endswith("an item's best over all references of its input")


def test_score_all_takes_statistics_of_the_best_reference_when_the_metric_is_of_the_corpus() -> None:
    items = [pair("same", "no JSON"), pair("same", '{"a": 1, "b": 2}'), pair("same", '{"a": 1}')]
    scores = score_all(scorers(["json"])[0], ['{"a": 1}'] * 3, items)
    assert scores.unscored == {}
    assert scores.statistics.tolist() == [[1, 1, 1]] * 3


def test_score_all_leaves_an_item_out_when_none_of_its_references_can_be_scored() -> None:
    scorer = scorers([Choices(choices=("yes", "no"))])[0]
    scores = score_all(scorer, ["no", "no", "no"], [pair("a", "maybe"), pair("a", "perhaps"), pair("b", "no")])
    assert sorted(scores.unscored) == [0, 1]


def test_custom_metric_is_called_for_each_reference(tmp_path: Path) -> None:
    (tmp_path / "scoring.py").write_text("def alike(answer, reference, example):\n    return len(reference) / 100\n")
    scores = score_all(scorer_of(Python(python="scoring:alike"), tmp_path), ANSWERS, ITEMS)
    longest = len(ITEMS[0].output) / 100
    assert scores.values.tolist() == [longest, len(ITEMS[1].output) / 100, longest]


def test_count_references_counts_distinct_inputs() -> None:
    assert count_references(ITEMS) == References(items=3, inputs=2, several=1, references=3)
    assert count_references(ITEMS[:2]) is None
    repeated = [pair(f"input {n % 5}", f"output {n}") for n in range(30)]
    found = count_references(repeated)
    assert found is not None
    assert found.text == "5 distinct inputs with 6.0 references each"
