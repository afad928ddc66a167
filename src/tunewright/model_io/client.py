"""A client for an OpenAI-compatible endpoint with concurrent requests, rate limits, retries and a budget.

It uses httpx rather than OpenAI's client, which retries silently. A retry has to count against the rate limit and be
reported to the user.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
from aiolimiter import AsyncLimiter

from tunewright.config import EndpointConfig
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.interrupts import run_async
from tunewright.core.progress import Reporter, Task
from tunewright.core.strict_json import require_shallow
from tunewright.model_io.replies import (
    Budget,
    ChatRequest,
    Conversation,
    OutOfBudgetError,
    Reply,
    ReplyJournal,
    as_request,
    cost,
    estimated_tokens,
)

LONGEST_WAIT = 600.0
"""Seconds; an endpoint that asks for a longer wait (a daily quota) ends the run, which can be resumed later."""

MAX_REPLY = 16 << 20
"""Decoded bytes of a reply."""
MAX_TOKENS = 10_000_000
"""Maximum tokens of a prompt or an answer, as a reply counts them; no model's context is longer."""
_MOST_LEVELS = 64  # nesting limit of values in function calls

_FIRST_WAIT, _MOST_WAIT = 1.0, 60.0
_TEMPLATE_TOKENS = 64
_TRANSIENT = {408, 409, 429}
_KEPT = "Finished answers are kept: the same command resumes from there."
_TOO_LONG = re.compile(r"context_length|context.{0,20}(length|size|window)|too long", re.IGNORECASE | re.DOTALL)
_FILTERED = re.compile(r"content_filter|content_policy|content management policy", re.IGNORECASE)


class _RequestError(Exception):
    """A failed request; ``status`` is None if no reply came."""

    def __init__(self, what: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.status = status
        self.retry_after = retry_after

    @property
    def transient(self) -> bool:
        """True if the same request may succeed later."""
        return self.status is None or self.status in _TRANSIENT or self.status >= 500


class _Failure:
    """The first failure, which stops all workers."""

    def __init__(self) -> None:
        self.error: UserError | None = None
        self._happened = asyncio.Event()

    def __bool__(self) -> bool:
        return self.error is not None

    def report(self, error: UserError) -> None:
        """Keep the first error and wake all workers that wait to retry."""
        self.error = self.error or error
        self._happened.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or a failure is reported."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._happened.wait(), seconds)


@dataclass(frozen=True)
class EndpointUsage:
    """Calls and tokens of a run; ``cost`` is None without prices, and 0 for a model on this machine."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Calls:
    """The calls of a run before it is started; tokens are guessed from characters (4 each).

    ``known`` calls have a kept answer. The other numbers are of the calls still to make; None: no limit on replies, or
    no prices.
    """

    calls: int
    known: int
    prompt_tokens: int
    most_completion_tokens: int | None
    most_cost: float | None


def limits_text(most_completion_tokens: int | None, most_cost: float | None) -> tuple[str, str]:
    """Return the limits of the replies and of their cost in words."""
    replies = "no limit on replies is set"
    if most_completion_tokens is not None:
        replies = f"at most {most_completion_tokens:,} reply tokens"
    return replies, "unknown" if most_cost is None else f"at most about {most_cost:.2f}"


class Endpoint:
    """A model behind an endpoint.

    ``where`` is its section of the config, for messages. Several endpoints may share the budget ``purse``. Replies are
    kept in ``folder``; None: they are not written.
    """

    def __init__(
        self, config: EndpointConfig, where: str, folder: Path | None, purse: Budget, reporter: Reporter
    ) -> None:
        self.config = config
        self.where = where
        self.journal = ReplyJournal(folder, config)
        self.used: dict[str, Reply] = {}
        self._purse = purse
        self._reporter = reporter
        self._key: str | None = None
        self._retried: Counter[str] = Counter()

    def ask(
        self,
        title: str,
        requests: Sequence[Conversation | ChatRequest],
        taken: Callable[[str, Reply], None] = lambda _key, _reply: None,
    ) -> list[Reply]:
        """Return replies in the requests' order; equal requests are asked once.

        ``taken`` is called with the journal's key and the reply as soon as each new reply is complete.
        """
        keys = [self.journal.key(request) for request in requests]
        wanted = dict(zip(keys, map(as_request, requests), strict=True))
        missing = self.journal.missing(wanted)
        for key in wanted.keys() - missing.keys() - self.used.keys():
            self._use(key)
        if missing:
            self._key = _secret(self.config, self.where)
            self._retried.clear()
            with self._reporter.task(title, len(wanted), "replies") as task:
                if len(missing) < len(wanted):
                    task.advance(len(wanted) - len(missing), kept=True)
                run_async(self._ask_all(missing, task, taken))
        return [self.journal.answers[key] for key in keys]

    def require_key(self) -> None:
        """Check the key before anything is sent."""
        _secret(self.config, self.where)

    def is_known(self, request: Conversation | ChatRequest) -> bool:
        """Return whether the journal has a reply to this request."""
        return self.journal.key(request) in self.journal.answers

    def estimate(self, requests: Iterable[Conversation | ChatRequest]) -> Calls:
        """Return what asking takes; nothing is sent."""
        wanted = {self.journal.key(request): as_request(request) for request in requests}
        missing = self.journal.missing(wanted)
        tokens = sum(estimated_tokens(request.text) for request in missing.values())
        limit = self.config.reply_limit
        most = None if limit is None else limit * len(missing)
        return Calls(
            calls=len(wanted),
            known=len(wanted) - len(missing),
            prompt_tokens=tokens,
            most_completion_tokens=most if missing else 0,
            most_cost=(None if most is None else cost(self.config, tokens, most)) if missing else 0.0,
        )

    @property
    def usage(self) -> EndpointUsage:
        """The replies used so far, earlier runs' included."""
        replies = self.used.values()
        prompt, completion = sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies)
        return EndpointUsage(len(replies), prompt, completion, cost(self.config, prompt, completion))

    @property
    def uncounted(self) -> int:
        """Number of used replies whose tokens the endpoint did not count."""
        return sum(reply.estimated for reply in self.used.values())

    def _use(self, key: str) -> None:
        self.used[key] = self.journal.answers[key]
        reply = self.used[key]
        self._purse.pay(cost(self.config, reply.prompt_tokens, reply.completion_tokens) or 0.0)

    async def _ask_all(
        self, missing: Mapping[str, ChatRequest], task: Task, taken: Callable[[str, Reply], None]
    ) -> None:
        """Run workers over one list; the first failure stops them all, once the requests in flight have finished."""
        waiting = iter(missing.items())
        failure = _Failure()
        rate = self.config.requests_per_minute
        limiter = AsyncLimiter(1, 60 / rate) if rate else None

        async def work(client: httpx.AsyncClient, keep: Callable[[str, Reply], None]) -> None:
            for key, request in waiting:
                if failure:
                    return
                try:
                    reply = await self._affordable_reply(client, limiter, request, failure)
                    taken(key, reply)
                except UserError as error:
                    failure.report(error)
                    return
                keep(key, reply)
                self._use(key)
                task.advance(note=_retries_text(self._retried))

        headers = {"Accept-Encoding": "gzip"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        limits = httpx.Limits(max_connections=self.config.concurrency)
        asyncio.get_running_loop().set_exception_handler(_handle)
        with self.journal.keeping() as keep:
            # No httpx timeout: the time limit covers a whole request and is set around it.
            async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
                await asyncio.gather(*(work(client, keep) for _ in range(self.config.concurrency)))
        if self._retried:
            self._reporter.say(f"Requests sent again: {_retries_text(self._retried)}")
        if failure.error is not None:
            raise failure.error

    async def _affordable_reply(
        self, client: httpx.AsyncClient, limiter: AsyncLimiter | None, request: ChatRequest, failure: _Failure
    ) -> Reply:
        # A token is at least one byte; a template adds a few.
        prompt = _TEMPLATE_TOKENS + len(request.text.encode())
        most = cost(self.config, prompt, self.config.reply_limit or 0) or 0.0
        try:
            async with self._purse.reserved(most):
                return await self._reply(client, limiter, request, failure)
        except OutOfBudgetError as error:
            raise UserError(str(error), where=self._purse.where, fix=f"Raise it. {_KEPT}") from None

    async def _reply(
        self, client: httpx.AsyncClient, limiter: AsyncLimiter | None, request: ChatRequest, failure: _Failure
    ) -> Reply:
        """Send a request until there is a reply, waiting longer after each try (Retry-After, else 1, 2, 4, … s)."""
        tries = 0
        while True:
            if failure.error is not None:
                raise failure.error
            try:
                async with limiter or nullcontext():
                    return await self._request(client, request)
            except _RequestError as error:
                tries += 1
                wait = error.retry_after
                last = tries > self.config.max_retries or (wait or 0) > LONGEST_WAIT
                if last or failure or not error.transient:
                    raise self._failed(error, tries) from None
                self._retried[f"status {error.status}" if error.status else "no reply"] += 1
                # Requests that failed together must not all come again together.
                growing = min(_FIRST_WAIT * (2 ** (tries - 1) + random.random()), _MOST_WAIT)
                await failure.sleep(growing if wait is None else wait)

    async def _request(self, client: httpx.AsyncClient, request: ChatRequest) -> Reply:
        body = {"model": self.config.model, "messages": list(request.conversation), **self.config.parameters}
        body |= request.parameters
        url = f"{str(self.config.base_url).rstrip('/')}/chat/completions"
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.config.timeout), client.stream("POST", url, json=body) as reply:
                response = await _whole(reply)
        except TimeoutError:
            raise _RequestError(f"no reply within {self.config.timeout:g} s") from None
        except httpx.TransportError as error:
            if _has_cause(error, MemoryError):  # a connection that breaks for lack of memory will break again
                fix = f"Close other programs. {_KEPT}"
                raise UserError("Not enough memory for a reply", where=self.where, fix=fix) from error
            raise _RequestError(f"no connection: {error or type(error).__name__}") from None
        except httpx.InvalidURL as error:
            raise _RequestError(f"invalid address: {error}", status=400) from None
        if response.is_success:
            seconds = round(time.perf_counter() - began, 4)
            return replace(_parsed(response, request), seconds=seconds, when=now())
        message = self._error_message(response)
        if response.status_code in {400, 413, 422}:
            for pattern, why in ((_TOO_LONG, "too long for the model"), (_FILTERED, "refused by a content filter")):
                if pattern.search(response.text):
                    return Reply("", None, 0, 0, refused=why)
        raise _RequestError(
            f"status {response.status_code}: {message}",
            status=response.status_code,
            retry_after=_retry_after(response.headers.get("retry-after")),
        )

    def _error_message(self, response: httpx.Response) -> str:
        """Return the endpoint's error message, without the key that it may repeat."""
        try:
            error = response.json()["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError, RecursionError):
            text = response.text
        text = " ".join(text.split())[:300] or response.reason_phrase
        return text.replace(self._key, "…") if self._key else text

    def _failed(self, error: _RequestError, tries: int) -> UserError:
        what = f"{self.config.model} at {self.config.base_url} does not answer ({error}"
        what += f"; asked {tries} times)" if tries > 1 else ")"
        fix = f"Check base_url, model, api_key_env and parameters in the config's {self.where} section. {_KEPT}"
        if error.retry_after is not None and error.retry_after > LONGEST_WAIT:
            fix = f"The endpoint asks to wait {error.retry_after:,.0f} s. {_KEPT}"
        elif error.transient:
            fix = f"Check that the endpoint runs, or raise {self.where}.max_retries. {_KEPT}"
        return UserError(what, where=f"{self.where}.base_url", fix=fix)


def _secret(config: EndpointConfig, where: str) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"The environment variable {config.api_key_env} is not set",
            where=f"{where}.api_key_env",
            fix=f"Set it to the endpoint's API key: export {config.api_key_env}=…",
        )
    if not key.isascii():
        raise UserError(
            f"{config.api_key_env} is not an API key: it has non-ASCII characters", where=f"{where}.api_key_env"
        )
    return key


async def _whole(reply: httpx.Response) -> httpx.Response:
    """Return a reply with its body, decompressed here: httpx would expand each piece without a limit."""
    encoding = reply.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise _RequestError(f"the reply has the content encoding {encoding[:40]!r} (supported: gzip)", status=400)
    gunzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    body = bytearray()
    try:
        async for piece in reply.aiter_raw():
            body += piece if encoding == "identity" else gunzip.decompress(piece, MAX_REPLY + 1)
            if len(body) > MAX_REPLY:
                raise _RequestError(f"the reply is larger than {MAX_REPLY:,} bytes", status=400)
    except zlib.error as error:
        raise _RequestError(f"the reply is damaged: {error}", status=502) from None
    encoded = {"content-encoding", "content-length", "transfer-encoding"}
    headers = [(name, value) for name, value in reply.headers.items() if name not in encoded]
    return httpx.Response(reply.status_code, headers=headers, content=bytes(body))


def _parsed(response: httpx.Response, request: ChatRequest) -> Reply:
    try:
        document = response.json()
        choice = document["choices"][0]
        text = choice["message"].get("content") or ""
        calls = tuple(choice["message"].get("tool_calls") or ())
        model = document.get("model")
        usage = document.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        finish = choice.get("finish_reason")
        if not isinstance(text, str):
            raise TypeError("content is not text")
        require_shallow(list(calls), _MOST_LEVELS)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        start = " ".join(response.text.split())[:120]
        raise _RequestError(f"the reply is not a chat completion: {start!r}", status=502) from None
    if any(isinstance(count, int) and not 0 <= count <= MAX_TOKENS for count in counts):
        stated = ", ".join(str(count)[:40] for count in counts)
        raise _RequestError(f"the reply counts {stated} tokens (0 to {MAX_TOKENS:,} are possible)", status=502)
    finish = finish if isinstance(finish, str) else None
    reply = Reply(text, finish, 0, 0, tool_calls=calls, model=model if isinstance(model, str) else None)
    if isinstance(counts[0], int) and isinstance(counts[1], int):
        return replace(reply, prompt_tokens=counts[0], completion_tokens=counts[1])
    written = text + (json.dumps(calls) if calls else "")
    return replace(
        reply,
        prompt_tokens=estimated_tokens(request.text),
        completion_tokens=estimated_tokens(written),
        estimated=True,
    )


def _handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log errors outside of tasks, except a lack of memory, which the broken request reports."""
    if not isinstance(context.get("exception"), MemoryError):
        loop.default_exception_handler(context)


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Return whether an exception, or one of its causes, is of a kind."""
    return error is not None and (isinstance(error, kind) or _has_cause(error.__cause__ or error.__context__, kind))


def _retry_after(value: str | None) -> float | None:
    """Return the seconds to wait (RFC 9110, 10.2.3: a number of seconds or a date)."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):  # not a date either, or a date without a time zone
        return None


def _retries_text(retried: Counter[str]) -> str:
    return ", ".join(f"{count} after {why}" for why, count in sorted(retried.items()))
