"""Pydantic AI with functions and output types; what it reads and does as one JSON document."""

import asyncio
import json
import sys
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, CALLING, MODEL, QUESTION = sys.argv[1:]
ran: list[dict[str, Any]] = []


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Oslo", "Rome"], days: int) -> str:
    """Return the weather."""
    ran.append({"city": city, "days": days})
    return f"{city}: rain"


async def main() -> None:
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))
    provider = OpenAIProvider(base_url=CALLING, api_key="none")
    agent = Agent(OpenAIChatModel(MODEL, provider=provider), tools=[weather])
    async with agent.run_stream(QUESTION) as stream:
        streamed = await stream.get_output()
    found = {
        "output": (await Agent(model, output_type=Weather).run(QUESTION)).output.model_dump(),
        "native output": (await Agent(model, output_type=NativeOutput(Weather)).run(QUESTION)).output.model_dump(),
        "loop": (await agent.run(QUESTION)).output,
        "stream loop": streamed,
        "responses loop": (
            await Agent(OpenAIResponsesModel(MODEL, provider=provider), tools=[weather]).run(QUESTION)
        ).output,
        "ran": ran,
    }
    print(json.dumps(found))


asyncio.run(main())
