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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.core.errors import UserError
from tunewright.core.processes import end_with_parent
from tunewright.engines.protocol import AdapterFailedError

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

    from tunewright.generation.constraints import GrammarCompiler
    from tunewright.models.bases import Base
    from tunewright.serving.engines.host import Event
    from tunewright.serving.engines.peft import PeftEngine

METRICS = "peft:"
"""The prefix of the metrics that change with each pass over the model."""
_STOP_SECONDS = 1
"""The gateway ends the process when it wants no more answers."""

log = logging.getLogger("tunewright")


class Worker:
    """The engine, and its routes.

    Args:
        settings: see the module.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from tunewright.models.bases import Base
        from tunewright.serving.engines.host import EngineHost

        self._settings = settings
        folder = Path(settings["base"])
        self._base: Base = Base(str(folder), folder, None, settings["architecture"], {})
        self._engine = self._start()
        self._host = EngineHost(self._engine, self._compiler)
        asyncio.run(self._load_listed())

    def serve(self) -> None:
        """Serve until the process ends."""
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/answer", self._events_of(self._host.answer), methods=["POST"]),
            Route("/load", self._events_of(self._host.load), methods=["POST"]),
            Route("/unload", self._events_of(self._host.unload), methods=["POST"]),
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

    def _compiler(self) -> GrammarCompiler:
        from tunewright.generation.constraints import GrammarCompiler
        from tunewright.models.loading import load_tokenizer

        before, after = self._settings["affixes"]
        return GrammarCompiler(load_tokenizer(self._base), self._settings["stop_ids"], (before, after))

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
            self._end()
        return Response()

    async def _metrics(self, _http: HttpRequest) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(f"{METRICS}steps {self._engine.steps}\n")

    def _events_of(self, method: Callable[[Event], AsyncGenerator[Event, None]]) -> Callable[[HttpRequest], Any]:
        """Return a route that answers with a line for each event; starlette ends it when the gateway disconnects."""
        from starlette.responses import StreamingResponse

        async def lines(body: Event) -> AsyncIterator[str]:
            async with aclosing(method(body)) as events:
                async for event in events:
                    yield json.dumps(event) + "\n"
            if self._engine.stopped is not None:
                # Soon, and not at the next look at its health; the last event has to be sent first.
                asyncio.get_running_loop().call_later(0.1, self._end)

        async def answer(http: HttpRequest) -> Response:
            return StreamingResponse(lines(json.loads(await http.body())), media_type="application/x-ndjson")

        return answer

    def _end(self) -> None:
        log.error("%s", self._engine.stopped)
        os._exit(1)


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
