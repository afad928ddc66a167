"""LangChain with its defaults: chat, text, streams, batches, async; what it answers as one JSON document."""

import asyncio
import json
import sys
from typing import Any

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

URL, MODEL, QUESTION = sys.argv[1:]
KEY = SecretStr("none")
chat = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY)
text = OpenAI(model=MODEL, base_url=URL, api_key=KEY)


class Court(BaseModel):
    name: str


def refused(ask: Any) -> str | None:
    try:
        ask()
    except openai.APIStatusError as error:
        return f"{type(error).__name__} {error.param or error.code}"
    return None


async def asynchronous() -> dict[str, Any]:
    return {
        "ainvoke": (await chat.ainvoke(QUESTION)).content,
        "astream": "".join([chunk.text async for chunk in chat.astream(QUESTION)]),
        "abatch": [answer.content for answer in await chat.abatch([QUESTION] * 3)],
    }


answer = chat.invoke(QUESTION)
streamed = list(ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, stream_usage=True).stream(QUESTION))
turns = [SystemMessage("Be brief."), HumanMessage(QUESTION, name="ann"), AIMessage("Ravenna"), HumanMessage("And?")]
print(
    json.dumps(
        {
            "invoke": answer.content,
            "usage": [answer.usage_metadata, sum(streamed[1:], streamed[0]).usage_metadata],
            "finish": answer.response_metadata["finish_reason"],
            "stream": "".join(chunk.text for chunk in chat.stream(QUESTION)),
            "stream with usage": "".join(chunk.text for chunk in streamed),
            "batch": [answer.content for answer in chat.batch([QUESTION] * 3)],
            "conversation": chat.invoke(turns).content,
            "repeated": chat.invoke([HumanMessage(QUESTION), answer, HumanMessage("And?")]).content,
            **asyncio.run(asynchronous()),
            "text": text.invoke(QUESTION),
            "text stream": list(text.stream(QUESTION)),
            "text batch": text.batch([QUESTION] * 25),  # two requests: it puts twenty prompts into one
            "text usage": (text.generate([QUESTION, "x"]).llm_output or {})["token_usage"],
            "text temperature 0": OpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0).batch([QUESTION, "x"]),
            "refused": {
                "tools": refused(lambda: chat.bind_tools([Court]).invoke(QUESTION)),
                "n": refused(lambda: ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, n=17).invoke(QUESTION)),
                "embeddings": refused(
                    lambda: OpenAIEmbeddings(
                        model=MODEL, base_url=URL, api_key=KEY, check_embedding_ctx_length=False
                    ).embed_query("x")
                ),
            },
        }
    )
)
