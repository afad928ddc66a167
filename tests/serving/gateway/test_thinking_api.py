"""Thinking over HTTP: apart from the answer, complete and streamed, and the options of templates that take some."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine
from served_model import CHAT
from tool_server import DECLARED, TOOLS, Saying, client_of, tool_server

from making import makers
from making.thinking_templates import Family, thinking_chat
from making.tiny_bases import chat_of
from tunewright.chat import ChatFormat
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.engines.protocol import Delta
from tunewright.generation.requests import TokenLogprob

ASKED = [Message("user", "2+2?")]
QUESTION: list[Any] = [{"role": "user", "content": "2+2?"}]
ANSWER = Message("assistant", "4.", reasoning="two and\n two")
FAMILIES: tuple[Family, ...] = ("qwen3", "qwen3_5_think", "gptoss", "magistral")


def _ids(chat: ChatFormat, turn: Message, asked: list[Message] = ASKED) -> tuple[int, ...]:
    """The ids of a turn as a model writes it, without the end token."""
    (row,) = chat.rows([*asked, turn])
    return tuple(token for token, trained in zip(row.ids, row.loss_mask, strict=True) if trained)[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_thinking_is_apart_from_the_answer(family: Family) -> None:
    chat = thinking_chat(family)
    ids = _ids(chat, ANSWER)
    with client_of(Saying(ids), chat) as client:
        whole = client.chat.completions.create(model="base", messages=QUESTION)
        message = whole.choices[0].message.model_dump()
        assert (message["reasoning_content"], message["content"]) == (ANSWER.reasoning, "4.")
        assert whole.usage is not None and whole.usage.completion_tokens == len(ids)
        details = whole.usage.completion_tokens_details
        assert details is not None and 0 < (details.reasoning_tokens or 0) < len(ids)
        deltas = [
            chunk.choices[0].delta.model_dump()
            for chunk in client.chat.completions.create(model="base", messages=QUESTION, stream=True)
        ]
    pieces = [delta.get("reasoning_content") or "" for delta in deltas]
    assert "".join(pieces) == ANSWER.reasoning and sum(map(bool, pieces)) > 1
    assert "".join(delta["content"] or "" for delta in deltas) == "4."


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_without_thinking_has_no_reasoning_content(family: Family) -> None:
    chat = thinking_chat(family)
    with client_of(Saying(_ids(chat, Message("assistant", "4."))), chat) as client:
        message = client.chat.completions.create(model="base", messages=QUESTION).choices[0].message.model_dump()
    assert message["content"] == "4." and "reasoning_content" not in message


def test_thinking_that_reaches_the_token_limit_has_no_answer() -> None:
    chat = thinking_chat("qwen3")
    with client_of(Saying(_ids(chat, ANSWER)[:8], "length"), chat) as client:
        choice = client.chat.completions.create(model="base", messages=QUESTION).choices[0]
    message = choice.message.model_dump()
    assert (choice.finish_reason, message["content"]) == ("length", "")
    assert ANSWER.reasoning.startswith(message["reasoning_content"])


class _Scoring(Saying):
    """Reports the same log probability for each token."""

    async def deltas(self, request: Any) -> AsyncGenerator[Delta, None]:
        async for delta in super().deltas(request):
            yield replace(delta, logprobs=(TokenLogprob(-1.0, ()),))


def test_log_probabilities_cover_thinking_and_answer() -> None:
    chat = thinking_chat("qwen3")
    ids = _ids(chat, ANSWER)
    with client_of(_Scoring(ids), chat) as client:
        choice = client.chat.completions.create(model="base", messages=QUESTION, logprobs=True).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert tokens.decode() == "<think>\ntwo and\n two\n</think>\n\n4."


def test_calls_follow_thinking() -> None:
    chat = thinking_chat("qwen3")
    asked = [DECLARED, *ASKED]
    turn = Message("assistant", "", calls=(ToolCall("clock", "{}", call_id(0)),), reasoning="ask the clock")
    with client_of(Saying(_ids(chat, turn, asked)), chat) as client:
        choice = client.chat.completions.create(model="base", messages=QUESTION, tools=TOOLS).choices[0]
    message = choice.message.model_dump()
    assert (message["reasoning_content"], message["content"], choice.finish_reason) == (
        "ask the clock",
        None,
        "tool_calls",
    )
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["clock"]


@pytest.mark.parametrize("route", ["responses", "messages"])
def test_other_routes_leave_thinking_out(route: str) -> None:
    chat = thinking_chat("qwen3")
    bodies: dict[str, dict[str, Any]] = {
        "responses": {"input": "2+2?"},
        "messages": {"messages": QUESTION, "max_tokens": 99},
    }
    with tool_server(Saying(_ids(chat, ANSWER)), chat) as url:
        body = {"model": "base", **bodies[route]}
        answer = httpx.post(f"{url}/v1/{route}", json=body).json()
        streamed = httpx.post(f"{url}/v1/{route}", json={**body, "stream": True}).text
    texts = answer["content"] if route == "messages" else answer["output"][0]["content"]
    assert [part["text"] for part in texts] == ["4."]
    assert "two and" not in streamed
    if route == "responses":
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


class _Listening(ScriptedEngine):
    """Keeps the prompts, and answers each with a word."""

    def __init__(self) -> None:
        super().__init__(context=100_000)
        self.prompts: list[tuple[int, ...]] = []

    def submit(self, request: Any, sink: Any, *, tenant: str = "") -> Any:
        self.prompts.append(request.prompt_ids)
        return super().submit(request, sink, tenant=tenant)


def _prompt(chat: ChatFormat, **body: Any) -> str:
    engine = _Listening()
    with tool_server(engine, chat) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "base", "messages": QUESTION, **body})
    assert answer.status_code == 200, answer.text
    return chat.texts([engine.prompts[0]])[0]


@pytest.mark.parametrize(
    ("family", "body", "words"),
    [
        ("gptoss", {"reasoning_effort": "high"}, "Reasoning: high"),
        ("gptoss", {"chat_template_kwargs": {"reasoning_effort": "low"}}, "Reasoning: low"),
        ("gptoss", {}, "Reasoning: medium"),
        ("qwen3", {"reasoning_effort": "none"}, "<think>\n\n</think>\n\n"),
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}, "<think>\n\n</think>\n\n"),
        ("qwen3_5_think", {"chat_template_kwargs": {"enable_thinking": True}}, "assistant\n<think>\n"),
    ],
)
def test_options_reach_templates_that_take_them(family: Family, body: dict[str, Any], words: str) -> None:
    assert words in _prompt(thinking_chat(family), **body)


def test_thinking_that_a_request_turns_off_is_not_expected() -> None:
    chat = thinking_chat("qwen3_5_think")
    with client_of(Saying(tuple(chat.tokenizer("4.")["input_ids"])), chat) as client:
        answer = client.chat.completions.create(model="base", messages=QUESTION, reasoning_effort="none")
    assert answer.choices[0].message.content == "4."


@pytest.mark.parametrize(
    ("family", "body", "words"),
    [
        ("chatml", {"reasoning_effort": "low"}, "reasoning_effort: the base's chat template has no such option"),
        ("magistral", {"reasoning_effort": "none"}, "reasoning_effort: the base's chat template has no such option"),
        ("qwen3", {"reasoning_effort": "high"}, "reasoning_effort: the base's chat template has no such option"),
        ("qwen3", {"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token: the base's chat"),
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": "no"}}, 'must be one of true, false (got "no")'),
    ],
)
def test_options_that_the_template_does_not_take_are_refused(family: Any, body: dict[str, Any], words: str) -> None:
    chat = CHAT if family == "chatml" else thinking_chat(family)
    with tool_server(Saying((65,)), chat) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "base", "messages": QUESTION, **body})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("effort", "words"), [("none", None), ("low", "reasoning.effort: the base's chat template has no")]
)
def test_effort_of_a_response_is_that_of_the_chat_request(effort: str, words: str | None) -> None:
    engine, chat = _Listening(), thinking_chat("qwen3")
    body = {"model": "base", "input": "2+2?", "reasoning": {"effort": effort, "summary": None}}
    with tool_server(engine, chat) as url:
        answer = httpx.post(f"{url}/v1/responses", json=body)
    if words is None:
        assert chat.texts([engine.prompts[0]])[0].endswith("<think>\n\n</think>\n\n")
    else:
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "reasoning.effort"


def test_effort_none_changes_nothing_for_a_base_that_does_not_think() -> None:
    assert _prompt(CHAT, reasoning_effort="none") == _prompt(CHAT)


def test_effort_reaches_mistral_v15_with_the_values_that_it_takes() -> None:
    chat = chat_of(makers.mistral_tokenizer("v15"))
    assert chat.switches == {"reasoning_effort": ("none", "high")}
    assert '"reasoning_effort": "high"' in _prompt(chat, reasoning_effort="high")


def test_thinking_of_earlier_turns_is_rendered_as_the_template_does() -> None:
    earlier = [*QUESTION, {"role": "assistant", "content": "4.", "reasoning_content": "two and two"}, *QUESTION]
    assert "[THINK]two and two[/THINK]" in _prompt(thinking_chat("magistral"), messages=earlier)
    assert "two and two" not in _prompt(thinking_chat("qwen3"), messages=earlier)
    assert "two and two" not in _prompt(thinking_chat("magistral", "strip"), messages=earlier)
