"""Sixty requests for the base, an adapter and its checkpoint: sent at once, then one by one.

    python benchmarks/serve_together.py build/demo      (a project after the pipeline)

Prints the time of each and the number of equal answers, as a readable line and a JSON line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import openai

import tunewright
from tunewright.adapters.registry import find_adapter
from tunewright.serving.options import ServeOptions

ITEMS = 20


def main(project: str) -> None:
    """Serve the newest adapter and send the requests."""
    opened = tunewright.open(project)
    adapter = find_adapter(opened.folder.adapters)
    earlier = [f"{adapter.name}@{step}" for step in list(adapter.checkpoints)[:1]]
    service = opened.serve([adapter.name, *earlier], ServeOptions(port=0))
    prompts = [m.example.prompt for m in opened.data.version().examples("test")[:ITEMS]]
    jobs = [
        (model, [{"role": m.role, "content": m.content} for m in prompt])
        for prompt in prompts
        for model in service.models
    ]
    with service.running() as url:
        together, together_s, alone, alone_s = asyncio.run(_ask_twice(url, jobs))
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    print(
        f"{len(jobs)} requests: {together_s:.1f} s at once, {alone_s:.1f} s one by one ({alone_s / together_s:.1f}x), "
        f"{same} answers the same in {opened.folder.config.train.dtype}"
    )
    print(json.dumps({"requests": len(jobs), "together_s": together_s, "alone_s": alone_s, "same": same}))


async def _ask_twice(
    url: str, jobs: list[tuple[str, list[dict[str, str]]]]
) -> tuple[list[str], float, list[str], float]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)

    async def ask(model: str, messages: list[dict[str, str]]) -> str:
        reply = await client.chat.completions.create(model=model, messages=messages, max_tokens=23)  # type: ignore[arg-type]
        return reply.choices[0].message.content or ""

    began = time.perf_counter()
    together = list(await asyncio.gather(*(ask(model, messages) for model, messages in jobs)))
    middle = time.perf_counter()
    alone = [await ask(model, messages) for model, messages in jobs]
    return together, middle - began, alone, time.perf_counter() - middle


if __name__ == "__main__":
    main(sys.argv[1])
