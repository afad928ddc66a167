"""Lifecycle of an HTTP request: queue, stream, record usage exactly once; then its shadow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from tunewright.engines.protocol import Engine, EngineStoppedError, RequestFailedError
from tunewright.serving.gateway.auth import Admission, Shadow
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.fair_scheduler import AdmissionQueue
from tunewright.serving.gateway.preprocess import RequestPreprocessor
from tunewright.serving.gateway.request import GenerationRequest, TextChunk
from tunewright.serving.gateway.schemas import TokenUsage
from tunewright.serving.tenants.quota import Outcome, RequestUsage

_WORST_FIRST: tuple[Outcome, ...] = ("failed", "timed out", "disconnected", "length", "stop")


class RequestHandler:
    """Answers the prompts of one admitted HTTP request, each of them a choice of the response.

    All have the same tenant, adapter and origin of the system message. Their chunks share one queue, which is the only
    one between the engine and the response.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        admission: Admission,
        engine: Engine,
        queue: AdmissionQueue,
    ) -> None:
        self.requests = tuple(requests)
        self.admission = admission
        self._engine = engine
        self._queue = queue
        self._settled = False
        # From here on, so that an abort before the first chunk is not lost.
        self._events: asyncio.Queue[tuple[int, TextChunk | BaseException]] = asyncio.Queue()
        for index, request in enumerate(self.requests):
            request.emit_to(partial(self._emit, index))

    @property
    def waiting(self) -> bool:
        """True if no prompt has a slot at the engine yet."""
        return all(request.waiting for request in self.requests)

    @property
    def token_usage(self) -> TokenUsage:
        """Tokens of all prompts, and of the answers so far."""
        prompts = sum(request.prompt_tokens for request in self.requests)
        return TokenUsage(
            prompts,
            sum(request.tokens for request in self.requests),
            sum(request.thinking_tokens for request in self.requests),
        )

    def abort(self, error: ApiError) -> None:
        """End each unfinished answer after its computed text; the client receives the error."""
        for request in self.requests:
            request.fail(error)

    def _emit(self, index: int, event: TextChunk | BaseException) -> None:
        self._events.put_nowait((index, event))

    async def chunks(self) -> AsyncGenerator[tuple[int, TextChunk], None]:
        """Yield text as it is computed, each chunk with its choice's index; closing the generator aborts the rest."""
        places = asyncio.Semaphore(self._engine.max_num_seqs)

        async def generate(index: int, request: GenerationRequest) -> None:
            # A request with many prompts queues no more of them than the engine could compute at once.
            async with places:
                if index >= self._engine.max_num_seqs:
                    request.restart_queue_time()
                await request.generate(self._engine, self._queue)

        def report_crash(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._emit(0, error)

        tasks = [asyncio.create_task(generate(*numbered)) for numbered in enumerate(self.requests)]
        for task in tasks:
            task.add_done_callback(report_crash)
        unfinished = len(tasks)
        try:
            while unfinished:
                index, event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                unfinished -= event.finish is not None
                yield index, event
        finally:
            for task in tasks:
                task.cancel()

    async def complete(self) -> TokenUsage:
        """Compute all answers, which the requests then have, and return their usage."""
        async for _ in self.chunks():
            pass
        return self.token_usage

    def settle(self) -> RequestUsage | None:
        """Record the usage; later calls record nothing and return None."""
        if self._settled:
            return None
        self._settled = True
        each = [request.usage() for request in self.requests]
        outcomes = {usage.outcome for usage in each}
        usage = RequestUsage(
            prompt_tokens=sum(usage.prompt_tokens for usage in each),
            completion_tokens=sum(usage.completion_tokens for usage in each),
            queued_s=min(usage.queued_s for usage in each),
            first_token_s=min((usage.first_token_s for usage in each if usage.first_token_s is not None), default=None),
            total_s=max(usage.total_s for usage in each),
            outcome=next(outcome for outcome in _WORST_FIRST if outcome in outcomes),
        )
        self.admission.settle(usage)
        return usage


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
        if shadow is None or not all(request.finished for request in handler.requests):
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
        """Return the same request for the candidate, with the candidate's system prompt and constraint."""
        prompt, max_tokens = live.engine_request.prompt_ids, None
        target = shadow.target
        if live.target.system_prompt == target.system_prompt:
            max_tokens = live.prompt_tokens + live.engine_request.max_new_tokens
        else:
            # Requests with several prompts have no shadow.
            [prompt] = await self._preprocessor.prompts(live.body, _TENANT, target.system_prompt)
        now = asyncio.get_running_loop().time()
        return self._preprocessor.request(
            live.body,
            target,
            prompt,
            tenant=_TENANT,
            arrived=now,
            max_tokens=max_tokens,
            constraint=await self._preprocessor.constraint(live.body, target.grammar, _TENANT),
        )
