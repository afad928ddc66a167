"""Calls read while an answer is generated, in each form: against the reader of whole answers, and cut anywhere."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from making.property_examples import examples
from making.tool_families import FAMILIES, arguments, family, names, texts
from tunewright.chat import ChatFormat
from tunewright.chat.call_stream import CallStream
from tunewright.chat.tool_calls import signed
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id

Calls = list[tuple[str, str]]


def answer(chat: ChatFormat, content: str, calls: Calls) -> str:
    """Return a turn as the template writes it, with its marks as the reader gets them."""
    declared = [{"type": "function", "function": {"name": name}} for name in {name: None for name, _ in calls} or ["f"]]
    asked = [Message("tools", canonical_json(declared)), Message("user", "x")]
    made = tuple(ToolCall(name, text, call_id(place)) for place, (name, text) in enumerate(calls))
    prompt, row = chat.prompt(asked), chat.encode([*asked, Message("assistant", content, calls=made)]).ids
    ids = [token for token in row[len(prompt) :] if token not in chat.stop_ids]
    marks = chat.tool_form.form.control.values()
    pieces = [token if token in marks else chat.text([token]) for token in ids]  # of bytes: ASCII alone
    return signed(pieces, chat.encoder.control_names)


def streamed(chat: ChatFormat, pieces: list[str], *, cut: bool = False) -> tuple[str, Calls, list[int]]:
    """Return content and calls joined from their pieces, and the number of pieces of each call."""
    stream = CallStream(chat.tool_form.form)
    each = [stream.push(piece) for piece in pieces]
    each.append(stream.end(cut=cut))
    calls: Calls = []
    counts: list[int] = []
    for _, deltas in each:
        for delta in deltas:
            if delta.name is not None:
                calls.append((delta.name, ""))
                counts.append(0)
            assert delta.index == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + delta.arguments
            counts[-1] += 1
    assert calls == stream.calls
    return "".join(content for content, _ in each), calls, counts


def split(text: str, places: list[int]) -> list[str]:
    return [text[begin:end] for begin, end in pairwise([0, *sorted(place % (len(text) + 1) for place in places), None])]


ascii_texts = texts.map(lambda text: text.encode("ascii", "ignore").decode())


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_join_to_the_answer_that_is_read_whole(name: str) -> None:
    chat = family(name)
    most = 3 if chat.tool_form.parallel else 1

    @settings(examples(80, quick=20), suppress_health_check=list(HealthCheck))
    @given(
        ascii_texts,
        st.lists(st.tuples(names, arguments.filter(str.isascii)), max_size=most),
        st.lists(st.integers(0, 10_000), max_size=12),
        st.booleans(),
    )
    def check(content: str, calls: Calls, places: list[int], bytewise: bool) -> None:
        content = content.strip() if chat.tool_form.with_text or not calls else ""
        assume(content or calls)
        try:
            text = answer(chat, content, calls)
        except UserError:
            assume(False)  # a text that reads as calls
        read = chat.tool_form.form.read(text)
        assume((read is None) is not bool(calls))
        # The stream cannot take a call back when text follows it; the reader of whole answers reads text.
        assume(all(chat.tool_form.form.read(content[:end]) is None for end in range(len(content))))
        said, made, _ = streamed(chat, list(text) if bytewise else split(text, places))
        assert [(name, json.loads(given)) for name, given in made] == [
            (name, json.loads(given)) for name, given in calls
        ]
        if calls:
            assert said.strip() == content
        assert (said, made) == streamed(chat, [text])[:2], "whatever the pieces"

    check()


def test_call_without_a_mark_stays_a_call_when_text_follows() -> None:
    chat = family("llama3_1")
    text = '{"name": "f", "parameters": {}} and more'
    assert chat.tool_form.form.read(text) is None
    assert streamed(chat, list(text))[1] == [("f", "{}")]


@pytest.mark.parametrize("name", FAMILIES)
def test_answer_cut_in_its_calls_has_no_marks_as_content(name: str) -> None:
    chat = family(name)
    content = "I look." if chat.tool_form.with_text else ""
    calls = [("weather", '{"city":"Oslo","days":[1,2]}'), ("clock", '{"zone":"a\\"b"}')][
        : 2 if chat.tool_form.parallel else 1
    ]
    text = answer(chat, content, calls)
    before = text.index('"name"') if '"name"' in text else text.index("weather")
    seen = set()
    for end in range(before + len('"name"'), len(text) + 1):
        said, made, _ = streamed(chat, list(text[:end]), cut=True)
        assert said.strip() == content
        seen.add(len(made))
        for (made_name, spelled), (expected, whole) in zip(made, calls, strict=False):
            assert made_name == expected
            assert "".join(whole.split()).startswith("".join(spelled.split()))
        assert all(json.loads(spelled) for _, spelled in made[:-1]), "calls before the last are complete"
    assert seen == set(range(len(calls) + 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_name_comes_before_the_arguments_and_they_come_in_pieces(name: str) -> None:
    chat = family(name)
    text = answer(chat, "", [("weather", '{"city":"Oslo","days":[1,2]}')])
    begin = text.index("Oslo")
    stream = CallStream(chat.tool_form.form)
    stream.push(text[:begin])
    assert [name for name, _ in stream.calls] == ["weather"]
    _, (delta,) = stream.push("O")
    assert (delta.name, delta.arguments) == (None, "O")


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes-chatml", 'a <tool_call>{"name": 3}</tool_call>', 'a <tool_call>{"name": 3}</tool_call>', []),
        ("hermes-chatml", "a <tool", "a <tool", []),
        (
            "hermes-chatml",
            '<tool_call>{"arguments": {"x": "}"}, "name": "f"}</tool_call>',
            "",
            [("f", '{"x":"}"}')],
        ),
        ("hermes-chatml", '<tool_call>{"name": "f", "arguments": {}}</tool_call> Done.', " Done.", [("f", "{}")]),
        ("hermes-chatml", '<tool_call>{"name": "f", "arguments": {3}}</tool_call>', "", [("f", "{3}")]),
        ("llama3_1", '{"names": ["f"]}', '{"names": ["f"]}', []),
        ("llama3_1", ' {"name": "f"', ' {"name": "f"', []),
        ("llama3_1", 'Call: {"name": "f", "parameters": {}}', 'Call: {"name": "f", "parameters": {}}', []),
        ("llama3_1", '{"parameters": {}, "name": "f"}', "", [("f", "{}")]),
        ("llama3_1", " ", " ", []),
    ],
)
def test_malformed_answer_keeps_its_text(name: str, text: str, content: str, calls: Calls) -> None:
    assert streamed(family(name), list(text))[:2] == (content, calls)


def test_builtin_call_streams_its_query() -> None:
    chat = family("llama3_1")
    text = chat.tool_form.form.signs["<|python_tag|>"] + 'brave_search.call(query="who \\ ") is")'
    assert chat.tool_form.form.read(text) == ("", [("brave_search", '{"query":"who \\\\ \\") is"}')])
    _, calls, (pieces,) = streamed(chat, list(text))
    assert calls == [("brave_search", '{"query":"who \\\\ \\") is"}')] and pieces > 3
    _, calls, _ = streamed(chat, list(text[:-3]), cut=True)
    assert calls == [("brave_search", '{"query":"who \\\\ \\") i')]
