"""Exact match by its declared normalisation, and BLEU that is sacrebleu's to the last digit."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from tunewright.metrics import (
    bleu_signature,
    bleu_statistics,
    corpus_bleu,
    exact_matches,
    p_text,
    points_text,
    score_text,
)

SENTENCES = st.lists(st.sampled_from(["the", "court", "of", "appeals", "Ala.", "x,y", "", "É"]), max_size=9).map(
    " ".join
)


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
    assert exact_matches([answer], [reference]).tolist() == [equal]


def test_a_missing_answer_is_not_skipped() -> None:
    with pytest.raises(ValueError, match="longer"):
        exact_matches(["a"], ["a", "b"])


@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=20))
def test_summed_statistics_give_sacrebleus_corpus_score(pairs: list[tuple[str, str]]) -> None:
    answers, references = [a for a, _ in pairs], [r for _, r in pairs]
    expected = BLEU().corpus_score(answers, [references]).score
    assert corpus_bleu(bleu_statistics(answers, references).sum(axis=0)) == pytest.approx(expected / 100, abs=1e-12)


def test_bleu_of_nothing_right_is_zero_and_of_all_right_is_one() -> None:
    reference = ["one two three four five"]
    assert corpus_bleu(bleu_statistics(["six"], reference).sum(axis=0)) == 0
    assert corpus_bleu(bleu_statistics([""], reference).sum(axis=0)) == 0
    assert corpus_bleu(bleu_statistics(reference, reference).sum(axis=0)) == 1


def test_the_signature_is_the_one_of_the_score() -> None:
    bleu = BLEU()
    bleu.corpus_score(["a b"], [["a b"]])
    assert bleu_signature() == str(bleu.get_signature())
    assert "tok:13a|smooth:exp" in bleu_signature()


def test_numbers_read_as_people_say_them() -> None:
    assert (score_text("exact_match", 0.8604), score_text("bleu", 0.432)) == ("86.0%", "BLEU 43.2")
    assert (points_text(0.35), points_text(-0.0234), points_text(-1e-9)) == ("+35.0", "-2.3", "+0.0")
    assert (p_text(1.0), p_text(0.0312), p_text(0.00002), p_text(0)) == (
        "p = 1.000",
        "p = 0.031",
        "p = 2e-05",
        "p < 1e-15",
    )


def test_measuring_and_judging_never_import_torch() -> None:
    modules = ["evaluation.statistics", "evaluation.verdict", "report.html"]
    program = "import sys, json\n" + "".join(f"import tunewright.{m}\n" for m in modules)
    program += "print(json.dumps(sorted({'torch', 'transformers'} & set(sys.modules))))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
