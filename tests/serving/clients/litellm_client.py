"""LiteLLM with its defaults: chat, text, streams, async, history; what it answers as one JSON document."""

import asyncio
import json
import sys
from typing import Any

import litellm

URL, MODEL, QUESTION = sys.argv[1:]
TURNS: Any = [{"role": "user", "content": QUESTION}]
HOW: Any = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none"}


def refused(ask: Any) -> str | None:
    try:
        ask()
    except litellm.exceptions.BadRequestError as error:
        return f"{type(error).__name__} {error.status_code}"
    return None


async def asynchronous() -> str:
    answer: Any = await litellm.acompletion(messages=TURNS, **HOW)
    return str(answer.choices[0].message.content)


answer: Any = litellm.completion(messages=TURNS, **HOW)
stream: Any = litellm.completion(messages=TURNS, stream=True, **HOW)
history = [*TURNS, answer.choices[0].message, {"role": "user", "content": "And?"}]
text: Any = litellm.text_completion(prompt=QUESTION, **{**HOW, "model": f"text-completion-openai/{MODEL}"})
print(
    json.dumps(
        {
            "create": answer.choices[0].message.content,
            "usage": [answer.usage.prompt_tokens, answer.usage.completion_tokens],
            "finish": answer.choices[0].finish_reason,
            "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
            "async": asyncio.run(asynchronous()),
            "repeated": litellm.completion(messages=history, **HOW).choices[0].message.content,
            "response": litellm.responses(input=QUESTION, **HOW).output_text,
            "text": text.choices[0].text,
            "refused": refused(lambda: litellm.completion(messages=TURNS, n=17, **HOW)),
        }
    )
)
