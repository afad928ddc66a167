"""Prompting arms: which demonstrations are shown, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.evaluation.arms import ZERO_SHOT, Retriever, prompting_arms, with_demonstrations


def member(text: str, answer: str = "x", cluster: str | None = None) -> Member:
    messages = (Message("system", "Cite."), Message("user", text), Message("assistant", answer))
    return Member(Example(messages), f"key {text}", "train", cluster or text)


COURTS = [member("Dayton Municipal Court, Ohio"), member("Toledo Municipal Court, Ohio"), member("D. Guam, Guam")]


def test_the_most_similar_example_comes_first() -> None:
    found = Retriever(COURTS).nearest(member("Municipal Court of Toledo"), 2)
    assert [m.example.input_text for m in found] == ["Toledo Municipal Court, Ohio", "Dayton Municipal Court, Ohio"]


def test_single_letters_count() -> None:
    districts = [member("District N.D. of Ohio"), member("District S.D. of Ohio")]
    for query in ("District S.D. of Iowa", "District N.D. of Iowa"):
        (found,) = Retriever(districts).nearest(member(query), 1)
        assert found.example.input_text[9:13] == query[9:13]


def test_no_example_of_the_querys_own_cluster_is_shown() -> None:
    retriever = Retriever([member("Ohio court one", cluster="family"), member("Guam", cluster="other")])
    assert [m.cluster for m in retriever.nearest(member("Ohio court two", cluster="family"), 2)] == ["other"]


def test_a_query_of_unknown_words_still_gets_examples() -> None:
    assert len(Retriever(COURTS).nearest(member("¿?"), 2)) == 2


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=8, unique=True),
    st.text(max_size=12),
)
def test_retrieval_is_deterministic_and_never_fails(texts: list[str], query: str) -> None:
    if not any(character.isalnum() for text in texts for character in text):
        return
    members = [member(text or "empty") for text in texts]
    first = Retriever(members).nearest(member(query, cluster="query"), 3)
    assert first == Retriever(members).nearest(member(query, cluster="query"), 3)
    assert len(first) == min(3, len(members))


def test_the_most_similar_demonstration_stands_nearest_to_the_question() -> None:
    prompt = with_demonstrations(member("question"), [member("near", "1"), member("far", "2")])
    assert [m.content for m in prompt] == ["Cite.", "far", "2", "near", "1", "question"]
    assert [m.role for m in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_arms_are_named_and_the_cheapest_is_first() -> None:
    assert [a.name for a in prompting_arms((8, 1, 8))] == ["zero-shot", "retrieved-1", "retrieved-8"]
    assert prompting_arms((1,))[0] == ZERO_SHOT
