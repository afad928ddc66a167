"""LiteLLM with functions and structured output; what it reads and does as one JSON document."""

import json
from typing import Any

import litellm
from weather_tool import CALLING, MODEL, QUESTION, URL, Weather, ran

TURNS: Any = [{"role": "user", "content": QUESTION}]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Return the weather.",
            "parameters": Weather.model_json_schema(),
        },
    }
]


def ask(url: str = URL, messages: Any = TURNS, **more: Any) -> Any:
    return litellm.completion(model=f"openai/{MODEL}", api_base=url, api_key="none", messages=messages, **more)


def loop(*, stream: bool) -> str:
    messages = list(TURNS)
    while True:
        answer = ask(CALLING, messages, tools=TOOLS, stream=stream)
        if stream:
            answer = litellm.stream_chunk_builder(list(answer), messages=messages)
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return str(message.content)
        for call in message.tool_calls:
            asked = json.loads(call.function.arguments)
            ran.append(asked)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{asked['city']}: rain"})


print(
    json.dumps(
        {
            "structured": json.loads(ask(response_format=Weather).choices[0].message.content),
            "loop": loop(stream=False),
            "stream loop": loop(stream=True),
            "ran": ran,
        }
    )
)
