"""Stands in for vLLM's API server where only its life and death matter: same options, same routes, no model.

It answers with the tokens 1, 2, 3, …; the prompt [66] kills it, [77] never ends, [88] kills what computes behind it
(vLLM's EngineCore), and [99] is not computed. Its gate is the real one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

DIE, ENDLESS, LOSE_CORE, FAIL = 66, 77, 88, 99
CORE_LOST = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def main(options: list[str]) -> None:
    """Serve on the socket of ``--uds``, as long as the file FAKE_VLLM names does not say otherwise."""
    orders = Path(os.environ["FAKE_ORDERS"])
    if orders.exists():
        sys.exit(orders.read_text())
    sys.path.insert(0, os.environ["PYTHONPATH"])
    import tunewright_vllm  # type: ignore[import-not-found]  # the child writes it

    tunewright_vllm.end_with_parent()
    seen: dict[str, Any] = {"options": options, "environment": dict(os.environ), "hung_up": 0, "evicted": []}
    lost = asyncio.Event()

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({}, 503 if lost.is_set() else 200)

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "base", "max_model_len": 512}]})

    async def metrics(_: Request) -> JSONResponse:
        return JSONResponse(seen)

    async def completions(http: Request) -> StreamingResponse | JSONResponse:
        body = await http.json()
        seen["body"] = body
        seen["traceparent"] = http.headers.get("traceparent")
        if (
            body["model"] != "base"
            and tunewright_vllm.listed(Path(os.environ[tunewright_vllm.MANIFEST]), body["model"]) is None
        ):
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if lost.is_set():
            return JSONResponse({"error": {"message": CORE_LOST}}, 500)
        state.openai_serving_models.lora_requests[body["model"]] = SimpleNamespace(lora_int_id=1)
        if not body.get("stream"):
            return await whole(body)
        return StreamingResponse(tokens(body), media_type="text/event-stream")

    async def whole(body: dict[str, Any]) -> JSONResponse:
        seen["at_once"] = seen.get("at_once", 0) + 1
        seen["most_at_once"] = max(seen.get("most_at_once", 0), seen["at_once"])
        ids: list[int] = []
        async for event in tokens(body):
            if "error" in event:
                return JSONResponse(json.loads(event.removeprefix("data: ")), 500)
            if "choices" in event:
                ids += json.loads(event.removeprefix("data: "))["choices"][0]["token_ids"]
        seen["at_once"] -= 1
        ends = [place for place, token in enumerate(ids) if token in body["stop_token_ids"]]
        choice = {"token_ids": ids, "finish_reason": "length", "prompt_token_ids": body["prompt"]}
        if ends:
            choice |= {"token_ids": ids[: ends[0] + 1], "finish_reason": "stop"}
        return JSONResponse({"choices": [choice]})

    async def tokens(body: dict[str, Any]) -> AsyncIterator[str]:
        for number in range(1, 10**6 if body["prompt"] == [ENDLESS] else body["max_tokens"] + 1):
            last = number == body["max_tokens"] and body["prompt"] != [ENDLESS]
            choice = {"token_ids": [number], "finish_reason": "length" if last else None}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            if body["prompt"] == [LOSE_CORE]:
                lost.set()
                asyncio.get_running_loop().call_later(1, os.kill, os.getpid(), signal.SIGKILL)
            if lost.is_set() or body["prompt"] == [FAIL]:
                yield f"data: {json.dumps({'error': {'message': CORE_LOST if lost.is_set() else 'not this one'}})}\n\n"
                return
            if body["prompt"] == [DIE]:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                await asyncio.sleep(float(os.environ.get("FAKE_TOKEN_SECONDS", "0.005")))
            except asyncio.CancelledError:
                seen["hung_up"] += 1
                raise
        yield "data: [DONE]\n\n"

    async def remove_lora(number: int) -> None:
        seen["evicted"].append(number)

    async def dangerous(_: Request) -> JSONResponse:
        return JSONResponse({"loaded": "anything"})

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/metrics", metrics),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/load_lora_adapter", dangerous, methods=["GET", "POST"]),
        Route("/adapters", dangerous, methods=["GET", "POST"]),
        Route("/invocations", dangerous, methods=["GET", "POST"]),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(tunewright_vllm.RouteFilter)])
    state = app.state
    locks = type("Locks", (dict,), {"__missing__": lambda _self, _key: asyncio.Lock()})()
    state.openai_serving_models = SimpleNamespace(lora_requests={}, lora_resolver_lock=locks)
    state.engine_client = SimpleNamespace(remove_lora=remove_lora)
    uvicorn.run(app, uds=options[options.index("--uds") + 1], log_level="warning")


if __name__ == "__main__":
    # python -m vllm.entrypoints.openai.api_server OPTIONS
    main(sys.argv[3:])
