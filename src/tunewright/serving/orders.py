"""From a request to what an engine is asked: rendered to token ids, and no larger than the gateway takes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tunewright.data.examples import Message
from tunewright.errors import UserError
from tunewright.models.requests import Request
from tunewright.models.text_stream import Decode
from tunewright.recipe import GatewayRecipe
from tunewright.serving.access import Target
from tunewright.serving.fairness import FairQueue
from tunewright.serving.protocol import AnyRequest, ApiError, ChatRequest

Ids = tuple[int, ...]

_BYTES_PER_TOKEN = 16
_SPARE_BYTES = 64 << 10
_AT_ONCE = 4096
"""Characters that are rendered within about a millisecond."""


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

    target: Target
    request: Request
    stops: tuple[str, ...]


class Orders:
    """Makes orders of requests.

    Args:
        context: the most tokens that prompt and answer may have together.
    """

    def __init__(self, texts: Texts, limits: GatewayRecipe, context: int) -> None:
        self._texts = texts
        self._limits = limits
        self._context = context
        self.body_bytes = limits.body_bytes or _BYTES_PER_TOKEN * context + _SPARE_BYTES
        # Half a second for a long prompt: beside the event loop, or everybody's answers would pause. One thread, since
        # tokenizers are not made for several; and tenants in turn, so that nobody waits for another's many prompts.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunewright-render")
        self._turns = FairQueue(1)
        # Prompts come one by one: to hand one to the tokenizer's own threads takes longer than it does itself.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    async def prompts(self, asked: AnyRequest, whose: str) -> list[Ids]:
        """Return the token ids of the request's prompts.

        Raises:
            ApiError: 400, the template refuses the messages, or there are too many.
        """
        if isinstance(asked, ChatRequest) and len(asked.messages) > self._limits.messages:
            message = f"There are {len(asked.messages)} messages, and at most {self._limits.messages} are taken."
            raise ApiError(message, param="messages", code="too_many_messages")
        try:
            # A change of threads takes longer than a short prompt does.
            if self._turns.idle and _characters(asked) <= _AT_ONCE:
                return self._ids(asked)
            async with self._turns.place(whose, _characters(asked)):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._ids, asked)
        except UserError as error:
            subject = _subject(asked)
            raise ApiError(str(error), param=subject, code=f"invalid_{subject}") from error

    def order(self, asked: AnyRequest, target: Target, prompt: Ids) -> Order:
        """Return what the engine is asked for one of the prompts.

        A ``max_tokens`` above what is left of the context, or above ``gateway.answer_tokens``, is capped: an answer
        that ends there says so by its ``finish_reason``, "length".

        Raises:
            ApiError: 400, the prompt is too long.
        """
        if (most := self._limits.prompt_tokens) is not None and len(prompt) > most:
            message = f"The prompt has {len(prompt)} tokens, and at most {most} are taken."
            raise ApiError(message, param=_subject(asked), code="prompt_too_long")
        room = self._context - len(prompt)
        if room < 1:
            message = f"The context has room for {self._context} tokens, and the prompt alone has {len(prompt)}."
            raise ApiError(message, param=_subject(asked), code="context_length_exceeded")
        limit = min(room, self._limits.answer_tokens or room, asked.token_limit or asked.usual_tokens or room)
        request = Request(
            prompt,
            target.digest,
            max_new_tokens=limit,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
        )
        stops = self._texts.stops if isinstance(asked, ChatRequest) else ()
        return Order(target, request, (*stops, *(asked.stop or ())))

    def _ids(self, asked: AnyRequest) -> list[Ids]:
        if isinstance(asked, ChatRequest):
            return [self._texts.render(asked.turns)]
        return [self._texts.continuation(text) for text in asked.texts]


def _subject(asked: AnyRequest) -> str:
    return "messages" if isinstance(asked, ChatRequest) else "prompt"


def _characters(asked: AnyRequest) -> int:
    if isinstance(asked, ChatRequest):
        return sum(len(part.text) for message in asked.messages for part in message.content)
    return sum(map(len, asked.prompt))
