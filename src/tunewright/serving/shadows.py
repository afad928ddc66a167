"""Candidates in the shadow: asked what the alias was asked, after its answer was given, and recorded only."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tunewright.config import GatewayConfig
from tunewright.engines.protocol import Engine, EngineStoppedError, RequestFailedError
from tunewright.generation.text_stream import Decode
from tunewright.serving.access import Shadow
from tunewright.serving.answering import Answering
from tunewright.serving.choices import Choices
from tunewright.serving.fairness import FairQueue
from tunewright.serving.orders import Order, Orders
from tunewright.serving.protocol import ApiError

AT_ONCE = 4
"""Further requests are not asked of the shadow while so many are; the record says so."""

_TURN = " shadows"
"""In the fair queue all shadows together have the turn of one tenant; no tenant can be called so."""


class Shadows:
    """Asks candidates, a few at once; what goes wrong there goes wrong there only."""

    def __init__(self, engine: Engine, queue: FairQueue, orders: Orders, decode: Decode, limits: GatewayConfig) -> None:
        self._engine = engine
        self._queue = queue
        self._orders = orders
        self._decode = decode
        self._limits = limits
        self._asking: set[asyncio.Task[None]] = set()

    def ask(self, choices: Choices) -> None:
        """Ask the candidate of a request that has its answer, if it has a candidate and an answer."""
        shadow = choices.admission.shadow
        if shadow is None or not choices.finished:
            return
        answered, *more = choices.answering
        if more:  # the record has one answer for each request
            texts = "\n\n".join(answering.text for answering in choices.answering)
            shadow.record(texts, None, f"the request had {len(choices.answering)} prompts")
        elif len(self._asking) >= AT_ONCE:
            shadow.record(answered.text, None, f"{AT_ONCE} others were being asked")
        elif not shadow.hold():
            shadow.record(answered.text, None, "the candidate had been let go")
        else:
            task = asyncio.create_task(self._ask(answered, shadow))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def close(self) -> None:
        """Give up what is being asked."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _ask(self, answered: Answering, shadow: Shadow) -> None:
        why: str | None = None
        said: str | None = None
        try:
            order = await self._order(answered.order, shadow)
            now = asyncio.get_running_loop().time()
            asked = Answering(self._engine, self._queue, self._decode, order, self._limits, _TURN, now)
            async for _piece in asked.pieces():
                pass
            said = asked.text
        except asyncio.CancelledError:
            why = "the server ended"
        except (ApiError, RequestFailedError, EngineStoppedError) as error:
            why = str(error)
        finally:
            shadow.record(answered.text, said, why)
            shadow.let_go()

    async def _order(self, answered: Order, shadow: Shadow) -> Order:
        """Return the same of the candidate, with the system prompt that it was trained with.

        Raises:
            ApiError: its prompt is longer than is taken.
        """
        if answered.target.system_prompt == shadow.system_prompt:
            return replace(answered, request=replace(answered.request, adapter=shadow.digest))
        target = replace(answered.target, digest=shadow.digest, system_prompt=shadow.system_prompt)
        # A request with several prompts is not asked of a shadow.
        [prompt] = await self._orders.prompts(answered.asked, _TURN, shadow.system_prompt)
        return self._orders.order(answered.asked, target, prompt)
