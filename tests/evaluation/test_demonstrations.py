"""Demonstrations: which training pairs are shown, and in which order."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.versions import version_of
from tunewright.config import RetrieverName
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.evaluation.arms import ArmPlan
from tunewright.evaluation.demonstrations import Demonstrations, TfIdf, Vectors, with_demonstrations
from tunewright.evaluation.folds import fold_versions

RETRIEVERS: tuple[RetrieverName, ...] = ("bm25", "tfidf", "dense")


def letters(_retriever: RetrieverName, texts: Sequence[str]) -> Vectors:
    """Vectors of letter pairs, the beginnings of words among them."""
    rows = np.zeros((len(texts), 997), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for pair in pairwise(f" {' '.join(text.lower().split())} "):
            row[int.from_bytes("".join(pair).encode()) % 997] += 1
    return rows


def of(train: list[Member], seed: int = 0) -> Demonstrations:
    return Demonstrations(train, seed, letters)


def member(text: str, answer: str = "x", cluster: str | None = None) -> Member:
    messages = (Message("system", "Cite."), Message("user", text), Message("assistant", answer))
    return Member(Example(messages), f"key {text}", "train", cluster or text)


COURTS = [member("Dayton Municipal Court, Ohio"), member("Toledo Municipal Court, Ohio"), member("D. Guam, Guam")]


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_retrieval_ranks_the_most_similar_example_first(retriever: RetrieverName) -> None:
    found = of(COURTS).nearest(retriever, member("Municipal Court of Toledo"), 2)
    assert [m.example.input_text for m in found] == ["Toledo Municipal Court, Ohio", "Dayton Municipal Court, Ohio"]


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_retrieval_counts_single_letters(retriever: RetrieverName) -> None:
    districts = [member("District N.D. of Ohio"), member("District S.D. of Ohio")]
    for query in ("District S.D. of Iowa", "District N.D. of Iowa"):
        (found,) = of(districts).nearest(retriever, member(query), 1)
        assert found.example.input_text[9:13] == query[9:13]


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_retrieval_excludes_the_querys_cluster(retriever: RetrieverName) -> None:
    train = [member("Ohio court one", cluster="family"), member("Guam", cluster="other")]
    found = of(train).nearest(retriever, member("Ohio court two", cluster="family"), 2)
    assert [m.cluster for m in found] == ["other"]


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_retrieval_returns_examples_for_unknown_words(retriever: RetrieverName) -> None:
    assert len(of(COURTS).nearest(retriever, member("¿?"), 2)) == 2


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_nearest_returns_distinct_inputs_when_an_input_has_several_references(retriever: RetrieverName) -> None:
    repeated = Member(member("toledo  municipal court, Ohio", "other").example, "key 0", "train", "Toledo")
    train = [repeated, *COURTS]
    found = of(train).nearest(retriever, member("Municipal Court of Toledo"), 3)
    assert [m.example.input_text for m in found] == [
        "toledo  municipal court, Ohio",
        "Dayton Municipal Court, Ohio",
        "D. Guam, Guam",
    ]


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=8, unique=True),
    st.text(max_size=12),
    st.sampled_from(RETRIEVERS),
)
def test_retrieval_is_deterministic_and_never_fails(texts: list[str], query: str, retriever: RetrieverName) -> None:
    if not any(character.isalnum() for text in texts for character in text):
        return
    members = [member(text or "empty") for text in texts]
    first = of(members).nearest(retriever, member(query, cluster="query"), 3)
    assert first == of(members).nearest(retriever, member(query, cluster="query"), 3)
    assert len(first) == min(3, len(members))


def test_tfidf_is_the_cosine_of_weighted_character_ngrams() -> None:
    texts = ["Dayton Court", "Court of Ohio", "D. Guam"]
    query = "Ohio Court"

    def grams(text: str) -> Counter[str]:
        words = [f" {word} " for word in re.split(r"\s+", text.lower())]
        # As scikit-learn's char_wb has it: a word shorter than n counts once, whole.
        found = Counter[str]()
        for word in words:
            for n in range(2, 6):
                for i in range(max(len(word) - n, 0) + 1):
                    found[word[i : i + n]] += 1
                if n >= len(word):
                    break
        return found

    every = [grams(text) for text in texts]
    seen = Counter(gram for counts in every for gram in counts)

    def vector(counts: Counter[str]) -> dict[str, float]:
        weighted = {
            gram: (1 + math.log(count)) * (math.log((1 + len(texts)) / (1 + seen[gram])) + 1)
            for gram, count in counts.items()
            if gram in seen
        }
        length = math.sqrt(sum(value**2 for value in weighted.values()))
        return {gram: value / length for gram, value in weighted.items()}

    ours = vector(grams(query))
    expected = [sum(value * vector(counts).get(gram, 0.0) for gram, value in ours.items()) for counts in every]
    assert TfIdf(texts).similarities(query) == pytest.approx(expected)


# Diversity and order


def test_mmr_selects_as_a_brute_force_loop_over_cosines() -> None:
    train = [member(f"{word} court of {place}") for word in ("upper", "lower", "north") for place in ("Ohio", "Guam")]
    query = member("upper court of Iowa", cluster="query")
    tfidf = TfIdf([m.example.input_text for m in train])
    relevance = tfidf.similarities(query.example.input_text)
    between = [tfidf.similarities(m.example.input_text) for m in train]
    for weight in (0.3, 0.7, 1.0):
        chosen: list[int] = []
        while len(chosen) < 4:
            left = [n for n in range(len(train)) if n not in chosen]
            chosen.append(
                max(
                    left,
                    key=lambda n: (
                        weight * relevance[n] - (1 - weight) * max((between[m][n] for m in chosen), default=0.0)
                    ),
                )
            )
        demonstrations = of(train)
        assert demonstrations.diverse("tfidf", query, 2, weight) == [train[n] for n in chosen[:2]]
        assert demonstrations.diverse("tfidf", query, 4, weight) == [train[n] for n in chosen]


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_mmr_shows_another_kind_where_similarity_repeats_one(retriever: RetrieverName) -> None:
    train = [member("Municipal Court of Toledo I"), member("Municipal Court of Toledo II"), member("Toledo zoo")]
    query = member("Municipal Court of Toledo III", cluster="query")
    plain = of(train).shown(ArmPlan("retrieved", 2, retriever=retriever), query)
    assert {m.example.input_text for m in plain} == {m.example.input_text for m in train[:2]}
    diverse = of(train).shown(ArmPlan("retrieved", 2, retriever=retriever, mmr=0.2), query)
    assert "Toledo zoo" in {m.example.input_text for m in diverse}
    assert diverse[-1] == plain[-1]


def test_similar_first_is_the_reverse_order() -> None:
    plan = ArmPlan("retrieved", 3, retriever="bm25")
    query = member("Municipal Court of Toledo")
    last, first = (of(COURTS).shown(p, query) for p in (plan, replace(plan, order="similar_first")))
    assert first == last[::-1]
    assert first[0].example.input_text == "Toledo Municipal Court, Ohio"


def test_mmr_never_shows_the_querys_cluster() -> None:
    train = [member("Ohio court one", cluster="family"), member("Guam", cluster="a"), member("Ohio", cluster="b")]
    shown = of(train).shown(ArmPlan("retrieved", 3, retriever="bm25", mmr=0.5), member("Ohio court", cluster="family"))
    assert {m.cluster for m in shown} == {"a", "b"}


# Static draws


def test_fewer_static_demonstrations_are_the_beginning_of_more() -> None:
    train = [member(f"court {n}") for n in range(30)]
    demonstrations = Demonstrations(train, 0)
    query = member("question")
    for seed in (1, 2, 3):
        longest = demonstrations.shown(ArmPlan("static", 16, seed=seed), query)
        assert len({m.key for m in longest}) == 16
        for shots in (1, 4, 8):
            assert demonstrations.shown(ArmPlan("static", shots, seed=seed), query) == longest[:shots]
    assert demonstrations.drawn(1) == Demonstrations(train, 0).drawn(1)
    assert demonstrations.drawn(1) != demonstrations.drawn(2)
    assert demonstrations.drawn(1) != Demonstrations(train, 1).drawn(1)


def test_static_draw_covers_clusters_and_classes_before_repeating() -> None:
    train = [member(f"row {n}", "abc"[min(n // 20, 2)], cluster=str(n // 2)) for n in range(60)]
    for seed in range(1, 6):
        drawn = Demonstrations(train, 0).drawn(seed)
        assert len(drawn) == len({m.cluster for m in drawn}) == 30
        for start in range(0, 30, 3):
            assert {m.example.output for m in drawn[start : start + 3]} == set("abc")


def test_static_draw_is_uniform() -> None:
    train = [member(f"row {n}") for n in range(5)]
    first = Counter(Demonstrations(train, 0).drawn(seed)[0].key for seed in range(1, 1001))
    assert min(first.values()) > 150  # 200 expected each; 150 is four standard deviations away


def test_static_demonstrations_leave_the_querys_cluster_out() -> None:
    """As data.on_overlap: keep allows, a training row shares the question's cluster."""
    train, query = [member(f"row {n}") for n in range(5)], member("row 1 again", cluster="row 1")
    plan, demonstrations = ArmPlan("static", 3, seed=1), Demonstrations(train, 0)
    drawn = demonstrations.drawn(1)
    assert demonstrations.shown(plan, query) == [m for m in drawn if m.cluster != "row 1"][:3]
    assert demonstrations.shown(plan, member("another")) == drawn[:3]


def test_folds_never_show_a_demonstration_of_the_questions_cluster() -> None:
    for version in fold_versions(version_of([3, 1, 2, 5, 1, 1, 4, 2, 2, 1, 1, 3]), 3, seed=0):
        demonstrations = Demonstrations(version.domain_of("train"), 0)
        for query in (*version.examples("dev"), *version.examples("test")):
            for plan in (ArmPlan("static", 3, seed=1), ArmPlan("retrieved", 3, retriever="bm25")):
                shown = demonstrations.shown(plan, query)
                assert len(shown) == 3
                assert query.cluster not in {m.cluster for m in shown}
                assert all(m.split == "train" for m in shown)


# The prompt


def test_demonstrations_are_turns_before_the_question_and_the_most_similar_one_is_nearest() -> None:
    question = member("Municipal Court of Toledo")
    shown = Demonstrations(COURTS, 0).shown(ArmPlan("retrieved", 2, retriever="bm25"), question)
    prompt = with_demonstrations(question, shown)
    assert [m.content for m in prompt] == [
        "Cite.",
        "Dayton Municipal Court, Ohio",
        "x",
        "Toledo Municipal Court, Ohio",
        "x",
        "Municipal Court of Toledo",
    ]
    assert [m.role for m in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
