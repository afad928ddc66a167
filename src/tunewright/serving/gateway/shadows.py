"""Shadow candidates: adapters that get the same prompts after the live answer, and whose answers are only recorded."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tunewright.engines.protocol import Engine, EngineStoppedError, RequestFailedError
from tunewright.serving.gateway.admission import AdmissionQueue
from tunewright.serving.gateway.auth import Admission, Shadow
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.preprocess import RequestPreprocessor
from tunewright.serving.gateway.request import GenerationRequest
from tunewright.serving.gateway.request_handler import RequestHandler

MAX_CONCURRENT = 4
"""While this many shadow requests run, further ones are skipped, and the record says so."""

_TENANT = " shadows"
"""All shadow requests together count as one tenant in the queue. No real tenant can have this name."""


class Shadows:
    """Runs shadow requests, a few at once; their errors are recorded and affect nothing else."""

    def __init__(self, engine: Engine, queue: AdmissionQueue, preprocessor: RequestPreprocessor) -> None:
        self._engine = engine
        self._queue = queue
        self._preprocessor = preprocessor
        self._running: set[asyncio.Task[None]] = set()

    def start(self, handler: RequestHandler) -> None:
        """Start the shadow of a finished request, if its alias has a candidate in the shadow."""
        shadow = handler.admission.shadow
        if shadow is None or not handler.finished:
            return
        live, *more = handler.requests
        if more:  # the record has room for one answer per request
            texts = "\n\n".join(request.recorded for request in handler.requests)
            shadow.record(texts, None, f"the request had {len(handler.requests)} answers")
        elif len(self._running) >= MAX_CONCURRENT:
            shadow.record(live.recorded, None, f"{MAX_CONCURRENT} other shadow requests were running")
        elif not shadow.acquire():
            shadow.record(live.recorded, None, "the candidate was unloaded")
        else:
            task = asyncio.create_task(self._run(live, shadow))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancel the running shadow requests."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self, live: GenerationRequest, shadow: Shadow) -> None:
        why_not: str | None = None
        answer: str | None = None
        try:
            request = await self._request(live, shadow)
            handler = RequestHandler([request], Admission(settle=lambda _usage: None), self._engine, self._queue)
            async for _chunk in handler.chunks():
                pass
            answer = request.recorded
        except asyncio.CancelledError:
            why_not = "the server stopped"
        except (ApiError, RequestFailedError, EngineStoppedError) as error:
            why_not = str(error)
        finally:
            shadow.record(live.recorded, answer, why_not)
            shadow.release()

    async def _request(self, live: GenerationRequest, shadow: Shadow) -> GenerationRequest:
        """Return the same request for the candidate, with the system prompt that the candidate was trained with.

        Raises:
            ApiError: its prompt is too long.
        """
        prompt, max_tokens = live.engine_request.prompt_ids, None
        if live.target.system_prompt == shadow.system_prompt:
            max_tokens = live.prompt_tokens + live.engine_request.max_new_tokens
        else:
            # Requests with several prompts have no shadow.
            [prompt] = await self._preprocessor.prompts(live.body, _TENANT, shadow.system_prompt)
        target = replace(live.target, digest=shadow.digest, system_prompt=shadow.system_prompt)
        now = asyncio.get_running_loop().time()
        return self._preprocessor.request(
            live.body,
            target,
            prompt,
            tenant=_TENANT,
            arrived=now,
            max_tokens=max_tokens,
            constraint=live.engine_request.constraint,
        )
