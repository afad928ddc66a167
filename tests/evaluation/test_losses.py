"""Losses of answers: equal to transformers' own, row by row, whatever rows share a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.chat import ChatFormat, Tokens
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Example, Message, Role, ToolCall, call_id
from tunewright.data.versions import Member
from tunewright.evaluation.losses import _without_input, answer_losses, answer_rows
from tunewright.models.shrunk import random_model, shrunk


class Listener(LogReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return chat_of(byte_tokenizer())


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny base with an adapter that is not nought."""
    from making.tiny_bases import build_base

    folder = build_base(tmp_path_factory.mktemp("base") / request.param, request.param)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base, config).eval()


def _member(*texts: str, last_weight: Any = 1) -> Member:
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = [Message(roles[i % 2], text) for i, text in enumerate(texts)]
    turns[-1] = Message("assistant", texts[-1], last_weight)
    example = Example(tuple(turns))
    return Member(example, example.pair_key, "train", example.pair_key)


MEMBERS = [
    _member("a", "b"),
    _member("a much longer question, " * 9, "and a long answer, " * 5),
    _member("one", "two", "three", "the last of two answers"),
    *(_member(f"question {n} " * n, f"answer {n}") for n in range(1, 12)),
]


def test_losses_equal_transformers_loss_of_the_last_answer(model: Any, chat: ChatFormat) -> None:
    rows = answer_rows(chat, MEMBERS, 2048, LogReporter())
    found = {name: loss for part in answer_losses(model, rows, 0) for name, loss in part.items()}
    assert set(found) == {m.key for m in MEMBERS}
    for member in MEMBERS:
        whole = chat.encode(member.example.messages).ids
        prompt = chat.prompt(member.example.prompt)
        assert whole[: len(prompt)] == prompt
        labels = [-100] * len(prompt) + list(whole[len(prompt) :])
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss
        assert found[member.key] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [(GraniteConfig(logits_scaling=8.0), "GraniteForCausalLM"), (Gemma2Config(), "Gemma2ForCausalLM")],
)
def test_losses_equal_those_of_a_base_that_scales_or_caps_its_logits(config: Any, architecture: str) -> None:
    model = random_model(shrunk(config), architecture)
    rows = {"one": Tokens(tuple(range(3, 60)), (False,) * 40 + (True,) * 17)}
    ((found,),) = [part.values() for part in answer_losses(model, rows, 0)]
    model.set_attn_implementation("eager")
    labels = [-100] * 40 + list(range(43, 60))
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([rows["one"].ids]), labels=torch.tensor([labels])).loss
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_rows_that_cannot_be_judged_are_named_and_have_no_loss(chat: ChatFormat) -> None:
    listener = Listener()
    members = [_member("fine", "yes"), _member("shown only", "no", last_weight=0), _member("long " * 50, "no")]
    members.append(_member("first", "asked", "then " * 50, "no"))
    assert set(answer_rows(chat, members, 100, listener)) == {members[0].key}
    (reported,) = listener.warned
    assert reported.startswith("3 rows cannot be judged by their loss")
    for part in ("weight 0", "'shown only'", "over the base's context of 100"):
        assert part in reported


def test_answer_without_input_keeps_its_declarations() -> None:
    turns = [Message("tools", "[]"), Message("system", "Be brief."), Message("user", "Time?")]
    for number in range(2):
        turns.append(Message("assistant", "", calls=(ToolCall("now", "{}", call_id(number)),)))
        turns.append(Message("tool", "12:00", call_id=call_id(number)))
    cut = _without_input(Member(Example(tuple(turns[:-1])), "k", "train", "k"))
    assert [turn.role for turn in cut.example.messages] == ["tools", "system", "user", "assistant"]
    assert cut.example.messages[-1].calls[0].id == call_id(0)
