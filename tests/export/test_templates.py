"""The chat template of an exported model, rendered by transformers alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from export_helpers import CHATS

from making.makers import llama2_tokenizer, llama3_tokenizer, mistral_tokenizer
from making.tiny_bases import byte_tokenizer, chat_of
from making.tool_families import FAMILIES, family
from tunewright.chat import ChatFormat
from tunewright.chat.tool_calls import declared_functions
from tunewright.data.examples import Message
from tunewright.export.templates import count_equal_renderings, exported_template
from tunewright.gate.prompts import function_conversations

SYSTEM = "Answer with the court's \"citation\".\n\n\tC:\\new — {{ d'été }} {% no %} 中文 #}"


def _without_bos() -> ChatFormat:
    tokenizer = copy.deepcopy(mistral_tokenizer("v1"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m.role + ']\\n' + m.content + (eos_token if m.role == 'assistant' else '') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
    )
    return chat_of(tokenizer)


FORMATS: dict[str, Callable[[], ChatFormat]] = {
    "ChatML": lambda: chat_of(byte_tokenizer()),
    "plain": lambda: chat_of(byte_tokenizer(), "plain"),
    "Llama 3.1, with its date": lambda: chat_of(llama3_tokenizer("llama3_1")),
    "Llama 2": lambda: chat_of(llama2_tokenizer()),
    "Mistral v1": lambda: chat_of(mistral_tokenizer("v1")),
    "Mistral v7-tekken": lambda: chat_of(mistral_tokenizer("v7-tekken")),
    "no beginning of text, which the tokenizer writes": _without_bos,
}


@pytest.mark.parametrize("name", FORMATS)
def test_exported_template_renders_as_training_on_any_day_and_adds_the_system_prompt(name: str) -> None:
    chat = FORMATS[name]()
    plain_ids = [chat.prompt(messages) for messages in CHATS]
    with_system = [(Message("system", SYSTEM), *messages) for messages in CHATS]
    ids = [chat.prompt(messages) for messages in with_system]
    others = [(Message("system", "Be brief."), *messages) for messages in CHATS]
    other_ids = [chat.prompt(messages) for messages in others]
    tokenizer = chat.tokenizer
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = exported_template(chat)
        assert ("26 Jul 2024" in tokenizer.chat_template) == ("date" in name)
        assert count_equal_renderings(tokenizer, chat.template, CHATS, plain_ids) == len(CHATS)
        assert count_equal_renderings(tokenizer, chat.template, CHATS, ids) == 0
        tokenizer.chat_template = exported_template(chat, SYSTEM)
        assert count_equal_renderings(tokenizer, chat.template, CHATS, ids) == len(CHATS)
        assert count_equal_renderings(tokenizer, chat.template, with_system, ids, SYSTEM) == len(CHATS)
        assert count_equal_renderings(tokenizer, chat.template, others, other_ids, SYSTEM) == len(CHATS)
        # What only the one with the system message renders to does not count.
        tokenizer.chat_template = exported_template(chat)
        assert count_equal_renderings(tokenizer, chat.template, with_system, ids, SYSTEM) == 0
    finally:
        tokenizer.chat_template = own  # the makers' tokenizers are shared


def _shown(messages: Sequence[Message]) -> dict[str, Any]:
    """A conversation as transformers documents it: arguments as objects, results with their function's name."""
    turns = []
    names: dict[str, str] = {}
    for message in messages[1:]:
        turn = message.as_dict()
        for call in turn.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if message.role == "tool":
            turn["name"] = names[turn["tool_call_id"]]
        turns.append(turn)
    functions = declared_functions(messages)
    return {"conversation": turns, "tools": [{"type": "function", "function": function} for function in functions]}


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("name", FAMILIES)
def test_exported_template_renders_functions_as_training(name: str, system: str | None) -> None:
    chat = family(name)
    conversations = function_conversations(chat, system)
    kinds = {tuple(m.role for m in messages if m.role != "system") for messages in conversations}
    assert ("tools", "user", "assistant", "tool") in kinds
    # Mistral v2's template has parallel calls, but no several results for them.
    several = chat.tool_form.parallel and name != "mistral-v2"
    assert any(len(m.calls) == 2 for messages in conversations for m in messages) == several
    ids = [chat.prompt(messages) for messages in conversations]
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = exported_template(chat, system)
    assert count_equal_renderings(tokenizer, chat.template, conversations, ids, system) == len(conversations)
    for messages, wanted in zip(conversations, ids, strict=True):
        shown = tokenizer.apply_chat_template(**_shown(messages), add_generation_prompt=True, return_dict=False)
        assert tuple(shown) == wanted


def test_count_equal_renderings_finds_a_template_without_functions() -> None:
    chat = family("hermes-chatml")
    conversations = function_conversations(chat, None)
    ids = [chat.prompt(messages) for messages in conversations]
    assert count_equal_renderings(byte_tokenizer(), chat.template, conversations, ids) == 0
