"""What a request may say, and the words with which the rest is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunewright.serving.protocol import ApiError, ChatRequest, parse_request

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
def test_what_has_an_effect_is_taken(more: dict[str, Any]) -> None:
    parse_request(ChatRequest, json.dumps(LEAST | more).encode())


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": []}, "tools"),
        ({"frequency_penalty": 0}, "frequency_penalty"),
        ({"n": 2}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"top_p": 0.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"messages": []}, "messages"),
        ({"messages": [TURN | {"name": "me"}]}, "messages.0.name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"model": None}, "model"),
    ],
)
def test_the_field_at_fault_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, json.dumps(LEAST | more).encode())
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


def test_an_image_is_refused_by_name() -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    body = LEAST | {"messages": [{"role": "user", "content": content}]}
    with pytest.raises(ApiError, match="images are not read here, only text") as caught:
        parse_request(ChatRequest, json.dumps(body).encode())
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b'"x"'])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, body)
    assert caught.value.status == 400


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, json.dumps({"tools": [], "n": 3, "model": "m"}).encode())
    for fault in ("tools is not supported here", "n: Input should be 1", "messages is missing"):
        assert fault in caught.value.message
