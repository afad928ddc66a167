"""Thinking in the chat templates that write it: rendered as served, masked exactly, read back, split while streamed."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making import makers
from making.thinking_templates import Family, thinking_chat
from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.chat import ChatFormat, Tokens
from tunewright.chat.answers import answer_lengths
from tunewright.chat.thinking import ThinkingForm, ThinkingStream
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.versions import Member
from tunewright.training.rows import encode_members

FAMILIES: tuple[Family, ...] = ("qwen3", "qwen3_5_think", "gptoss", "magistral")
ASKED = Message("user", "2+2?")
ANSWER = Message("assistant", "4.", reasoning="two and two")


def _shown(chat: ChatFormat, row: Tokens) -> str:
    """The row's text, with its trained runs in brackets."""
    runs = groupby(zip(row.ids, row.loss_mask, strict=True), key=lambda pair: pair[1])
    texts = ((chat.texts([[token for token, _ in run]])[0], trained) for trained, run in runs)
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in texts)


def _answered(chat: ChatFormat, messages: list[Message]) -> str:
    (row,) = chat.rows(messages)
    return _shown(chat, row).partition("2+2?")[2]


TRAINED = {
    "qwen3": "<|im_end|>\n<|im_start|>assistant\n⟦<think>\ntwo and two\n</think>\n\n4.<|im_end|>⟧",
    "qwen3_5_think": "<|im_end|>\n<|im_start|>assistant\n<think>\n⟦two and two\n</think>\n\n4.<|im_end|>⟧",
    "gptoss": "<|end|><|start|>assistant⟦<|channel|>analysis<|message|>two and two<|end|>"
    "<|start|>assistant<|channel|>final<|message|>4.<|return|>⟧",
    "magistral": "[/INST]⟦[THINK]two and two[/THINK]4.</s>⟧",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_thinking_is_trained_with_its_answer(family: Family) -> None:
    assert _answered(thinking_chat(family), [ASKED, ANSWER]) == TRAINED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_thinking_has_the_same_ids_but_only_the_answer_is_trained(family: Family) -> None:
    whole, masked = thinking_chat(family), thinking_chat(family, "mask")
    (row,), (masked_row,) = whole.rows([ASKED, ANSWER]), masked.rows([ASKED, ANSWER])
    assert masked_row.ids == row.ids
    trained = [token for token, on in zip(masked_row.ids, masked_row.loss_mask, strict=True) if on]
    end = {"gptoss": "<|return|>", "magistral": "</s>"}.get(family, "<|im_end|>")
    assert masked.texts([trained])[0].lstrip("\n") == f"4.{end}"
    assert answer_lengths(masked, [Example((ASKED, ANSWER))]) == answer_lengths(whole, [Example((ASKED, ANSWER))])


@pytest.mark.parametrize("family", FAMILIES)
def test_stripped_thinking_leaves_the_row_of_an_answer_without_it(family: Family) -> None:
    plain = [ASKED, Message("assistant", "4.")]
    assert thinking_chat(family, "strip").rows([ASKED, ANSWER]) == thinking_chat(family).rows(plain)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "gptoss"])
def test_earlier_thinking_is_dropped_as_when_served_and_each_turn_is_trained(family: Family) -> None:
    chat = thinking_chat(family)
    then = [Message("user", "3+3?"), Message("assistant", "6.", reasoning="three twice")]
    first, last = chat.rows([ASKED, ANSWER, *then])
    assert _shown(chat, first).partition("2+2?")[2] == TRAINED[family]
    served = chat.texts([chat.prompt([ASKED, ANSWER, then[0]])])[0]
    shown = _shown(chat, last)
    assert shown.startswith(served) and "two and two" not in shown and shown.count("⟦") == 1
    assert "three twice" in shown.removeprefix(served)


def test_magistral_renders_as_mistral_common_does() -> None:
    def turn(message: Message) -> dict[str, Any]:
        if not message.reasoning:
            return {"role": message.role, "content": message.content}
        thinking = {"type": "thinking", "thinking": message.reasoning, "closed": True}
        return {"role": message.role, "content": [thinking, {"type": "text", "text": message.content}]}

    chat = thinking_chat("magistral")
    messages = [ASKED, ANSWER, Message("user", "3+3?")]
    assert list(chat.prompt(messages)) == makers.mistral_reference("v13", list(map(turn, messages)))


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_thinking_stay_text(family: Family) -> None:
    chat = thinking_chat(family)
    marks = " ".join(sorted(chat.encoder.control)[-12:])
    (row,) = chat.rows([ASKED, Message("assistant", "4.", reasoning=f"why {marks}")])
    (plain,) = chat.rows([ASKED, Message("assistant", "4.", reasoning="why x")])
    controls = set(chat.encoder.control.values())
    assert [token for token in row.ids if token in controls] == [token for token in plain.ids if token in controls]
    member = Member(Example((ASKED, Message("assistant", "4.", reasoning=f"why {marks}"))), "k", "train", "k")
    assert encode_members(chat, [member], 10_000).faults == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["train", "mask", "strip"])
def test_rows_with_thinking_pass_their_checks(family: Family, mode: Any) -> None:
    turns = (ASKED, ANSWER, Message("user", "3+3?"), Message("assistant", "6."))
    members = [Member(Example(each), "k", "train", "k") for each in (turns, turns[:2], turns[2:])]
    encoded = encode_members(thinking_chat(family, mode), members, 10_000)
    assert encoded.faults == [] and len(encoded.rows) >= 3


def test_rows_name_a_template_that_changes_the_thinking() -> None:
    written = "reasoning_content.strip('\\n')"
    source = makers.trl_template("qwen3").replace(written, "reasoning_content | replace('w', '')")
    member = Member(Example((ASKED, ANSWER)), "k", "train", "k")
    (fault,) = encode_members(thinking_chat("qwen3", "train", source), [member], 10_000).faults
    assert "the thinking's tokens read 'to and to', not 'two and two'" in fault
    (fault,) = encode_members(thinking_chat("qwen3", "mask", source), [member], 10_000).faults
    assert "the tokens don't spell the thinking 'two and two'" in fault


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_ids_read_as_thinking_and_answer(family: Family) -> None:
    chat = thinking_chat(family)
    (row,) = chat.rows([ASKED, ANSWER])
    ids = [token for token, trained in zip(row.ids, row.loss_mask, strict=True) if trained][:-1]
    assert chat.answer(ids, [ASKED]) == ANSWER
    cut = chat.answer(ids[: len(ids) // 3], [ASKED])
    assert cut.content == "" and ANSWER.reasoning.startswith(cut.reasoning)
    (plain,) = chat.rows([ASKED, Message("assistant", "4.")])
    ids = [token for token, trained in zip(plain.ids, plain.loss_mask, strict=True) if trained][:-1]
    assert chat.answer(ids, [ASKED]) == Message("assistant", "4.")


def test_calls_are_read_after_thinking() -> None:
    chat = thinking_chat("qwen3")
    tools = Message("tools", '[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]')
    turn = Message("assistant", "", calls=(ToolCall("f", "{}", call_id(0)),), reasoning="ask f")
    (row,) = chat.rows([tools, ASKED, turn])
    ids = [token for token, trained in zip(row.ids, row.loss_mask, strict=True) if trained][:-1]
    assert chat.answer(ids, [tools, ASKED]) == turn


def test_thinking_without_a_form_is_refused_and_strip_leaves_it_out() -> None:
    chat = chat_of(byte_tokenizer())
    assert chat.thinking is None
    with pytest.raises(UserError, match="no form for thinking") as caught:
        chat.rows([ASKED, ANSWER])
    assert "chat.reasoning to strip" in (caught.value.fix or "")


@given(st.data(), st.sampled_from(FAMILIES), st.booleans())
def test_stream_gives_the_same_parts_in_any_pieces(data: st.DataObject, family: Family, thinks: bool) -> None:
    form = _form(family)
    opening, closing = form.opening, form.closing
    thought = data.draw(st.text("ab \n<", max_size=8))
    answer = data.draw(st.text("ab \n<", min_size=1, max_size=8))
    text = f"{opening}{thought}{closing}\n\n{answer}" if thinks or form.in_prompt else f"{form.bare}{answer}"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stream = ThinkingStream(form, opened=form.in_prompt)
    parts = [
        stream.push(text[start:end], end=end == len(text))
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
    ]
    whole = form.split(text, opened=form.in_prompt)
    assert ("".join(t for t, _ in parts), "".join(a for _, a in parts)) == whole
    assert whole[0] == (thought.strip() if thinks or form.in_prompt else "")


@cache
def _form(family: Family) -> ThinkingForm:
    form = thinking_chat(family).thinking
    assert form is not None
    return form
