"""OpenAI's Python SDK with its defaults: what it answers and raises as one JSON document."""

import asyncio
import json
import sys
from typing import Any

import openai

URL, MODEL, QUESTION = sys.argv[1:]
TURNS: Any = [{"role": "user", "content": QUESTION}]
client: Any = openai.OpenAI(base_url=URL, api_key="none")


def raised(ask: Any) -> str | None:
    try:
        ask()
    except openai.APIStatusError as error:
        return f"{type(error).__name__} {error.code} {error.param}"
    return None


async def asynchronous() -> list[str]:
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as other:
        create: Any = other.chat.completions.create
        answers = await asyncio.gather(*(create(model=MODEL, messages=TURNS) for _ in range(3)))
    return [answer.choices[0].message.content for answer in answers]


create = client.chat.completions.create
answer = create(model=MODEL, messages=TURNS)
chunks = list(create(model=MODEL, messages=TURNS, stream=True, stream_options={"include_usage": True}))
with client.chat.completions.stream(model=MODEL, messages=TURNS) as events:
    final = events.get_final_completion()
# As applications keep it: the whole message, its null fields included.
repeated = [*TURNS, answer.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
texts = client.completions.create(model=MODEL, prompt=[QUESTION, "x"])
print(
    json.dumps(
        {
            "version": openai.__version__,
            "create": answer.choices[0].message.content,
            "usage": [answer.usage.model_dump(exclude_none=True), chunks[-1].usage.model_dump(exclude_none=True)],
            "stream": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices),
            "stream helper": final.choices[0].message.content,
            "parse": client.chat.completions.parse(model=MODEL, messages=TURNS).choices[0].message.content,
            "async": asyncio.run(asynchronous()),
            "repeated": create(model=MODEL, messages=repeated).choices[0].message.content,
            "labels": create(
                model=MODEL,
                messages=[{"role": "developer", "content": "Be brief."}, TURNS[0] | {"name": "ann"}],
                user="ann",
                safety_identifier="5f2e",
                prompt_cache_key="courts",
                metadata={"team": "courts"},
                store=True,
                service_tier="auto",
                parallel_tool_calls=True,
            )
            .choices[0]
            .message.content,
            "response": client.responses.create(model=MODEL, input=QUESTION).output_text,
            "choices": [choice.message.content for choice in create(model=MODEL, messages=TURNS, n=2).choices],
            "texts": [[choice.index, choice.text] for choice in texts.choices],
            "texts usage": texts.usage.model_dump(exclude_none=True),
            "models": [model.id for model in client.models.list()],
            "model": client.models.retrieve(MODEL).id,
            "raised": {
                "embeddings": raised(lambda: client.embeddings.create(model=MODEL, input="x")),
                "model": raised(lambda: create(model="other", messages=TURNS)),
                "retrieve": raised(lambda: client.models.retrieve("other")),
                "tools": raised(
                    lambda: create(model=MODEL, messages=TURNS, tools=[{"type": "function", "function": {"name": "f"}}])
                ),
                "n": raised(lambda: create(model=MODEL, messages=TURNS, n=17)),
                "verbosity": raised(lambda: create(model=MODEL, messages=TURNS, verbosity="low")),
                "long": raised(lambda: create(model=MODEL, messages=[{"role": "user", "content": "x" * 2000}])),
            },
        }
    )
)
client.close()
