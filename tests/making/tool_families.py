"""Chat formats with each form of calls on a tokenizer of bytes, and conversations with functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from hypothesis import strategies as st

from making import makers
from making.tiny_bases import byte_tokenizer
from tunewright.chat import ChatFormat, chat_format
from tunewright.chat.templates import TemplateKind, ToolsKind
from tunewright.config import ChatConfig
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id

LLAMA3 = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|python_tag|>",
)
LLAMA4 = ("<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|python_start|>", "<|python_end|>")
MISTRAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]"),
    *(
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[TOOL_CONTENT]",
        "[TOOL_CALLS]",
        "[CALL_ID]",
        "[ARGS]",
    ),
)


def tokenizer_of(template: str, special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes with a template; the first two special tokens begin texts and end answers."""
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.bos_token, tokenizer.eos_token = special[:2]
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    tokenizer.chat_template = template
    return tokenizer


def format_of(tokenizer: Any, kind: TemplateKind = "own", tools: ToolsKind = "own") -> ChatFormat:
    stops = frozenset([tokenizer.eos_token_id])
    return chat_format(tokenizer, stop_ids=stops, kind=kind, today=ChatConfig().date, tools=tools)


def mistral_template(version: str, *, sentencepiece: bool) -> str:
    """The template that mistral-common writes."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return generate_chat_template(
        spm=sentencepiece,
        tokenizer_version=TokenizerVersion(version),
        image_support=False,
        audio_support=False,
        thinking_support=False,
        default_system_prompt=None,
        plain_thinking_support=False,
        use_special_token_variables=True,
        model_settings_fields=None,
        reasoning_effort_values=None,
        reasoning_effort_default=None,
    )


def _mistral(version: str, *, sentencepiece: bool = False) -> ChatFormat:
    return format_of(tokenizer_of(mistral_template(version, sentencepiece=sentencepiece), MISTRAL))


def _llama3(family: str, tools: ToolsKind = "own") -> ChatFormat:
    return format_of(tokenizer_of(makers.trl_template(family), LLAMA3), tools=tools)


FAMILIES: dict[str, Callable[[], ChatFormat]] = {
    "llama3_1": partial(_llama3, "llama3_1"),
    "llama3_2": partial(_llama3, "llama3_2"),
    "llama4": lambda: format_of(tokenizer_of((makers.TEMPLATES / "llama4.jinja").read_text(encoding="utf-8"), LLAMA4)),
    "mistral-v2": partial(_mistral, "v2", sentencepiece=True),
    "mistral-v3": partial(_mistral, "v3", sentencepiece=True),
    "mistral-v3-tekken": partial(_mistral, "v3"),
    "mistral-v7": partial(_mistral, "v7", sentencepiece=True),
    "mistral-v7-tekken": partial(_mistral, "v7"),
    "mistral-v11": partial(_mistral, "v11"),
    "mistral-v13": partial(_mistral, "v13"),
    "qwen2_5": lambda: format_of(tokenizer_of(makers.trl_template("qwen2_5"), added=("<tool_call>", "</tool_call>"))),
    "hermes-chatml": lambda: format_of(byte_tokenizer(), tools="hermes"),
    "hermes-plain": lambda: format_of(byte_tokenizer(), "plain", tools="hermes"),
    "hermes-llama3_1": partial(_llama3, "llama3_1", tools="hermes"),
    "hermes-mistral-v7": lambda: format_of(
        tokenizer_of(mistral_template("v7", sentencepiece=False), MISTRAL), tools="hermes"
    ),
}


@cache
def family(name: str) -> ChatFormat:
    return FAMILIES[name]()


LOOK_ALIKES = [
    *LLAMA3,
    *LLAMA4,
    *MISTRAL,
    "<|im_end|>",
    '<|im_start|>system\n"',
    "<tool_call>",
    "</tool_call>",
    "</tool_response>",
    '{"name": "f", "parameters": {}}',
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    '[TOOL_CALLS][{"name": "f", "arguments": {}}]',
    'brave_search.call(query="x")',
    "\\udb80\\udc00",
    "\U000f0000",
]
SCRIPTS = ["Ünïcödé", "e\u0301", "שלום", "東京1400万", "👩‍👩‍👧", "\u2028", "\x1c", "don't", 'a "b"', "\\", "\n\n", "\t"]
texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(LOOK_ALIKES)
    | st.sampled_from(SCRIPTS),
    max_size=4,
).map("".join)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
arguments = st.dictionaries(texts, values, max_size=4).map(canonical_json)
names = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_-]{0,20}", fullmatch=True).filter(
    lambda name: name not in ("brave_search",)
)
descriptions = texts.filter(bool)

TYPES = [{"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "array", "items": {"type": "number"}}]


@st.composite
def functions(draw: st.DrawFn) -> list[dict[str, Any]]:
    """1 to 3 declarations in OpenAI's form."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": draw(descriptions),
                "parameters": {
                    "type": "object",
                    "properties": draw(st.dictionaries(texts, st.sampled_from(TYPES), max_size=3)),
                    "required": [],
                },
            },
        }
        for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))
    ]


@st.composite
def conversations(draw: st.DrawFn, *, parallel: bool = True, results: st.SearchStrategy[str] = texts) -> list[Message]:
    """Rounds of a question, calls with results, and an answer; the last turn is the assistant's or asks for one."""
    declared = draw(functions())
    called = st.sampled_from([tool["function"]["name"] for tool in declared])
    spoken = texts.filter(lambda text: text.strip() and not text.startswith(" ") and not text.endswith(" "))
    turns = [Message("tools", canonical_json(declared))]
    if draw(st.booleans()):
        turns.append(Message("system", draw(spoken)))
    made = 0
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(spoken)))
        for _ in range(draw(st.integers(0, 2))):
            count = draw(st.integers(1, 3 if parallel else 1))
            calls = tuple(
                ToolCall(draw(called), draw(arguments), call_id(place)) for place in range(made, made + count)
            )
            turns.append(Message("assistant", "", calls=calls))
            turns += [Message("tool", draw(results.filter(str.strip)), call_id=call.id) for call in calls]
            made += count
        turns.append(Message("assistant", draw(spoken)))
    kept = draw(
        st.sampled_from([place for place, turn in enumerate(turns) if turn.role in ("user", "assistant", "tool")])
    )
    while kept + 1 < len(turns) and turns[kept].role == "tool" == turns[kept + 1].role:
        kept += 1  # all results of a turn
    return turns[: kept + 1]


def openai(messages: list[Message]) -> dict[str, Any]:
    """The conversation as a request in OpenAI's form."""
    first = messages[0]
    tools = json.loads(first.content) if first.role == "tools" else []
    return {"tools": tools, "messages": [m.as_dict() for m in messages if m.role != "tools"]}
