"""LangChain with functions and structured output; what it reads and does as one JSON document."""

import json
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

URL, CALLING, MODEL, QUESTION = sys.argv[1:]
KEY = SecretStr("none")
ran: list[dict[str, Any]] = []


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Oslo", "Rome"], days: int) -> str:
    """Return the weather."""
    ran.append({"city": city, "days": days})
    return f"{city}: rain"


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
