"""The fields of a request, the errors for all others, and the conversations that a canary answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.data.examples import Message
from tunewright.serving.gateway.errors import ApiError, parse_request
from tunewright.serving.gateway.messages_api import MessagesRequest
from tunewright.serving.gateway.schemas import ChatRequest, CompletionRequest
from tunewright.serving.gateway.tenant_auth import in_canary_share

TURN = {"role": "user", "content": "x"}
LEAST = {"model": "m", "messages": [TURN]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 1, "user": "me", "stream": False, "stop": []},
        {"temperature": None, "top_p": 1.0, "max_tokens": None, "stop": None, "stream": None, "seed": None},
        {"temperature": 0, "top_p": 0.5},
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"messages": [{"role": "system", "content": ""}, TURN, {"role": "assistant", "content": "y"}, TURN]},
    ],
)
def test_fields_with_an_effect_are_parsed(more: dict[str, Any]) -> None:
    parse_request(ChatRequest, json.dumps(LEAST | more).encode())


NEUTRAL: list[tuple[str, Any]] = [
    ("frequency_penalty", 0),
    ("presence_penalty", 0.0),
    ("logit_bias", {}),
    ("logprobs", False),
    ("top_logprobs", 0),
    ("n", 1),
    ("tools", []),
    ("functions", []),
    ("tool_choice", "auto"),
    ("function_call", "none"),
    ("parallel_tool_calls", True),
    ("parallel_tool_calls", False),
    ("response_format", {"type": "text"}),
    ("response_format", None),
    ("reasoning_effort", "none"),
    ("modalities", ["text"]),
    ("prediction", None),
    ("verbosity", "medium"),
    ("service_tier", "auto"),
    ("stream_options", None),
    ("stream_options", {"include_usage": True}),
    ("stream_options", {"include_usage": None, "include_obfuscation": False}),
    ("web_search_options", None),
    ("user", "ann"),
    ("safety_identifier", "a-hash"),
    ("prompt_cache_key", "conversation 7"),
    ("metadata", {"team": "courts"}),
    ("store", True),
    # vLLM's, as its users' applications send them
    ("top_k", -1),
    ("min_p", 0),
    ("repetition_penalty", 1.0),
    ("skip_special_tokens", True),
    ("ignore_eos", False),
    ("chat_template_kwargs", {}),
]


@pytest.mark.parametrize(("field", "value"), NEUTRAL)
def test_chat_request_accepts_neutral_value(field: str, value: Any) -> None:
    parse_request(ChatRequest, json.dumps(LEAST | {field: value}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 1),
        ("echo", False),
        ("suffix", None),
        ("suffix", ""),
        ("logprobs", None),
        ("logprobs", False),
        ("logprobs", 0),
    ],
)
def test_completion_request_accepts_neutral_value(field: str, value: Any) -> None:
    parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": "x", field: value}).encode())


@pytest.mark.parametrize(("field", "value"), [("best_of", 2), ("best_of", True), ("echo", True), ("suffix", "y")])
def test_completion_request_refuses_value_that_changes_the_answer(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"{field} is not supported: remove it") as caught:
        parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": "x", field: value}).encode())
    assert (caught.value.status, caught.value.param) == (400, field)


def test_assistant_message_is_accepted_with_the_null_fields_of_a_response() -> None:
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "y",
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "annotations": [],
    }
    body = LEAST | {"messages": [TURN | {"name": "ann"}, echoed, TURN]}
    asked = parse_request(ChatRequest, json.dumps(body).encode())
    assert asked.conversation == [Message("user", "x"), Message("assistant", "y"), Message("user", "x")]


def test_developer_message_is_a_system_message() -> None:
    turns = {"messages": [{"role": "developer", "content": "s"}, TURN]}
    asked = parse_request(ChatRequest, json.dumps(LEAST | turns).encode())
    assert asked.conversation == [Message("system", "s"), Message("user", "x")]


def test_leading_system_messages_are_joined() -> None:
    system = [{"role": role, "content": role} for role in ("system", "developer", "system")]
    asked = parse_request(ChatRequest, json.dumps(LEAST | {"messages": [*system, TURN, system[0]]}).encode())
    first, *others = asked.conversation
    assert first == Message("system", "system\n\ndeveloper\n\nsystem")
    assert others == [Message("user", "x"), Message("system", "system")]
    assert asked.beginning == [["system", first.content], ["user", "x"]]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "not json"}, "guided_json"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": 1.5}}, "chat_template_kwargs.enable_thinking.bool"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"user": 5}, "user"),
        ({"safety_identifier": "x" * 513}, "safety_identifier"),
        ({"metadata": "x"}, "metadata"),
        ({"unknown": 1}, "unknown"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"top_p": 0.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop.0"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, "messages.0.refusal"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls.0.function"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"model": None}, "model"),
    ],
)
def test_error_names_the_field_at_fault(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, json.dumps(LEAST | more).encode())
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b'"x"'])
def test_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ({"user": "ann"}, "ann"),
        ({"user": "ann", "safety_identifier": "5f2e"}, "5f2e"),
        ({"user": ""}, None),
        ({"metadata": {"a": "b"}, "store": True, "prompt_cache_key": "k"}, None),
    ],
)
def test_clients_label_of_its_user_is_kept(labels: dict[str, Any], kept: str | None) -> None:
    assert parse_request(ChatRequest, json.dumps(LEAST | labels).encode()).end_user == kept


def _conversation(first: str, turns: int = 0) -> Any:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": first}]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": f"a{turn}"}, {"role": "user", "content": f"u{turn}"}]
    return parse_request(ChatRequest, json.dumps({"model": "m", "messages": messages}).encode())


@given(first=st.text(min_size=1), turns=st.integers(1, 3), low=st.floats(0.01, 0.5), more=st.floats(0, 0.4))
def test_conversation_stays_with_its_canary_when_it_or_the_share_grows(
    first: str, turns: int, low: float, more: float
) -> None:
    begun, later = _conversation(first), _conversation(first, turns)
    assert in_canary_share("acme", begun, "d", low) == in_canary_share("acme", later, "d", low)
    if in_canary_share("acme", begun, "d", low):
        assert in_canary_share("acme", begun, "d", low + more)


def test_canary_answers_its_share_of_conversations() -> None:
    answered = sum(in_canary_share("acme", _conversation(f"case {number}"), "d", 0.1) for number in range(4000))
    assert abs(answered / 4000 - 0.1) < 0.02  # four standard deviations
    for number in range(20):  # the same in Anthropic's form
        turns = [{"role": "user", "content": f"case {number}"}]
        sent = {"model": "m", "system": "Be brief.", "messages": turns, "max_tokens": 5}
        message = parse_request(MessagesRequest, json.dumps(sent).encode()).as_chat()
        in_chat = in_canary_share("acme", _conversation(f"case {number}"), "d", 0.5)
        assert in_canary_share("acme", message, "d", 0.5) == in_chat
