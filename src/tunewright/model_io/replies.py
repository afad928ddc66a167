"""Answers of models, journalled as soon as they are complete, so that none is computed or paid for twice; budgets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tunewright.config import EndpointConfig
from tunewright.core.io import digest, writing

Asked = TypeVar("Asked")
Kept = TypeVar("Kept")

Message = dict[str, Any]
Conversation = tuple[Message, ...]

CHARACTERS_PER_TOKEN = 4
"""OpenAI's rule of thumb for English text, where the endpoint does not count tokens itself."""


def estimated_tokens(text: str) -> int:
    """Estimate the token count of ``text``."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class ChatRequest:
    """A conversation with parameters of its own, such as its functions.

    Equal requests are sent once. Requests that differ only in ``sample`` have the same body and are sent separately.
    """

    conversation: Conversation
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0

    @property
    def text(self) -> str:
        """Everything that counts as prompt tokens: contents, calls, and parameters such as functions."""
        parts = [str(message.get("content") or "") for message in self.conversation]
        parts += [json.dumps(message["tool_calls"]) for message in self.conversation if message.get("tool_calls")]
        parts += [json.dumps(dict(self.parameters), ensure_ascii=False)] if self.parameters else []
        return "".join(parts)


@dataclass(frozen=True)
class Reply:
    """The endpoint's answer to a conversation."""

    text: str
    finish: str | None
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    """The endpoint gave no token counts: they are guessed."""
    refused: str | None = None
    """Reason for refusing this one conversation; then there is no text, and the request is sent again."""
    tool_calls: tuple[Any, ...] = ()
    """Function calls, as the endpoint wrote them."""
    model: str | None = None
    """The model's version, as the endpoint named it in the reply."""
    seconds: float | None = None
    """Time from sending the request to its whole reply, without earlier tries. None: a journal of an older version."""
    when: str | None = None
    """UTC, ISO 8601."""


def cost(endpoint: EndpointConfig, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Return the price of these tokens, or None if no prices are given."""
    if endpoint.price_input is None or endpoint.price_output is None:
        return None
    return (prompt_tokens * endpoint.price_input + completion_tokens * endpoint.price_output) / 1e6


class Journal(Generic[Kept]):
    """A model's answers by the digest of the question, in a file that gets each answer as soon as it is complete.

    A repeated run finds them. A half-written line of a killed run is skipped, and its answer is asked again.

    Args:
        path: the file, which is named after everything else that decides the answers; None: answers are not written.
        parse: returns the key and the answer of a row; KeyError and TypeError: the row has another form.
        row: returns the row of an answer; None means that it is not written.
    """

    def __init__(
        self,
        path: Path | None,
        parse: Callable[[dict[str, Any]], tuple[str, Kept]],
        row: Callable[[str, Kept], dict[str, Any] | None],
    ) -> None:
        self.path = path
        self.answers: dict[str, Kept] = {}
        self._row = row
        for line in path.read_bytes().split(b"\n") if path and path.exists() else ():
            with suppress(KeyError, TypeError, ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    key, answer = parse(found)
                    self.answers[key] = answer

    def missing(self, wanted: Mapping[str, Asked]) -> dict[str, Asked]:
        """Return the keys that have no answer yet."""
        return {key: asked for key, asked in wanted.items() if key not in self.answers}

    @contextmanager
    def keeping(self) -> Iterator[Callable[[str, Kept], None]]:
        """Open the file, and provide a function that keeps an answer."""
        if self.path is None:
            yield self.answers.__setitem__
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")  # ends a half-written line, if there is one

                def keep(key: str, answer: Kept) -> None:
                    self.answers[key] = answer
                    row = self._row(key, answer)
                    if row is not None:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        file.flush()

                yield keep


class ReplyJournal(Journal[Reply]):
    """Replies of an endpoint by digests of what decides them: endpoint, model, parameters, conversation."""

    def __init__(self, folder: Path | None, endpoint: EndpointConfig) -> None:
        self._asked: dict[str, Any] = {
            "url": endpoint.base_url,
            "model": endpoint.model,
            "parameters": endpoint.parameters,
        }
        path = None if folder is None else folder / f"{digest(self._asked)[:16]}.jsonl"
        super().__init__(path, _parse_reply, _reply_row)

    def key(self, request: Conversation | ChatRequest) -> str:
        """Return the key of a reply to a request."""
        request = as_request(request)
        own: dict[str, Any] = {"own": dict(request.parameters)} if request.parameters else {}
        if request.sample:
            own["sample"] = request.sample
        return digest({**self._asked, **own, "messages": list(request.conversation)})


def as_request(request: Conversation | ChatRequest) -> ChatRequest:
    """Return the request; a bare conversation has no parameters of its own."""
    return request if isinstance(request, ChatRequest) else ChatRequest(request)


def _parse_reply(row: dict[str, Any]) -> tuple[str, Reply]:
    return row.pop("key"), Reply(**{**row, "tool_calls": tuple(row.get("tool_calls", ()))})


def _reply_row(key: str, reply: Reply) -> dict[str, Any] | None:
    # An endpoint may change its mind about a refusal.
    return {"key": key, **asdict(reply)} if reply.refused is None else None


class OutOfBudgetError(Exception):
    """One more request might exceed the remaining budget."""


class Budget:
    """A budget that is never overdrawn: each request reserves its maximum cost before it is sent.

    ``budget`` is in the currency of the prices (None: no cap), and ``where`` is the config key that states it.
    """

    def __init__(self, budget: float | None, where: str) -> None:
        self.budget = budget
        self.where = where
        self.spent = 0.0
        self._reserved = 0.0
        self._under_way = 0
        self._freed: asyncio.Event | None = None

    def pay(self, amount: float) -> None:
        """Count a reply's cost; the budget never grows, not even by a journal that was edited."""
        self.spent += max(amount, 0.0)

    @asynccontextmanager
    async def reserved(self, most: float) -> AsyncIterator[None]:
        """Reserve ``most``, waiting if needed for requests in flight, which may cost less than they reserved.

        Raises:
            OutOfBudgetError: no request is in flight, and ``most`` exceeds the remaining budget.
        """
        while self.budget is not None and self.spent + self._reserved + most > self.budget:
            if not self._under_way:
                raise OutOfBudgetError(
                    f"The budget of {self.budget:g} is used up: {self.spent:.4f} is spent, and the next request may "
                    f"cost {most:.4f}"
                )
            self._freed = self._freed or asyncio.Event()
            await self._freed.wait()
        self._reserved += most
        self._under_way += 1
        try:
            yield
        finally:
            self._reserved -= most
            self._under_way -= 1
            if self._freed is not None:
                self._freed.set()
                self._freed = None
