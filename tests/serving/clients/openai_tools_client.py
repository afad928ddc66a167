"""OpenAI's Python SDK with functions and structured output; what it reads and does as one JSON document."""

import json
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field

URL, CALLING, MODEL, QUESTION = sys.argv[1:]
TURNS: Any = [{"role": "user", "content": QUESTION}]
client: Any = openai.OpenAI(base_url=URL, api_key="none")
calling: Any = openai.OpenAI(base_url=CALLING, api_key="none")


class Weather(BaseModel):
    """Return the weather."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


TOOL: Any = openai.pydantic_function_tool(Weather, name="weather")
PLAIN: Any = [{"type": "function", "function": {**TOOL["function"], "strict": False}}]
FLAT: Any = [{"type": "function", **TOOL["function"], "strict": False}]
ran: list[dict[str, Any]] = []


def weather(arguments: str) -> str:
    asked = Weather.model_validate_json(arguments)
    ran.append(asked.model_dump())
    return f"{asked.city}: rain"


def loop(**how: Any) -> str:
    messages = list(TURNS)
    while True:
        if how.get("stream"):
            with calling.chat.completions.stream(model=MODEL, messages=messages, tools=PLAIN) as stream:
                message = stream.get_final_completion().choices[0].message
        else:
            message = calling.chat.completions.create(model=MODEL, messages=messages, tools=PLAIN).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return str(message.content)
        for call in message.tool_calls:
            content = weather(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


def responses_loop() -> str:
    items: list[Any] = list(TURNS)
    while True:
        response = calling.responses.create(model=MODEL, input=items, tools=FLAT)
        items += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return str(response.output_text)
        for call in calls:
            output = weather(call.arguments)
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})


def required(message: Any) -> dict[str, Any]:
    (call,) = message.tool_calls
    return {"name": call.function.name, "arguments": call.function.parsed_arguments.model_dump()}


parse = client.chat.completions.parse
forced: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
with client.chat.completions.stream(model=MODEL, messages=TURNS, response_format=Weather) as structured:
    streamed = structured.get_final_completion().choices[0].message.parsed
with client.chat.completions.stream(model=MODEL, messages=TURNS, **forced) as events:
    done = [event.parsed_arguments.model_dump() for event in events if event.type.endswith("arguments.done")]
print(
    json.dumps(
        {
            "parsed": parse(model=MODEL, messages=TURNS, response_format=Weather)
            .choices[0]
            .message.parsed.model_dump(),
            "streamed": streamed.model_dump(),
            "response": client.responses.parse(
                model=MODEL, input=QUESTION, text_format=Weather
            ).output_parsed.model_dump(),
            "required": required(parse(model=MODEL, messages=TURNS, **forced).choices[0].message),
            "events": done,
            "loop": loop(),
            "stream loop": loop(stream=True),
            "responses loop": responses_loop(),
            "ran": ran,
        }
    )
)
