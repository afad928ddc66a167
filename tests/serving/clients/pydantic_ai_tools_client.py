"""Pydantic AI with functions and output types; what it reads and does as one JSON document."""

import asyncio
import json

from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from weather_tool import CALLING, MODEL, QUESTION, URL, Weather, ran, weather


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
