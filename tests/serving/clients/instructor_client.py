"""Instructor with its defaults; what it reads as one JSON document."""

import asyncio
import json
from typing import Any

import instructor
from openai import AsyncOpenAI, OpenAI
from weather_tool import MODEL, QUESTION, URL, Weather

ASKED: Any = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}


async def asynchronous() -> Any:
    client: Any = instructor.from_openai(AsyncOpenAI(base_url=URL, api_key="none"))
    return (await client.chat.completions.create(response_model=Weather, **ASKED)).model_dump()


client: Any = instructor.from_openai(OpenAI(base_url=URL, api_key="none"))
provided: Any = instructor.from_provider(f"openai/{MODEL}", base_url=URL, api_key="none")
schema: Any = instructor.from_openai(OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
messages = ASKED["messages"]
print(
    json.dumps(
        {
            "create": client.chat.completions.create(response_model=Weather, **ASKED).model_dump(),
            "partial": list(client.chat.completions.create_partial(response_model=Weather, **ASKED))[-1].model_dump(),
            "provider": provided.create(response_model=Weather, messages=messages).model_dump(),
            "json schema": schema.create(response_model=Weather, **ASKED).model_dump(),
            "async": asyncio.run(asynchronous()),
        }
    )
)
