"""The example's agent on a tiny base that learned its conversations: the SDK's loop runs real functions."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import openai
import pytest
from served_model import running_engine

from tool_families import family
from tunewright.chat.answers import grammar_compiler
from tunewright.config import GatewayConfig
from tunewright.core.io import canonical_json
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.versions import Member
from tunewright.examples import orders_agent
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import serving
from tunewright.training.rows import as_columns, encode_members

CHAT = family("hermes-chatml")
NUMBERS = [number for number, *_ in orders_agent.ORDERS]


def new_agent() -> Any:
    """The shipped program with a database of its own."""
    spec = importlib.util.spec_from_file_location("agent", orders_agent.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def conversation(number: str) -> Member:
    """A training row with the functions' own results."""
    agent, turns = new_agent(), [Message("tools", canonical_json(orders_agent.TOOLS))]
    for place, (asked, name) in enumerate([(f"{number}?", "find_order"), ("Cancel it.", "cancel_order")]):
        call = ToolCall(name, canonical_json({"order": number}), call_id(place))
        result = agent.FUNCTIONS[name](number)
        said = {True: "Done.", False: f"No: {result.get('reason')}."}.get(result.get("cancelled"), result.get("item"))
        turns += [
            Message("user", asked),
            Message("assistant", "", calls=(call,)),
            Message("tool", canonical_json(result), call_id=call.id),
            Message("assistant", str(said)),
        ]
    example = Example(tuple(turns))
    return Member(example, example.pair_key, "train", example.pair_key)


def trained_base(members: list[Member]) -> Any:
    """A tiny base that knows these conversations by heart."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    columns = as_columns(encode_members(CHAT, members, 4000).rows)
    length = max(map(len, columns["input_ids"]))
    ids, labels = (
        torch.tensor([row + [filler] * (length - len(row)) for row in columns[name]])
        for name, filler in (("input_ids", 0), ("labels", -100))
    )
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(CHAT.tokenizer), num_attention_heads=4, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(600):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.005:
            break
    return model.eval()


@pytest.mark.slow
def test_agent_calls_real_functions_with_arguments_of_the_conversation_and_answers_with_their_results() -> None:
    members = [conversation(number) for number in NUMBERS]
    tokenization = Tokenization(CHAT.prompt, CHAT.continuation, CHAT.text, grammar_compiler(CHAT), (), CHAT)
    with (
        running_engine(trained_base(members)) as engine,
        serving(Gateway(engine, AnonymousAuth({"orders": None}), tokenization, GatewayConfig()).app) as url,
        openai.DefaultHttpxClient(trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client,
    ):
        for number, item, state, date in orders_agent.ORDERS:
            agent = new_agent()
            messages: list[Any] = [{"role": "user", "content": f"{number}?"}]
            assert agent.answer(client, "orders", messages) == item
            messages.append({"role": "user", "content": "Cancel it."})
            last = agent.answer(client, "orders", messages)
            assert last == ("Done." if state == "packing" else f"No: {state} on {date}.")
            cancelled = agent.find_order(number)["state"] == "cancelled"
            assert cancelled is (state == "packing"), "the database that the functions changed"
            called = [
                (call.function.name, call.function.arguments)
                for message, result in pairwise(messages)
                if isinstance(result, dict) and result["role"] == "tool"
                for call in message.tool_calls
            ]
            arguments = canonical_json({"order": number})
            assert called == [("find_order", arguments), ("cancel_order", arguments)]
