"""Instructions: what is found to be one, and other wordings in its place."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.evaluation.arms import find_instruction


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
