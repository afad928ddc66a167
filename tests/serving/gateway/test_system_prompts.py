"""Requests without a system message get the one that the adapter was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from scripted_engine import TOKENIZATION, ScriptedEngine, scripted_server
from scripted_engine import render as as_bytes

from tunewright.data.examples import Message
from tunewright.serving.gateway.auth import AnonymousAuth

PROMPT = "Give the court."
USER = [{"role": "user", "content": "hello"}]
OWN = [{"role": "system", "content": "Be brief."}, *USER]


def open_server(engine: ScriptedEngine, **limits: int) -> AbstractContextManager[httpx.Client]:
    access = AnonymousAuth({"base": None, "courts": "one", "plain": "two"}, {"courts": PROMPT})
    return scripted_server(engine, access, **limits)


def _chat(client: httpx.Client, model: str, messages: Sequence[dict[str, str]], **more: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": model, "messages": list(messages), **more})


def _said(messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    return as_bytes([Message(m["role"], m["content"]) for m in messages])


@pytest.mark.parametrize(
    ("model", "messages", "source", "rendered"),
    [
        ("courts", USER, "adapter", [{"role": "system", "content": PROMPT}, *USER]),
        ("courts", OWN, "request", OWN),
        ("plain", USER, "none", USER),
        ("plain", OWN, "request", OWN),
        ("base", USER, "none", USER),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_header_names_the_origin_of_the_system_message_and_usage_counts_it(
    model: str, messages: Any, source: str, rendered: Any, stream: bool
) -> None:
    engine = ScriptedEngine()
    with open_server(engine) as client:
        reply = _chat(client, model, messages, stream=stream)
        assert (reply.status_code, reply.headers["x-tunewright-system"]) == (200, source)
        assert engine.asked[-1][0].prompt_ids == _said(rendered)
        if not stream:
            assert reply.json()["usage"]["prompt_tokens"] == len(_said(rendered))


def test_completion_gets_no_system_prompt() -> None:
    engine = ScriptedEngine()
    with open_server(engine) as client:
        reply = client.post("/v1/completions", json={"model": "courts", "prompt": "Once"})
        assert (reply.status_code, reply.headers["x-tunewright-system"]) == (200, "none")
        assert engine.asked[-1][0].prompt_ids == tuple(b"Once")


def test_prompt_limit_includes_the_added_system_prompt() -> None:
    alone, whole = len(_said(USER)), len(_said([{"role": "system", "content": PROMPT}, *USER]))
    with open_server(ScriptedEngine(), max_prompt_tokens=whole) as client:
        assert _chat(client, "courts", USER).status_code == 200
    with open_server(ScriptedEngine(), max_prompt_tokens=alone) as client:
        assert _chat(client, "plain", USER).status_code == 200
        refused = _chat(client, "courts", USER)
        assert refused.status_code == 400
        expected = f"The prompt is too long: {whole} tokens including the adapter's system prompt"
        assert expected in refused.json()["error"]["message"]
    with open_server(ScriptedEngine(context=whole + 1)) as client:
        assert _chat(client, "courts", USER, max_tokens=4).status_code == 200
    with open_server(ScriptedEngine(context=whole)) as client:
        refused = _chat(client, "courts", USER, max_tokens=4)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "including the adapter's system prompt" in refused.json()["error"]["message"]


def test_prompt_is_tokenized_again_when_a_release_changes_the_system_prompt() -> None:
    engine = ScriptedEngine()
    access = AnonymousAuth({"courts": "one"}, {"courts": "before"})

    def slow(messages: Sequence[Message]) -> tuple[int, ...]:
        ids = as_bytes(messages)
        access.system_prompts["courts"] = "after"  # the alias is switched while this prompt is rendered
        return ids

    with scripted_server(engine, access, replace(TOKENIZATION, render=slow)) as client:
        _chat(client, "courts", USER)
    assert [request.prompt_ids for request, _ in engine.asked] == [
        _said([{"role": "system", "content": "after"}, *USER])
    ]
