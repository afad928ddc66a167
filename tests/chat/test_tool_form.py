"""Functions, calls and results in each form: what is rendered, trained and read back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from making import makers
from making.property_examples import examples
from making.tiny_bases import CHATML, byte_tokenizer
from making.tool_families import (
    FAMILIES,
    MISTRAL,
    conversations,
    family,
    format_of,
    mistral_template,
    names,
    texts,
    tokenizer_of,
)
from tunewright.chat import ChatFormat, encode
from tunewright.chat.inspection import differences
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id

WEATHER = {
    "name": "weather",
    "description": "Look up the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SEARCH = {
    "name": "brave_search",
    "description": "Search",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
}
QUESTION = Message("user", "Oslo?")
SINGLE = frozenset({"llama3_1", "llama3_2"})
WITHOUT_TEXT = SINGLE | {"mistral-v2", "mistral-v3", "mistral-v3-tekken"}


def _tools(*functions: Any) -> Message:
    return Message("tools", canonical_json([{"type": "function", "function": f} for f in functions or (WEATHER,)]))


def _call(name: str = "weather", *, place: int = 0, **values: Any) -> ToolCall:
    return ToolCall(name, canonical_json(values or {"city": "Oslo"}), call_id(place))


def _answered(*calls: ToolCall, content: str = "", result: str = "3 degrees") -> list[Message]:
    turn = Message("assistant", content, calls=calls or (_call(),))
    results = [Message("tool", result, call_id=call.id) for call in turn.calls]
    return [_tools(), QUESTION, turn, *results, Message("assistant", "Cold.")]


def _trained(chat: ChatFormat, messages: list[Message]) -> list[Message]:
    """The turns that the trained runs of all rows read as."""
    read: list[Message] = []
    for row in chat.rows(messages):
        run: list[int] = []
        for token, trained in zip((*row.ids, -1), (*row.loss_mask, False), strict=True):
            if trained:
                run.append(token)
            elif run:
                earlier = [m for m in read if m.calls]
                read.append(chat.answer(run, [messages[0], *earlier]))
                run = []
    return read


def _stripped(messages: list[Message]) -> list[Message]:
    return [replace(m, content=m.content.strip()) for m in messages]


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_read_back_as_the_turns(name: str) -> None:
    chat = family(name)

    @settings(examples(100, quick=8), suppress_health_check=list(HealthCheck))
    @given(conversations(parallel=name not in SINGLE))
    def check(messages: list[Message]) -> None:
        assume(messages[-1].role == "assistant")
        assume(name != "mistral-v2" or all(len(m.calls) < 2 for m in messages))  # it has one result at most
        try:
            read = _trained(chat, messages)
        except UserError as error:
            assume("reads as a function call" not in error.what)
            raise
        assert _stripped(read) == _stripped([m for m in messages if m.role == "assistant"])

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_look_alikes_in_functions_calls_and_results_stay_text(name: str) -> None:
    chat = family(name)
    every = " ".join(chat.encoder.control)
    call = ToolCall("weather", canonical_json({"city": every, every: every}), call_id(0))
    messages = [_tools(WEATHER | {"description": every}), *_answered(call, result=every)[1:]]
    ordinary = tuple(t for t in chat.rows(_answered())[-1].ids if t in chat.encoder.control_names)
    rows = chat.rows(messages)
    assert tuple(t for t in rows[-1].ids if t in chat.encoder.control_names) == ordinary
    assert chat.tokenizer.decode(rows[-1].ids).count(every) == 5


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_parallel_calls_are_refused_where_the_template_has_one(name: str) -> None:
    with pytest.raises(UserError, match="only supports single tool-calls") as caught:
        family(name).rows([_tools(), QUESTION, Message("assistant", "", calls=(_call(), _call(place=1)))])
    assert "chat.tools to hermes" in (caught.value.fix or "")
    assert not family(name).tool_form.parallel


@pytest.mark.parametrize("name", FAMILIES)
def test_text_before_calls_is_kept_or_refused(name: str) -> None:
    chat = family(name)
    messages = _answered(content="Let me look.")
    assert chat.tool_form.with_text == (name not in WITHOUT_TEXT)
    if name not in WITHOUT_TEXT:
        assert _trained(chat, messages)[0].content.strip() == "Let me look."  # sentencepiece's space is a byte here
        return
    for rendered in (lambda: chat.rows(messages), lambda: chat.prompt(messages[:-1])):
        with pytest.raises(UserError, match=r"drops the text|cannot have both content"):
            rendered()


def test_builtin_functions_of_llama_are_called_in_their_form() -> None:
    chat = family("llama3_1")
    query = 'a "quoted") <|eom_id|>'
    messages = [_tools(SEARCH, WEATHER), QUESTION]
    turn = Message("assistant", "", calls=(_call("brave_search", query=query),))
    (row,) = chat.rows([*messages, turn])
    text = chat.tokenizer.decode(row.ids)
    assert "Environment: ipython\nTools: brave_search\n\n" in text
    assert '"name": "weather"' in text
    assert '"name": "brave_search"' not in text
    assert text.endswith(f'<|python_tag|>brave_search.call(query="{query}")<|eom_id|>')
    assert row.loss_mask[-1]
    assert row.ids[-1] in chat.stop_ids
    assert chat.answer(row.ids[len(chat.prompt(messages)) :], messages) == turn
    other = Message("assistant", "", calls=(_call("weather"),))
    assert chat.tokenizer.decode(chat.rows([*messages, other])[0].ids).endswith('"Oslo"}}<|eom_id|>')


def test_calls_are_numbered_by_their_place_in_the_conversation() -> None:
    chat = family("mistral-v3")
    conversation = [*_answered(_call(), _call(place=1)), QUESTION]
    ids = chat.rows([_tools(), QUESTION, Message("assistant", "", calls=(_call(city="Bergen"),))])[0]
    answer = ids.ids[len(chat.prompt([_tools(), QUESTION])) :]
    assert chat.answer(answer, conversation).calls == (_call(place=2, city="Bergen"),)


def test_calls_are_read_only_where_functions_are_declared() -> None:
    chat = family("hermes-chatml")
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    ids = chat.tokenizer(text)["input_ids"]
    assert chat.answer(ids, [QUESTION]) == Message("assistant", text)
    assert chat.answer(ids, [_tools(), QUESTION]).calls == (ToolCall("weather", "{}", call_id(0)),)


MALFORMED = {
    "llama3_1": [
        '{"name": "weather"}',
        '{"name": "weather", "parameters": {}} and',
        '{"name": "weather", "parameters": []}',
        '{"name": "weather", "parameters": {"a": NaN}}',
        '{"name": "weather", "parameters": {"a": "\\ud800"}}',
        '{"name": "weather", "parameters": {"a": 1, "a": 2}}',
        '{"name": "weather", "parameters": {"a": 1e999}}',
        '{"name": "weather", "parameters": ' + '{"a":' * 100_000,
        'Sure: {"name": "weather", "parameters": {}}',
        'brave_search.call(query="x")',
        "",
    ],
    "hermes-chatml": [
        "<tool_call>",
        '<tool_call>\n{"name": "weather", "arguments": {}}\n',
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call> and',
        '<tool_call>\n{"name": "weather", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
    ],
    "mistral-v3": ['[TOOL_CALLS] [{"name": "weather", "arguments": {}}]', "[TOOL_CALLS] []"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, many in MALFORMED.items() for text in many])
def test_text_that_is_not_well_formed_calls_stays_content(name: str, text: str) -> None:
    chat = family(name)
    ids = chat.encoder.ids([text])[text]  # marks are ordinary text
    assert chat.answer(ids, [_tools(), QUESTION]) == Message("assistant", text)


@pytest.mark.parametrize("rest", ["", "[", "[]", '[{"name": "weather"}]', '[{"name": "weather", "arguments": {}}] x'])
def test_mark_without_well_formed_calls_leaves_the_content(rest: str) -> None:
    chat = family("mistral-v7-tekken")
    known = chat.encoder.ids(["Hello", rest])
    ids: list[int] = [*known["Hello"], chat.encoder.control["[TOOL_CALLS]"], *known[rest]]
    assert chat.answer(ids, [_tools(), QUESTION]) == Message("assistant", f"Hello{rest}")


@pytest.mark.parametrize("name", FAMILIES)
def test_answer_reads_any_ids(name: str) -> None:
    chat = family(name)
    marks = [chat.encoder.control[mark] for mark in chat.tool_form.form.marks if mark in chat.encoder.control]
    fragments = [
        '{"name": "f", "',
        'arguments": {}',
        "}",
        "[",
        "]",
        "<tool_call>",
        "</tool_call>",
        "\n",
        '"id": "x"',
        "{",
    ]
    part = texts | st.sampled_from(fragments) | st.sampled_from([*marks, "<tool_call>"])

    @settings(examples(60, quick=8), suppress_health_check=list(HealthCheck))
    @given(st.lists(part, max_size=8))
    def check(parts: list[Any]) -> None:
        ids = [i for p in parts for i in ([p] if isinstance(p, int) else chat.encoder.ids([p])[p])]
        answer = chat.answer(ids, [_tools(), QUESTION])
        if not answer.calls:
            assert answer.content == chat.text(ids)
        assert all(isinstance(json.loads(call.arguments), dict) for call in answer.calls)
        assert answer.content in chat.text(ids)

    check()


LOSSY = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m['tool_calls'] or [] %}[{{ c.function.name }}("
    '{% for key in c.function.arguments %}{{ key }}="{{ c.function.arguments[key] }}"{% endfor %})]{% endfor %}'
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSED = {
    "drops the declarations": CHATML,
    "drops function calls": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML,
    "drops the results": makers.trl_template("qwen2_5").replace(
        "message.content }}\n        {{- '\\n</tool_response>'", "'' }}"
    ),
    "cannot be read back": LOSSY,
    "has no form for functions": "{% if tools %}{{ raise_exception('no functions') }}{% endif %}" + CHATML,
}


@pytest.mark.parametrize(("what", "template"), REFUSED.items())
def test_template_that_drops_functions_is_refused(what: str, template: str) -> None:
    chat = format_of(tokenizer_of(template))
    for rendered in (lambda: chat.rows(_answered()), lambda: chat.prompt(_answered()[:2])):
        with pytest.raises(UserError, match=what) as caught:
            rendered()
        assert caught.value.fix == "Set chat.tools to hermes, which writes functions and calls as text."
    assert format_of(tokenizer_of(template), tools="hermes").rows(_answered())
    chat.rows([QUESTION, Message("assistant", "ok")])


def test_bases_without_a_template_have_hermes_only() -> None:
    with pytest.raises(UserError, match="drops the declarations"):
        format_of(byte_tokenizer(), "plain").prompt([_tools(), QUESTION])


@pytest.mark.parametrize("turn", [Message("assistant", "", calls=(_call(),)), Message("tool", "x", call_id=call_id(0))])
def test_calls_without_declared_functions_are_refused(turn: Message) -> None:
    with pytest.raises(UserError, match="without declared functions"):
        family("qwen2_5").prompt([QUESTION, turn])


def test_answer_that_reads_as_a_call_is_refused() -> None:
    text = '{"name": "weather", "parameters": {"city": "Oslo"}}'
    with pytest.raises(UserError, match="reads as a function call in the form of Llama 3"):
        family("llama3_1").rows([_tools(), QUESTION, Message("assistant", text)])
    family("llama3_1").rows([QUESTION, Message("assistant", text)])


def test_hermes_format_differs_from_the_templates_form() -> None:
    tokenizer = tokenizer_of(mistral_template("v13", sentencepiece=False), MISTRAL)
    own, hermes = format_of(tokenizer), format_of(tokenizer, tools="hermes")
    assert own.digest != hermes.digest
    assert differences(own.description, hermes.description) == ["chat.tools was own and is hermes"]
    assert "tools" not in own.description


def test_hermes_source_renders_in_transformers() -> None:
    """The source holds the form, so that exported files render conversations with functions too."""
    chat = family("hermes-chatml")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat.template.source
    turns = [
        {"role": "user", "content": "Oslo?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": call_id(0), "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
            ],
        },
        {"role": "tool", "content": "3 degrees", "tool_call_id": call_id(0), "name": "weather"},
    ]
    theirs = tokenizer.apply_chat_template(
        turns, tools=[{"type": "function", "function": WEATHER}], add_generation_prompt=True, tokenize=False
    )
    assert chat.tokenizer.decode(chat.prompt(_answered()[:-1])) == theirs


@given(st.lists(names, max_size=3, unique=True))
@examples(40)
def test_keys_of_declarations_have_one_order(drawn: list[str]) -> None:
    function = {
        "strict": True,
        "parameters": {
            "required": [],
            "properties": {name: {"description": "d", "type": "string"} for name in drawn},
            "type": "object",
        },
        "description": "d",
        "name": "f",
    }
    text = family("mistral-v13").tokenizer.decode(family("mistral-v13").prompt([_tools(function), QUESTION]))
    declared = json.loads(text.split("[AVAILABLE_TOOLS]")[1].split("[/AVAILABLE_TOOLS]")[0])[0]
    assert list(declared) == ["type", "function"]
    assert list(declared["function"]) == ["name", "description", "parameters"]
    assert list(declared["function"]["parameters"]) == ["type", "properties", "required"]
    properties = declared["function"]["parameters"]["properties"]
    assert list(properties) == sorted(drawn)
    assert all(list(schema) == ["type", "description"] for schema in properties.values())


def test_encode_takes_an_example_with_functions_as_messages_and_as_dicts() -> None:
    chat, messages = family("llama3_1"), _answered()
    encoded = encode(chat.tokenizer, messages)
    assert encoded == encode(chat.tokenizer, [m.as_dict() for m in messages])
    assert encoded.ids == chat.encode(messages).ids
    assert encode(chat.tokenizer, messages[1:2] + messages[-1:]).ids != encoded.ids


def test_control_token_with_json_syntax_is_refused_for_functions_only() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ['"city"']})
    tokenizer.chat_template = CHATML
    chat = format_of(tokenizer, tools="hermes")
    assert chat.encode([QUESTION, Message("assistant", 'The "city".')])
    with pytest.raises(UserError, match="includes JSON syntax of a call or declaration: '\"city\"'"):
        chat.encode(_answered())
