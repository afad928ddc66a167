"""LangChain with functions and structured output; what it reads and does as one JSON document."""

import json
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from weather_tool import CALLING, MODEL, QUESTION, URL, Weather, ran, weather

KEY = SecretStr("none")


WEATHER = tool(weather)


def loop(*, stream: bool, responses: bool = False) -> str:
    model = ChatOpenAI(model=MODEL, base_url=CALLING, api_key=KEY, use_responses_api=responses).bind_tools([WEATHER])
    messages: list[Any] = [HumanMessage(QUESTION)]
    while True:
        if stream:
            chunks = list(model.stream(messages))
            message: Any = sum(chunks[1:], chunks[0])
        else:
            message = model.invoke(messages)
        messages.append(message)
        if not message.tool_calls:
            return str(message.text)
        messages += [WEATHER.invoke(call) for call in message.tool_calls]


chat = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY)
print(
    json.dumps(
        {
            "structured": chat.with_structured_output(Weather).invoke(QUESTION).model_dump(),
            "by function": chat.with_structured_output(Weather, method="function_calling")
            .invoke(QUESTION)
            .model_dump(),
            "json mode": chat.with_structured_output(Weather.model_json_schema()).invoke(QUESTION),
            "loop": loop(stream=False),
            "stream loop": loop(stream=True),
            "responses loop": loop(stream=False, responses=True),
            "ran": ran,
        }
    )
)
