"""Functions, answers that call them, and servers whose base has a form for them."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import openai
from scripted_engine import LIMITS, MODELS, ScriptedEngine
from served_model import openai_client

from tunewright.chat import ChatFormat
from tunewright.chat.answers import grammar_compiler
from tunewright.config import GatewayConfig
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.data.tools import read_tools
from tunewright.engines.protocol import Delta, Engine
from tunewright.generation.requests import Finish, Request
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import Auth

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Return the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
CLOCK: dict[str, Any] = {"name": "clock"}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
DECLARED = Message("tools", read_tools(TOOLS).text)
QUESTION: list[Any] = [{"role": "user", "content": "How is it there?"}]
ASKED = [DECLARED, Message("user", "How is it there?")]
CALL = ToolCall("weather", '{"city":"Oslo","days":2}', call_id(0))


class Saying(ScriptedEngine):
    """Says given tokens one by one."""

    def __init__(self, ids: tuple[int, ...], finish: Finish = "stop") -> None:
        super().__init__()
        self.ids = ids
        self.finish = finish

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        for place, token in enumerate(self.ids, 1):
            yield Delta((token,), self.finish if place == len(self.ids) else None)


class CallingEngine(ScriptedEngine):
    """Calls a function of the prompt in ``chat``'s form, and answers with its result once it has one."""

    def __init__(self, chat: ChatFormat) -> None:
        super().__init__(context=100_000)
        self.chat = chat

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        prompt = self.chat.text(request.prompt_ids)
        assert '"name": "weather"' in prompt, "the functions are declared in each request"
        results = re.findall(r"<tool_response>\n(.*?)\n</tool_response>", prompt, re.DOTALL)
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
        ids = self.chat.continuation(f"Result: {results[-1]}" if results else call)
        for place, token in enumerate(ids, 1):
            yield Delta((token,), "stop" if place == len(ids) else None)


def answer_ids(chat: ChatFormat, turn: Message) -> tuple[int, ...]:
    """Return the ids of a turn as a trained model would write it, without the end token."""
    prompt, ids = chat.prompt(ASKED), chat.encode([*ASKED, turn]).ids
    assert ids[: len(prompt)] == prompt
    answer = ids[len(prompt) :]
    return answer[: next(place for place, token in enumerate(answer) if token in chat.stop_ids)]


@contextmanager
def tool_server(
    engine: Engine, chat: ChatFormat, auth: Auth | None = None, limits: GatewayConfig = LIMITS
) -> Iterator[str]:
    """Yield the address of a server with this engine on a base with this format."""
    tokenization = Tokenization(chat.prompt, chat.continuation, chat.text, grammar_compiler(chat), (), chat)
    with serving(Gateway(engine, auth or AnonymousAuth(MODELS), tokenization, limits).app) as url:
        yield url


@contextmanager
def client_of(engine: Engine, chat: ChatFormat, auth: Auth | None = None) -> Iterator[openai.OpenAI]:
    """Yield OpenAI's client of such a server."""
    with tool_server(engine, chat, auth) as url, openai_client(url) as client:
        yield client
