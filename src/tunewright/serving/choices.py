"""The answers to one HTTP request: a choice for each of its prompts, computed together and settled once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tunewright.generation.requests import Finish
from tunewright.serving.access import Admission, Target
from tunewright.serving.answering import Answering, Piece
from tunewright.serving.orders import SystemSource
from tunewright.serving.protocol import ApiError, Usage
from tunewright.serving.state.meter import Outcome, Used

_WORST_FIRST: tuple[Outcome, ...] = ("failed", "timed out", "hung up", "length", "stop")


class Choices:
    """An admitted request.

    Args:
        answering: one for each prompt, in the request's order.
        admission: covers all of them.
        at_once: the most prompts that wait for a turn or are computed at the same time.
        include_usage: whether a stream ends with its usage.
    """

    def __init__(self, answering: Sequence[Answering], admission: Admission, at_once: int, include_usage: bool) -> None:
        self.answering = tuple(answering)
        self.admission = admission
        self.include_usage = include_usage
        self._at_once = at_once
        self._settled = False

    @property
    def target(self) -> Target:
        """What answers all of them."""
        return self.answering[0].order.target

    @property
    def system_source(self) -> SystemSource:
        """Where the system message of all of them comes from."""
        return self.answering[0].order.system_source

    @property
    def tenant(self) -> str:
        """Whose turns it takes."""
        return self.answering[0].tenant

    @property
    def waits(self) -> bool:
        """True if no prompt has had its turn yet."""
        return all(answering.waits for answering in self.answering)

    @property
    def finished(self) -> bool:
        """True if each answer is whole, in its ``text``."""
        return all(answering.finished for answering in self.answering)

    def usage(self, tokens: int) -> Usage:
        """OpenAI's ``usage``, given the number of generated tokens."""
        return Usage(sum(len(answering.order.request.prompt_ids) for answering in self.answering), tokens)

    def abandon(self, error: ApiError) -> None:
        """End each answer once the text computed so far has been sent; the client receives the error."""
        for answering in self.answering:
            answering.abandon(error)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield the answers' text as it comes, each piece with its choice's index.

        Raises:
            RequestFailedError, EngineStoppedError, ApiError: of the first choice that has one; it ends all others.
        """
        if len(self.answering) == 1:  # the usual case: no task and no queue between
            async with aclosing(self.answering[0].pieces()) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        events: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()
        places = asyncio.Semaphore(self._at_once)

        async def compute(index: int, answering: Answering) -> None:
            async with places:
                if index >= self._at_once:
                    answering.wait_from_now()
                async with aclosing(answering.pieces()) as pieces:
                    async for piece in pieces:
                        events.put_nowait((index, piece))

        def on_end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                events.put_nowait(error)

        tasks = [asyncio.create_task(compute(*numbered)) for numbered in enumerate(self.answering)]
        for task in tasks:
            task.add_done_callback(on_end)
        unfinished = len(tasks)
        try:
            while unfinished:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                unfinished -= event[1].finish is not None
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answers(self) -> tuple[list[tuple[str, Finish]], Usage]:
        """Return each choice's text and why it ended, and the usage of all."""
        last: dict[int, Piece] = {}
        async for index, piece in self.pieces():
            last[index] = piece
        answers = []
        for index, answering in enumerate(self.answering):
            finish = last[index].finish
            assert finish is not None
            answers.append((answering.text, finish))
        return answers, self.usage(sum(piece.tokens for piece in last.values()))

    def settle(self) -> Used | None:
        """Report what the request used; the second and later calls report nothing and return None."""
        if self._settled:
            return None
        self._settled = True
        each = [answering.used() for answering in self.answering]
        outcomes = {used.outcome for used in each}
        used = Used(
            prompt_tokens=sum(used.prompt_tokens for used in each),
            completion_tokens=sum(used.completion_tokens for used in each),
            queued_s=min(used.queued_s for used in each),
            first_token_s=min((used.first_token_s for used in each if used.first_token_s is not None), default=None),
            total_s=max(used.total_s for used in each),
            outcome=next(outcome for outcome in _WORST_FIRST if outcome in outcomes),
        )
        self.admission.settle(used)
        return used
