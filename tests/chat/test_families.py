"""A conversation in each family, written out as in the makers' documentation."""

from __future__ import annotations

from typing import Any

import pytest

import makers
from tiny import byte_tokenizer, chat_of
from tunewright.data.examples import Message

CONVERSATION = [
    Message("system", "Cite."),
    Message("user", "Ohio?"),
    Message("assistant", "Oh."),
    Message("user", "Iowa?"),
    Message("assistant", "Ia."),
]

LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{dates}Cite.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOhio?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nOh.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nIowa?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIa.<|eot_id|>"
)
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

EXPECTED = {
    "llama2": "<s> [INST] <<SYS>>\nCite.\n<</SYS>>\n\nOhio? [/INST] Oh. </s><s> [INST] Iowa? [/INST] Ia. </s>",
    "llama3": LLAMA3.format(dates=""),
    # Llama 3.3 too: "the same prompt format as Llama 3.1", says its documentation.
    "llama3_1": LLAMA3.format(dates=DATES),
    "llama3_2": LLAMA3.format(dates=DATES),
    "v1": "<s> [INST] Cite.\n\nOhio? [/INST] Oh.</s> [INST] Iowa? [/INST] Ia.</s>",
    "v2": "<s>[INST] Ohio?[/INST] Oh.</s>[INST] Cite.\n\nIowa?[/INST] Ia.</s>",
    "v3": "<s>[INST] Ohio?[/INST] Oh.</s>[INST] Cite.\n\nIowa?[/INST] Ia.</s>",
    "v7": "<s>[SYSTEM_PROMPT] Cite.[/SYSTEM_PROMPT][INST] Ohio?[/INST] Oh.</s>[INST] Iowa?[/INST] Ia.</s>",
    "tekken": "<s>[INST]Ohio?[/INST]Oh.</s>[INST]Cite.\n\nIowa?[/INST]Ia.</s>",
    "v7-tekken": "<s>[SYSTEM_PROMPT]Cite.[/SYSTEM_PROMPT][INST]Ohio?[/INST]Oh.</s>[INST]Iowa?[/INST]Ia.</s>",
    "v11": "<s>[SYSTEM_PROMPT]Cite.[/SYSTEM_PROMPT][INST]Ohio?[/INST]Oh.</s>[INST]Iowa?[/INST]Ia.</s>",
    "v13": "<s>[SYSTEM_PROMPT]Cite.[/SYSTEM_PROMPT][INST]Ohio?[/INST]Oh.</s>[INST]Iowa?[/INST]Ia.</s>",
    "v15": (
        '<s>[SYSTEM_PROMPT]Cite.[/SYSTEM_PROMPT][MODEL_SETTINGS]{"reasoning_effort": "none"}[/MODEL_SETTINGS]'
        "[INST]Ohio?[/INST]Oh.</s>[INST]Iowa?[/INST]Ia.</s>"
    ),
    "chatml": (
        "<|im_start|>system\nCite.<|im_end|>\n<|im_start|>user\nOhio?<|im_end|>\n<|im_start|>assistant\nOh.<|im_end|>\n"
        "<|im_start|>user\nIowa?<|im_end|>\n<|im_start|>assistant\nIa.<|im_end|>"
    ),
}


def _tokenizer(family: str) -> Any:
    if family == "chatml":
        return byte_tokenizer()
    if family == "llama2":
        return makers.llama2_tokenizer()
    llama3 = next((name for name in makers.LLAMA3_FAMILIES if name == family), None)
    if llama3:
        return makers.llama3_tokenizer(llama3)
    return makers.mistral_tokenizer(next(name for name in makers.MISTRAL_FILES if name == family))


# Building tekken's and Llama 3's large tokenizers takes seconds each; test_parity.py compares them with their makers'.
LARGE = ("tekken", "v7-tekken", "llama3", "llama3_1", "llama3_2")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in EXPECTED]
)
def test_conversation_is_rendered_as_in_its_family(family: str) -> None:
    chat = chat_of(_tokenizer(family))
    row = chat.rows(CONVERSATION)[-1]
    assert chat.tokenizer.decode(row.ids) == EXPECTED[family]
