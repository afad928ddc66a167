"""The child process of a replica: the embedded engine behind a Unix socket, until its standard input is closed.

Usage: python -m tunewright.serving.engines.peft_worker SETTINGS, a JSON object: the fields of
:class:`tunewright.serving.engines.peft_child.PeftSettings`, ``socket``, and ``adapters``, a file with the folders of
adapters by digest. They are loaded before the socket answers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.core.errors import UserError
from tunewright.engines.parent import end_with_parent
from tunewright.engines.protocol import AdapterFailedError, Delta, EngineStoppedError, RequestFailedError, stream

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

    from tunewright.generation.constraints import Constraint, GrammarCompiler
    from tunewright.generation.requests import Request
    from tunewright.models.bases import Base
    from tunewright.serving.engines.peft import PeftEngine

METRICS = "peft:"
"""The prefix of the metrics that change with each pass over the model."""
_CONSTRAINTS = 32
_STOP_SECONDS = 1
"""The gateway ends the process when it wants no more answers."""
_JSON_LINES = "application/x-ndjson"

log = logging.getLogger("tunewright")


class Worker:
    """The engine, and its routes.

    Args:
        settings: see the module.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from tunewright.models.bases import Base

        self._settings = settings
        folder = Path(settings["base"])
        self._base: Base = Base(str(folder), folder, None, settings["architecture"], {})
        self._engine = self._start()
        self._constraint = lru_cache(_CONSTRAINTS)(self._compile)
        asyncio.run(self._load_listed())

    def serve(self) -> None:
        """Serve until the process ends."""
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/generate", self._generate, methods=["POST"]),
            Route("/load", self._load, methods=["POST"]),
            Route("/unload", self._unload, methods=["POST"]),
        ]
        uvicorn.run(
            Starlette(routes=routes),
            uds=self._settings["socket"],
            log_config=None,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_STOP_SECONDS,
        )

    def _start(self) -> PeftEngine:
        from tunewright.models.loading import load_model
        from tunewright.serving.engines.peft import PeftEngine

        settings = self._settings
        return PeftEngine(
            load_model(self._base, settings["dtype"], settings["quantization"]),
            stop_ids=settings["stop_ids"],
            pad_id=settings["pad_id"],
            max_num_seqs=settings["max_num_seqs"],
            context_length=settings["context_length"],
        )

    async def _load_listed(self) -> None:
        """Load the adapters that the child had before it restarted.

        Requests for one that cannot be loaded are refused.
        """
        listed = json.loads(Path(self._settings["adapters"]).read_text(encoding="utf-8"))
        for digest, folder in listed.items():
            try:
                await self._engine.load(digest, Path(folder))
            except (UserError, AdapterFailedError) as error:
                log.warning("failed to load the adapter %s again: %s", digest, error)

    async def _health(self, _http: HttpRequest) -> Response:
        """Report health; a stopped engine cannot start again, so the process ends and is started again."""
        from starlette.responses import Response

        if self._engine.stopped is not None:
            log.error("%s", self._engine.stopped)
            os._exit(1)
        return Response()

    async def _metrics(self, _http: HttpRequest) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(f"{METRICS}steps {self._engine.steps}\n")

    async def _generate(self, http: HttpRequest) -> Response:
        from starlette.responses import StreamingResponse

        return StreamingResponse(self._answer(json.loads(await http.body())), media_type=_JSON_LINES)

    async def _answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Yield one line for each delta; starlette closes the generator when the gateway disconnects."""
        try:
            request = await self._request(body)
            async with aclosing(stream(self._engine, request)) as deltas:
                async for delta in deltas:
                    yield _line(delta)
        except (UserError, RequestFailedError, EngineStoppedError) as error:
            yield json.dumps(_failure(error)) + "\n"
            if isinstance(error, EngineStoppedError):
                log.error("%s", error)
                # The gateway starts it again at once, and not at the next look at its health.
                asyncio.get_running_loop().call_later(0.1, os._exit, 1)

    async def _request(self, body: dict[str, Any]) -> Request:
        from tunewright.generation.requests import Request

        rule = body.pop("constraint")
        constraint = None if rule is None else await asyncio.to_thread(self._constraint, rule)
        body["prompt_ids"] = tuple(body["prompt_ids"])
        body["logit_bias"] = tuple((token, bias) for token, bias in body["logit_bias"])
        return Request(**body, constraint=constraint)

    def _compile(self, rule: str) -> Constraint:
        from tunewright.generation.constraints import Grammar

        return self._compiler.compile(Grammar(rule))

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        from tunewright.generation.constraints import GrammarCompiler
        from tunewright.models.loading import load_tokenizer

        before, after = self._settings["affixes"]
        return GrammarCompiler(load_tokenizer(self._base), self._settings["stop_ids"], (before, after))

    async def _load(self, http: HttpRequest) -> Response:
        body = json.loads(await http.body())
        return await self._change(self._engine.load(body["digest"], Path(body["folder"])))

    async def _unload(self, http: HttpRequest) -> Response:
        return await self._change(self._engine.unload(json.loads(await http.body())["digest"]))

    async def _change(self, change: Any) -> Response:
        from starlette.responses import JSONResponse

        try:
            await change
        except (UserError, AdapterFailedError, EngineStoppedError) as error:
            return JSONResponse(_failure(error))
        return JSONResponse({})


def _line(delta: Delta) -> str:
    logprobs = [[each.logprob, each.top] for each in delta.logprobs]
    return json.dumps({"ids": delta.ids, "finish": delta.finish, "logprobs": logprobs}) + "\n"


def _failure(error: Exception) -> dict[str, str | None]:
    if isinstance(error, UserError):
        return {"error": "UserError", **error.as_dict()}
    return {"error": type(error).__name__, "what": str(error)}


def main(text: str) -> None:
    """Serve with these settings, given as JSON."""
    end_with_parent()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    try:
        worker = Worker(json.loads(text))
    except UserError as error:
        sys.exit(str(error))
    worker.serve()


if __name__ == "__main__":
    main(sys.argv[1])
