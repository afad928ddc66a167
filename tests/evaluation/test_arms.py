"""Arms: their names and their order, and which of them meet on held-out items; the instruction that they replace."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tunewright.config import EvaluateConfig
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.evaluation.arms import (
    ZERO_SHOT,
    ArmPlan,
    find_instruction,
    other_instructions,
    prompting_arms,
    tuned_optimized,
    tuned_retrieved,
    untried_prompting,
)


def test_arms_are_named_and_the_cheapest_is_first() -> None:
    settings = EvaluateConfig(
        num_fewshot=(8, 1, 8), static_seeds=2, retrievers=("bm25", "tfidf"), instructions=("Do it.",)
    )
    assert [arm.name for arm in prompting_arms(settings)] == [
        "zero-shot",
        "zero-shot-instruction-1",
        "static-1-seed-1",
        "static-1-seed-2",
        "static-8-seed-1",
        "static-8-seed-2",
        "retrieved-1",
        "retrieved-8",
        "retrieved-1-tfidf",
        "retrieved-8-tfidf",
    ]
    assert prompting_arms(settings)[0] == ZERO_SHOT


def test_kinds_of_arms_can_be_switched_off() -> None:
    settings = EvaluateConfig(num_fewshot=(4,), static_seeds=0, retrievers=())
    assert prompting_arms(settings) == [ZERO_SHOT]


def test_untried_prompting_names_where_a_config_tries_less_than_the_default() -> None:
    assert untried_prompting(EvaluateConfig()) == ()
    assert untried_prompting(EvaluateConfig(num_fewshot=(4, 32), retrievers=("tfidf", "bm25", "dense"))) == ()
    fewer = EvaluateConfig(num_fewshot=(1, 8), static_seeds=1, retrievers=("bm25",))
    assert untried_prompting(fewer) == (
        "1 draw of static demonstrations instead of 3 (evaluate.static_seeds)",
        "no demonstrations retrieved by tfidf (evaluate.retrievers)",
        "at most 8 demonstrations instead of 16 (evaluate.num_fewshot)",
    )
    assert untried_prompting(EvaluateConfig(num_fewshot=(1,), static_seeds=0, retrievers=())) == (
        "no static demonstrations (evaluate.static_seeds)",
        "no retrieved demonstrations (evaluate.retrievers)",
    )


def test_retrieved_arms_have_every_diversity_and_order_of_more_than_one_demonstration() -> None:
    settings = EvaluateConfig(
        num_fewshot=(1, 4),
        static_seeds=0,
        retrievers=("bm25", "dense"),
        mmr_lambda=(1.0, 0.7),
        demonstration_order=("similar_last", "similar_first"),
    )
    names = [arm.name for arm in prompting_arms(settings) if arm.kind == "retrieved"]
    assert names == [
        "retrieved-1",
        "retrieved-4",
        "retrieved-4-similar-first",
        "retrieved-4-mmr-0.7",
        "retrieved-4-mmr-0.7-similar-first",
        "retrieved-1-dense",
        "retrieved-4-dense",
        "retrieved-4-dense-similar-first",
        "retrieved-4-dense-mmr-0.7",
        "retrieved-4-dense-mmr-0.7-similar-first",
    ]


def test_optimized_instruction_makes_arms_with_and_without_the_adapter() -> None:
    settings = EvaluateConfig(num_fewshot=(4,), static_seeds=0, retrievers=("bm25",), instructions=("Do it.",))
    names = [arm.name for arm in prompting_arms(settings, "abc")]
    assert names == ["zero-shot", "zero-shot-instruction-1", "zero-shot-optimized", "retrieved-4"]
    shown = other_instructions(ArmPlan("retrieved", 4, retriever="bm25"), settings, "abc")
    assert [arm.name for arm in shown] == ["retrieved-4-instruction-1", "retrieved-4-optimized"]
    tuned = tuned_optimized("abc")
    assert tuned is not None
    assert (tuned.name, tuned.adapted, tuned_optimized(None)) == ("tuned-optimized", True, None)


def test_tuned_arm_keeps_the_retrieved_arms_diversity_and_order_and_its_trained_instruction() -> None:
    plan = ArmPlan("retrieved", 4, retriever="dense", mmr=0.5, order="similar_first", instruction=2, optimized="abc")
    found = tuned_retrieved(plan)
    assert (found.name, found.adapted) == ("tuned+retrieved-4-dense-mmr-0.5-similar-first", True)


# Instructions


def member(text: str, *systems: str) -> Member:
    messages = (*(Message("system", s) for s in systems), Message("user", text), Message("assistant", "yes"))
    return Member(Example(messages), f"key {text}", "train", text)


def contents(messages: tuple[Message, ...]) -> list[str]:
    return [f"{m.role}: {m.content}" for m in messages]


def test_instruction_is_the_shared_system_turn() -> None:
    rows = [member("one", "Cite."), member("two", "Cite.")]
    found = find_instruction(rows)
    assert (found.place, found.text) == ("system", "Cite.")
    assert contents(found.replaced(rows[0].example.prompt, "Name it.")) == ["system: Name it.", "user: one"]


def test_instruction_is_the_shared_beginning_of_user_turns() -> None:
    rows = [member("Translate to French: the cat"), member("Translate to French: the dog, please")]
    found = find_instruction(rows)
    assert (found.place, found.text) == ("beginning", "Translate to French: ")
    conversation = (*rows[1].example.messages, *rows[0].example.prompt)
    assert contents(found.replaced(conversation, "In French:")) == [
        "user: In French: the dog, please",
        "assistant: yes",
        "user: In French: the cat",
    ]


def test_shared_beginning_ends_at_a_line() -> None:
    rows = [member("Cite this court.\n\nQ: A court"), member("Cite this court.\n\nQ: B court")]
    found = find_instruction(rows)
    assert found.text == "Cite this court.\n\n"
    assert found.replaced(rows[0].example.prompt, "Name it:\n")[0].content == "Name it:\n\nQ: A court"


@pytest.mark.parametrize("texts", [("The cat", "The dog"), ("Q: cat", "Q: dog"), ("Cite it: x", "Cite it: "), ("cat",)])
def test_other_instruction_becomes_a_system_turn_without_a_shared_beginning(texts: tuple[str, ...]) -> None:
    rows = [member(text) for text in texts]
    found = find_instruction(rows)
    assert found.place == "none"
    assert contents(found.replaced(rows[0].example.prompt, "Do it.")) == ["system: Do it.", f"user: {texts[0]}"]


@pytest.mark.parametrize(
    "rows",
    [
        [member("one", "You serve ACME."), member("two", "You serve Initech.")],
        [member("one", "Cite."), member("two")],
        [member("one", "Cite.", "Be brief."), member("two", "Cite.", "Be brief.")],
    ],
)
def test_find_instruction_refuses_ambiguous_system_turns(rows: list[Member]) -> None:
    with pytest.raises(UserError) as refused:
        find_instruction(rows)
    assert refused.value.where == "evaluate.instructions"


@given(st.lists(st.text(max_size=30), min_size=2, max_size=5, unique=True), st.booleans())
def test_replacing_the_instruction_with_itself_changes_nothing(texts: list[str], has_system: bool) -> None:
    assume(all(texts))
    rows = [member(text, *(["Cite. "] if has_system else [])) for text in texts]
    found = find_instruction(rows)
    for row in rows:
        if found.place != "none":
            assert found.replaced(row.example.prompt, found.text) == row.example.prompt
