"""Each metric against its definition: sacrebleu, scikit-learn, plain counting, published examples."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer

import tunewright as package
from making import command_line
from making.evidence import pair, scorers
from tunewright.config import Metric
from tunewright.config.metrics import Choices, ExactMatch, Json, Normalisation, Regex
from tunewright.core.errors import UserError
from tunewright.metrics import (
    Scores,
    normalised,
    p_text,
    points_text,
    score_all,
    score_text,
    scorer_of,
)
from tunewright.metrics.texts import macro_f1, same

SENTENCES = st.lists(st.sampled_from(["the", "court", "of", "appeals", "Ala.", "x,y", "", "É"]), max_size=9).map(
    " ".join
)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=20)


def _scores(metric: Metric, answers: Sequence[str], references: Sequence[str]) -> Scores:
    (scorer,) = scorers([metric])
    return score_all(scorer, answers, [pair(f"question {n}", r) for n, r in enumerate(references)])


# Exact match


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("Ala. Ct. App.", "Ala. Ct. App.", True),
        ("\n Ala. Ct. App. \t", "Ala. Ct. App.", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("ala. ct. app.", "Ala. Ct. App.", False),
        ("Ala.  Ct. App.", "Ala. Ct. App.", False),
        ("", " ", True),
    ],
)
def test_exact_match_forgives_outer_white_space_and_unicode_spelling_only(
    answer: str, reference: str, equal: bool
) -> None:
    assert _scores("exact_match", [answer], [reference]).values.tolist() == [equal]


@pytest.mark.parametrize(
    ("option", "answer", "reference"),
    [
        ("ignore_case", "STRASSE", "straße"),
        ("collapse_whitespace", "Ala.\n Ct.", "Ala. Ct."),
        ("ignore_punctuation", "«Ala Ct»!", "Ala. Ct."),
    ],
)
def test_exact_match_options_ignore_only_their_difference(option: str, answer: str, reference: str) -> None:
    for name in Normalisation.model_fields:
        metric = ExactMatch(exact_match=Normalisation(**{name: True}))
        assert _scores(metric, [answer], [reference]).total() == (name == option)


OPTIONS = {name: st.booleans() for name in Normalisation.model_fields}


@given(st.text(max_size=20), st.builds(Normalisation, **OPTIONS))
def test_normalising_twice_changes_nothing(text: str, settings: Normalisation) -> None:
    assert normalised(normalised(text, settings), settings) == normalised(text, settings)


def test_missing_answer_counts_as_wrong() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        _scores("exact_match", ["a"], ["a", "b"])


# BLEU and chrF


@given(PAIRS)
def test_bleu_and_chrf_are_sacrebleus_corpus_scores(pairs: list[tuple[str, str]]) -> None:
    answers, references = [a for a, _ in pairs], [r for _, r in pairs]
    for metric, theirs in (("bleu", BLEU()), ("chrf", CHRF())):
        expected = theirs.corpus_score(answers, [references]).score
        assert _scores(metric, answers, references).total() == pytest.approx(expected / 100, abs=1e-12)  # type: ignore[arg-type]


@given(PAIRS)
def test_item_bleu_and_chrf_equal_sacrebleus_sentence_scores(pairs: list[tuple[str, str]]) -> None:
    for answer, reference in pairs:
        bleu = BLEU(effective_order=True).sentence_score(answer, [reference]).score
        chrf = CHRF().sentence_score(answer, [reference]).score
        assert _scores("bleu", [answer], [reference]).values[0] == pytest.approx(bleu / 100)
        assert _scores("chrf", [answer], [reference]).values[0] == pytest.approx(chrf / 100)


def test_signatures_match_the_scores() -> None:
    for name, theirs in (("bleu", BLEU()), ("chrf", CHRF())):
        theirs.corpus_score(["a b"], [["a b"]])
        (scorer,) = scorers([name])  # type: ignore[list-item]
        assert str(theirs.get_signature()) in scorer.definition


# Token F1


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The Denver Broncos", "Denver Broncos", 1.0),
        ("Denver", "Denver Broncos", 2 / 3),
        ("an apple, a pear", "apple pear plum", 0.8),
        ("plum plum pear", "plum pear pear", 2 / 3),
        ("the", "a", 1.0),
        ("the", "Denver", 0.0),
        ("", "", 1.0),
        ("no-one", "noone", 1.0),
    ],
)
def test_token_f1_equals_squad(answer: str, reference: str, f1: float) -> None:
    assert _scores("token_f1", [answer], [reference]).total() == pytest.approx(f1)


@given(SENTENCES, SENTENCES)
def test_token_f1_is_precision_and_recall_over_a_plain_count(answer: str, reference: str) -> None:
    words = [
        [w for w in "".join(c for c in text.lower() if c not in string.punctuation).split() if w not in {"a", "the"}]
        for text in (answer, reference)
    ]
    left, shared = list(words[1]), 0
    for word in words[0]:
        if word in left:
            left.remove(word)
            shared += 1
    if not words[0] or not words[1]:
        expected = float(words[0] == words[1])
    elif shared == 0:
        expected = 0.0
    else:
        precision, recall = shared / len(words[0]), shared / len(words[1])
        expected = 2 * precision * recall / (precision + recall)
    assert _scores("token_f1", [answer], [reference]).total() == pytest.approx(expected)


# ROUGE-L

ROUGE_TEXTS = st.lists(
    st.sampled_from(["the", "Patient", "no", "fever,", "x-y", "2.5", "mg", "Müller", "\u212a", "\n", "_"]), max_size=40
).map(" ".join)


@given(ROUGE_TEXTS, st.lists(ROUGE_TEXTS, min_size=1, max_size=3))
def test_rouge_l_is_rouge_scores_best_f1_over_the_references(answer: str, references: list[str]) -> None:
    usable = [reference for reference in references if re.search("[a-z0-9]", reference.lower())]
    scores = score_all(scorers(["rouge_l"])[0], [answer] * len(references), [pair("same", r) for r in references])
    if not usable:
        assert len(scores.unscored) == len(references)
        return
    theirs = RougeScorer(["rougeL"], use_stemmer=False).score_multi(usable, answer)["rougeL"].fmeasure
    assert scores.values.tolist() == pytest.approx([theirs] * len(references))


def test_rouge_l_leaves_a_reference_without_its_words_out() -> None:
    scores = _scores("rouge_l", ["Ο ασθενής", "Ο ασθενής"], ["Ο ασθενής", "fever"])
    assert [*scores.unscored] == [0]
    assert "a-z" in scores.unscored[0]
    assert scores.total() == 0


# Choices


def test_answer_outside_the_choices_is_wrong_and_counted() -> None:
    scores = _scores(Choices(choices=("granted", "denied")), ["granted ", "denied", "maybe", "Denied"], ["granted"] * 4)
    assert scores.values.tolist() == [1, 0, 0, 0]
    assert scores.outside == 2


def test_reference_outside_the_choices_is_unscored() -> None:
    scores = _scores(Choices(choices=("granted", "denied")), ["granted", "granted"], ["granted", "grnated"])
    assert (scores.total(), scores.reasons) == (1.0, {"the reference is none of the choices": 1})


# JSON


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"a": 1}', True),
        (" [1, 2]\n", True),
        ("null", True),
        ("{'a': 1}", False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a": NaN}', False),
        ('{"a": 1} and more', False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_valid_json_is_what_the_standard_says(answer: str, valid: bool) -> None:
    assert _scores("json_valid", [answer], ["whatever"]).total() == valid


VALUES = st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.sampled_from(["x", "1"]), st.just([1, "y"]))
OBJECTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


@given(st.lists(st.tuples(OBJECTS, OBJECTS.filter(bool)), min_size=1, max_size=8))
def test_field_f1_is_scikit_learns_micro_f1_over_fields_with_their_values(pairs: list[tuple[Any, Any]]) -> None:
    labels = MultiLabelBinarizer()
    sets = [{f"{key}={json.dumps(value)}" for key, value in one.items()} for both in pairs for one in both]
    # A set that nobody has: a table of one column is two classes to scikit-learn, and its F1 is then their accuracy.
    table = labels.fit([*sets, {"more", "columns"}]).transform(sets)
    expected = f1_score(table[1::2], table[::2], average="micro", zero_division=0)
    ours = _scores("json", [json.dumps(a) for a, _ in pairs], [json.dumps(r) for _, r in pairs])
    assert ours.total() == pytest.approx(expected)


LABELS = st.sampled_from(["ok", "bad", " ok", "worse", "I would say ok"])


@given(st.lists(st.tuples(LABELS, st.sampled_from(["ok", "bad", "worse"])), min_size=1, max_size=30))
def test_macro_f1_is_scikit_learns_over_the_references_classes(pairs: list[tuple[str, str]]) -> None:
    answers, references = ([text.strip() for text in texts] for texts in zip(*pairs, strict=True))
    scorer = macro_f1("macro_f1", {"ok", "bad", "worse", "never"})
    scores = score_all(scorer, [a for a, _ in pairs], [pair(f"q {n}", r) for n, r in enumerate(references)])
    expected = f1_score(references, answers, labels=sorted(set(references)), average="macro", zero_division=0)
    assert scores.total() == pytest.approx(expected)
    assert scores.values.tolist() == [a == r for a, r in zip(answers, references, strict=True)]


def test_macro_f1_takes_its_classes_from_the_dataset_and_refuses_free_text(tmp_path: Path) -> None:
    (tmp_path / "tunewright.yaml").write_text("name: small\n")
    rows = [{**row, "completion": "ok" if n % 3 else "bad"} for n, row in enumerate(command_line.pairs(30))]
    package.open(tmp_path).data.add([command_line.write_jsonl(tmp_path / "pairs.jsonl", rows)])
    scorer = scorer_of("macro_f1", tmp_path)
    assert scorer.kind == "corpus"
    assert score_all(scorer, ["ok", "ok"], [pair("a", "ok"), pair("b", "bad")]).total() == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="201") as error:
        macro_f1("macro_f1", {f"answer {n}" for n in range(201)})
    assert error.value.where == "evaluate.metric"


def test_json_metric_compares_only_declared_fields() -> None:
    metric = Json.model_validate({"json": {"fields": ["a"]}})
    assert _scores(metric, ['{"a": 1, "b": 9}'], ['{"a": 1, "b": 2}']).total() == 1


def test_json_metric_scores_zero_for_an_answer_without_object() -> None:
    scores = _scores("json", ["{'a': 1}", "[1]", '{"a": 1}'], ['{"a": 1}'] * 3)
    assert scores.values.tolist() == [0, 0, 1]
    assert scores.total() == pytest.approx(2 * 1 / (1 + 3))
    assert scores.reasons == {}


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("no", "the reference is not JSON"),
        ("[1]", "the reference is not a JSON object"),
        ("{}", "the reference has no field"),
    ],
)
def test_reference_without_fields_is_unscored(reference: str, reason: str) -> None:
    assert _scores("json", ['{"a": 1}'], [reference]).reasons == {reason: 1}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        ([1, [0]], [1, [False]], False),
        ({"a": [1]}, {"a": [1.0]}, True),
        ("1", 1, False),
    ],
)
def test_json_values_are_compared_as_json_has_them(one: Any, other: Any, equal: bool) -> None:
    assert same(one, other) is equal


# Pattern


def test_pattern_must_match_the_whole_answer() -> None:
    scores = _scores(Regex(regex="[A-Z]{2}-[0-9]+"), ["AB-12", " AB-1\n", "xAB-1", "AB-1x", "AB-"], ["AB-1"] * 5)
    assert scores.values.tolist() == [1, 1, 0, 0, 0]


# In words


def test_metric_numbers_are_readable() -> None:
    assert (score_text("exact_match", 0.8604), score_text("bleu", 0.432)) == ("86.0%", "BLEU 43.2")
    assert score_text("json name,date", 0.5) == "field F1 50.0"
    assert score_text("python scoring:citation", 0.71) == "citation 71.0"
    assert score_text("regex a b", 0.71) == "71.0%"
    assert (points_text(0.35), points_text(-0.0234), points_text(-1e-9)) == ("+35.0", "-2.3", "+0.0")
    assert (p_text(1.0), p_text(0.0312), p_text(0.00002), p_text(0)) == (
        "p = 1.000",
        "p = 0.031",
        "p = 2e-05",
        "p < 1e-15",
    )


def test_measuring_and_judging_never_import_torch() -> None:
    modules = ["evidence.statistics", "evidence.scoring", "evidence.verdict", "metrics", "report.page"]
    program = "import sys, json\n" + "".join(f"import tunewright.{m}\n" for m in modules)
    program += "print(json.dumps(sorted({'torch', 'transformers'} & set(sys.modules))))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
