"""LlamaIndex with its defaults, as chat and as text; what it answers as one JSON document."""

import asyncio
import json
import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

URL, MODEL, QUESTION = sys.argv[1:]


def model(**more: Any) -> OpenAILike:
    return OpenAILike(model=MODEL, api_base=URL, api_key="none", **more)


async def asynchronous(llm: OpenAILike) -> dict[str, Any]:
    streamed = await llm.astream_complete(QUESTION)
    return {
        "acomplete": (await llm.acomplete(QUESTION)).text,
        "astream": "".join([answer.delta or "" async for answer in streamed]),
    }


def answers(llm: OpenAILike) -> dict[str, Any]:
    turns = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=QUESTION)]
    answer = llm.chat(turns)
    return {
        "complete": llm.complete(QUESTION).text,
        "stream": "".join(answer.delta or "" for answer in llm.stream_complete(QUESTION)),
        "chat": answer.message.content,
        "chat stream": "".join(answer.delta or "" for answer in llm.stream_chat(turns)),
        "repeated": llm.chat([*turns, answer.message, ChatMessage(role="user", content="And?")]).message.content,
    }


async def main() -> None:
    found = {
        "defaults": answers(model(is_chat_model=True)),
        "chat": answers(model(is_chat_model=True, temperature=0)),
        "text": answers(model(temperature=0)),
        "async": await asynchronous(model(is_chat_model=True, temperature=0)),
    }
    print(json.dumps(found))


asyncio.run(main())
