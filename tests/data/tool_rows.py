"""Conversations with functions, and writers of them in each format that is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tunewright.core.io import canonical_json
from tunewright.data.examples import Example, Message, ToolCall, call_id

Row = dict[str, Any]

WEATHER: Row = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "units": {"$ref": "#/$defs/units"},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"units": {"enum": ["metric", "imperial"]}},
    },
}
CLOCK: Row = {"name": "clock.now", "parameters": {"type": "object", "properties": {}}}
FUNCTIONS = [WEATHER, CLOCK]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]


def conversation(*turns: Message) -> Example:
    """An example with the functions above."""
    return Example((Message("tools", canonical_json(TOOLS)), *turns))


def weather(place: int, **arguments: Any) -> ToolCall:
    """A call of get_weather, the conversation's call number ``place`` from 0."""
    return ToolCall("get_weather", canonical_json(arguments), call_id(place))


OSLO = conversation(
    Message("system", "Be brief."),
    Message("user", "Weather in Oslo and Bergen?"),
    Message("assistant", "", calls=(weather(0, city="Oslo", days=2), weather(1, city="Bergen"))),
    Message("tool", '{"rain": true}', call_id=call_id(0)),
    Message("tool", "sun", call_id=call_id(1)),
    Message("assistant", "Rain, then sun."),
)


def _turns(example: Example) -> tuple[Message, ...]:
    return example.messages[1:]


def _name(example: Example, result: Message) -> str:
    return next(call.name for turn in example.messages for call in turn.calls if call.id == result.call_id)


def as_openai(example: Example) -> Row:
    """OpenAI's fine-tuning format, with ids as the API makes them."""
    rows: list[Row] = []
    for turn in _turns(example):
        row: Row = {"role": turn.role, "content": turn.content or (None if turn.calls else "")}
        if turn.calls:
            row["tool_calls"] = [
                {"id": f"call_{c.id}xyz", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in turn.calls
            ]
        if turn.role == "tool":
            row["tool_call_id"] = f"call_{turn.call_id}xyz"
        if turn.weight == 0:
            row["weight"] = 0
        rows.append(row)
    return {"messages": rows, "tools": TOOLS, "parallel_tool_calls": True}


def as_openai_parts(example: Example) -> Row:
    """The same, with the role developer, lists of text parts, objects as arguments and declarations as text."""
    row = as_openai(example)
    for turn in row["messages"]:
        if turn["role"] == "system":
            turn["role"] = "developer"
        if turn["content"] is None:
            del turn["content"]
        elif turn["content"]:
            half = len(turn["content"]) // 2
            turn["content"] = [{"type": "text", "text": t} for t in (turn["content"][:half], turn["content"][half:])]
        for call in turn.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return {**row, "tools": json.dumps(TOOLS, indent=1)}


def as_openai_functions(example: Example) -> Row:
    """OpenAI's earlier format: function_call and the role function. One call a turn."""
    rows = []
    for turn in _turns(example):
        row: Row = {"role": turn.role, "content": turn.content}
        if turn.calls:
            [call] = turn.calls
            row["function_call"] = {"name": call.name, "arguments": call.arguments}
        if turn.role == "tool":
            row |= {"role": "function", "name": _name(example, turn)}
        if turn.weight == 0:
            row["weight"] = 0
        rows.append(row)
    return {"messages": rows, "functions": FUNCTIONS}


def as_mistral(example: Example) -> Row:
    """Mistral's format: results have the function's name, declarations are available_tools."""
    row = as_openai(example)
    for turn, read in zip(row["messages"], _turns(example), strict=True):
        if turn["role"] == "tool":
            turn["name"] = _name(example, read)
        turn["content"] = turn["content"] or ""
    return {"interactions": row["messages"], "available_tools": TOOLS}


def as_together(example: Example) -> Row:
    """Together's conversational format."""
    row = as_openai(example)
    return {"conversation": row["messages"], "tools": TOOLS}


def as_share_gpt(example: Example) -> Row:
    """LLaMA-Factory's ShareGPT: a turn is a text or calls, and declarations are a text."""
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    rows = []
    for turn in _turns(example):
        row: Row = {"from": names[turn.role], "value": turn.content}
        if turn.calls:
            calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.calls]
            row = {"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls)}
        if turn.weight == 0:
            row["weight"] = 0
        rows.append(row)
    return {"conversations": rows, "tools": json.dumps(FUNCTIONS)}


HERMES = """You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML \
tags. You may call one or more functions to assist with the user query.
<tools>
%s
</tools>
For each function call return a json object with function name and arguments within <tool_call> </tool_call> tags:
<tool_call>
{'arguments': <args-dict>, 'name': <function-name>}
</tool_call>
"""


def as_hermes(example: Example, written: Callable[[Any], str] = json.dumps) -> Row:
    """The form of NousResearch/hermes-function-calling-v1: tags in texts."""
    names = {"user": "human", "assistant": "gpt", "tool": "tool"}
    turns = list(_turns(example))
    system = turns.pop(0).content + "\n\n" if turns[0].role == "system" else ""
    rows: list[Row] = [{"from": "system", "value": system + HERMES % written(TOOLS)}]
    for turn in turns:
        text = turn.content
        for call in turn.calls:
            inner = written({"arguments": json.loads(call.arguments), "name": call.name})
            text += f"\n<tool_call>\n{inner}\n</tool_call>"
        if turn.role == "tool":
            inner = json.dumps({"name": _name(example, turn), "content": turn.content})
            text = f"<tool_response>\n{inner}\n</tool_response>\n"
        if turn.role == "tool" and rows[-1]["from"] == "tool":
            rows[-1]["value"] += text
            continue
        rows.append({"from": names[turn.role], "value": text} | ({"weight": 0} if turn.weight == 0 else {}))
    return {"conversations": rows}


def as_hermes_literals(example: Example) -> Row:
    """The same with Python's spelling of objects, as a part of that data set has it."""
    return as_hermes(example, repr)


FORMATS: list[Callable[[Example], Row]] = [
    as_openai,
    as_openai_parts,
    as_mistral,
    as_together,
    as_share_gpt,
    as_hermes,
    as_hermes_literals,
]
