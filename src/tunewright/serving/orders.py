"""From a request to what an engine is asked: rendered to token ids, and no larger than the gateway takes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from tunewright.config import GatewayConfig
from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.generation.requests import Request
from tunewright.generation.text_stream import Decode
from tunewright.serving.access import Target
from tunewright.serving.fairness import FairQueue
from tunewright.serving.protocol import AnyRequest, ApiError, ChatRequest

Ids = tuple[int, ...]

_BYTES_PER_TOKEN = 16
_SPARE_BYTES = 64 << 10
_AT_ONCE = 4096
"""Characters that are rendered within about a millisecond."""


SystemSource = Literal["adapter", "request", "none"]
"""Where the system message of a request comes from: the prompt that its adapter was trained with, or itself."""


@dataclass(frozen=True)
class Texts:
    """How text becomes token ids and token ids text, on one base.

    Args:
        render: from messages to prompt ids with the base's chat template: the function that training uses. A UserError
            from it is answered with 400.
        continuation: from text to go on from to its ids, without the template. A UserError from it, too.
        decode: from answer ids to text, special tokens left out.
        stops: texts that end every answer to messages, beside those that a request names.
    """

    render: Callable[[Sequence[Message]], Ids]
    continuation: Callable[[str], Ids]
    decode: Decode
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """A prompt of a request that has passed all checks."""

    asked: AnyRequest
    target: Target
    request: Request
    stops: tuple[str, ...]

    @property
    def system_source(self) -> SystemSource:
        """Where its system message comes from."""
        return system_source(self.asked, self.target.system_prompt)


class Orders:
    """Makes orders of requests.

    Args:
        context: the most tokens that prompt and answer may have together.
    """

    def __init__(self, texts: Texts, limits: GatewayConfig, context: int) -> None:
        self._texts = texts
        self._limits = limits
        self._context = context
        self.body_bytes = limits.max_body_bytes or _BYTES_PER_TOKEN * context + _SPARE_BYTES
        # Half a second for a long prompt: beside the event loop, or everybody's answers would pause. One thread, since
        # tokenizers are not made for several; and tenants in turn, so that nobody waits for another's many prompts.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunewright-render")
        self._turns = FairQueue(1)
        # Prompts come one by one: to hand one to the tokenizer's own threads takes longer than it does itself.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    async def prompts(self, asked: AnyRequest, whose: str, system_prompt: str | None) -> list[Ids]:
        """Return the token ids of the request's prompts.

        Args:
            asked: the request.
            whose: whose turn it waits for.
            system_prompt: put first where the messages have no system message; None: nothing is.

        Raises:
            ApiError: 400, the template refuses the messages, or there are too many.
        """
        if isinstance(asked, ChatRequest) and len(asked.messages) > self._limits.max_messages:
            message = f"There are {len(asked.messages)} messages, and at most {self._limits.max_messages} are taken."
            raise ApiError(message, param="messages", code="too_many_messages")
        try:
            # A change of threads takes longer than a short prompt does.
            characters = _characters(asked) + len(system_prompt or "")
            if self._turns.idle and characters <= _AT_ONCE:
                return self._ids(asked, system_prompt)
            async with self._turns.place(whose, characters):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._ids, asked, system_prompt)
        except UserError as error:
            subject = _subject(asked)
            raise ApiError(str(error), param=subject, code=f"invalid_{subject}") from error

    def order(self, asked: AnyRequest, target: Target, prompt: Ids, most_tokens: int | None = None) -> Order:
        """Return what the engine is asked for one of the prompts.

        A ``max_tokens`` above what is left of the context, or above ``gateway.max_completion_tokens``, is capped: an
        answer that ends there says so by its ``finish_reason``, "length". Without ``max_tokens``, prompt and answer
        together have at most ``most_tokens``, so that a request with the defaults of an SDK stays within its tenant's
        limit.

        Raises:
            ApiError: 400, the prompt is too long.
        """
        included = ""
        if system_source(asked, target.system_prompt) == "adapter":
            included = " with the system prompt that the adapter was trained with"
        if (most := self._limits.max_prompt_tokens) is not None and len(prompt) > most:
            message = f"The prompt has {len(prompt)} tokens{included}, and at most {most} are taken."
            raise ApiError(message, param=_subject(asked), code="prompt_too_long")
        room = self._context - len(prompt)
        if room < 1:
            message = f"The context has room for {self._context} tokens; the prompt alone has {len(prompt)}{included}."
            raise ApiError(message, param=_subject(asked), code="context_length_exceeded")
        limit = min(room, self._limits.max_completion_tokens or room, asked.token_limit or asked.usual_tokens or room)
        if asked.token_limit is None and most_tokens is not None:
            limit = min(limit, max(1, most_tokens - len(prompt)))
        request = Request(
            prompt,
            target.digest,
            max_new_tokens=limit,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
        )
        stops = self._texts.stops if isinstance(asked, ChatRequest) else ()
        return Order(asked, target, request, (*stops, *(asked.stop or ())))

    def _ids(self, asked: AnyRequest, system_prompt: str | None) -> list[Ids]:
        if isinstance(asked, ChatRequest):
            messages = asked.turns
            if system_prompt is not None and system_source(asked, system_prompt) == "adapter":
                messages.insert(0, Message("system", system_prompt))
            return [self._texts.render(messages)]
        return [self._texts.continuation(text) for text in asked.texts]


def system_source(asked: AnyRequest, system_prompt: str | None) -> SystemSource:
    """Where a request's system message comes from, if its adapter was trained with ``system_prompt``.

    Text to go on from has no messages: nothing is put before it.
    """
    if not isinstance(asked, ChatRequest):
        return "none"
    if any(message.role == "system" for message in asked.messages):
        return "request"
    return "none" if system_prompt is None else "adapter"


def _subject(asked: AnyRequest) -> str:
    return "messages" if isinstance(asked, ChatRequest) else "prompt"


def _characters(asked: AnyRequest) -> int:
    if isinstance(asked, ChatRequest):
        return sum(len(part.text) for message in asked.messages for part in message.content)
    return sum(map(len, asked.prompt))
