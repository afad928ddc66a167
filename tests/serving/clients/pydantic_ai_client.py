"""Pydantic AI with its defaults: runs, streams, history, instructions; what it answers as one JSON document."""

import asyncio
import json
import sys

from pydantic_ai import Agent, ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL, QUESTION = sys.argv[1:]
model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))


async def main() -> None:
    agent = Agent(model)
    first = await agent.run(QUESTION)
    async with agent.run_stream(QUESTION) as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    directed = Agent(model, system_prompt="You know courts.", instructions="Be brief.")
    try:
        await Agent(model, output_type=int).run(QUESTION)
        refused = None
    except ModelHTTPError as error:
        refused = error.body
    answers = {
        "run": first.output,
        "usage": [first.usage.input_tokens, first.usage.output_tokens],
        "stream": "".join(pieces),
        "pieces": len(pieces),
        "stream usage": [stream.usage.input_tokens, stream.usage.output_tokens],
        "history": (await agent.run("And?", message_history=first.all_messages())).output,
        "directed": (await directed.run(QUESTION)).output,
        "at once": [result.output for result in await asyncio.gather(*(agent.run(QUESTION) for _ in range(3)))],
        "refused": refused,
    }
    print(json.dumps(answers))


asyncio.run(main())
