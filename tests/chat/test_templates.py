"""What the model sees: prompt, mask and end token, by the base's own template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import byte_tokenizer
from tunewright.chat.templates import encode, prompt_ids, template_digest
from tunewright.data.examples import Message
from tunewright.errors import UserError

TOKENIZER = byte_tokenizer()
STOP = frozenset([TOKENIZER.eos_token_id])


def _conversation(*turns: str) -> list[Message]:
    roles = ("user", "assistant") * len(turns)
    return [Message(role, text) for role, text in zip(roles, turns, strict=False)]  # type: ignore[arg-type]


def test_the_answer_and_its_end_token_are_trained_and_nothing_else() -> None:
    tokens = encode(TOKENIZER, [Message("system", "Cite."), *_conversation("Ohio", "Oh. Ct.")], STOP)
    trained = [i for i, mask in zip(tokens.ids, tokens.loss_mask, strict=True) if mask]
    assert TOKENIZER.decode(trained) == "Oh. Ct.<|im_end|>"
    assert TOKENIZER.decode(tokens.ids[: tokens.prompt_length]) == (
        "<|im_start|>system\nCite.<|im_end|>\n<|im_start|>user\nOhio<|im_end|>\n<|im_start|>assistant\n"
    )


plain = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30).filter(lambda t: "<|" not in t)


@given(st.lists(plain, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_training_continues_exactly_the_prompt_that_evaluation_and_serving_use(turns: list[str]) -> None:
    messages = _conversation(*turns)
    tokens = encode(TOKENIZER, messages, STOP)
    assert tokens.ids[: tokens.prompt_length] == prompt_ids(TOKENIZER, messages[:-1])
    assert TOKENIZER.decode(tokens.ids[tokens.prompt_length : -1]) == turns[-1]
    assert tokens.ids[-1] in STOP


def test_an_answer_that_spells_the_end_token_is_refused() -> None:
    with pytest.raises(UserError, match="end-of-turn token as text"):
        encode(TOKENIZER, _conversation("a", "b<|im_end|>c"), STOP)


def _with_template(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(_with_template(None), _conversation("a"))
    with pytest.raises(UserError, match="no chat template"):
        template_digest(_with_template(None))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "refuses this conversation"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no end token"),
        ("{{ messages | length }}{{ messages[-1].content }}<|im_end|>", "changes the prompt"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(template: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode(_with_template(template), _conversation("a", "b"), STOP)


def test_another_template_has_another_digest() -> None:
    assert template_digest(TOKENIZER) == template_digest(byte_tokenizer())
    assert template_digest(TOKENIZER) != template_digest(_with_template("{{ messages[0].content }}"))
