"""Answers of live aliases in the playground, by the running server and a tenant's API key, and feedback on them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tunewright.core.errors import UserError
from tunewright.serving.playground_answers import ALIAS, Earlier, PlaygroundAnswer, conversation

_USER = "studio"
"""The requests' end user: a shadow's review counts all of them as one unit."""
_CONNECT_S = 5.0
_SILENCE_S = 120.0  # the longest wait for the next piece of an answer
_FEEDBACK_S = 10.0  # other pages wait meanwhile


@dataclass(frozen=True)
class TenantServer:
    """A running server, and a tenant's API key for it, which is neither written nor shown."""

    url: str
    key: str = field(repr=False)

    def _options(self, longest_s: float) -> dict[str, Any]:
        timeout = httpx.Timeout(longest_s, connect=_CONNECT_S)
        headers = {"Authorization": f"Bearer {self.key}"}
        return {"base_url": self.url, "headers": headers, "timeout": timeout, "trust_env": False}

    async def answer(
        self, model: str, question: str, limit: int | None, *, earlier: Earlier, temperature: float
    ) -> AsyncGenerator[str | PlaygroundAnswer, None]:
        """Yield an answer's text as it arrives, then the whole, as `Playground.answer` does."""
        turns = [message.as_dict() for message in conversation(question, None, earlier)]
        alias = model.removeprefix(ALIAS)
        body = {"model": alias, "messages": turns, "temperature": temperature, "user": _USER}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {} if limit is None else {"max_completion_tokens": limit}
        text, finish, usage, response_id = "", None, None, None
        try:
            async with (
                httpx.AsyncClient(**self._options(_SILENCE_S)) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as reply,
            ):
                if reply.is_error:
                    await reply.aread()
                    raise _refusal(reply, alias)
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise UserError(chunk["error"]["message"].rstrip("."), where=alias)
                    response_id, usage = chunk["id"], chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        finish = choice["finish_reason"] or finish
                        if piece := choice["delta"].get("content"):
                            text += piece
                            yield piece
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        if usage is None:
            raise UserError("The server ended before the answer was complete", where=alias, fix="Ask again.")
        yield PlaygroundAnswer(
            text,
            "length" if finish == "length" else "stop",
            usage["prompt_tokens"],
            usage["completion_tokens"],
            (),
            alias,
            reply.headers["x-tunewright-adapter"],
            response_id,
        )

    def give_feedback(self, response_id: str, opinion: dict[str, str]) -> None:
        """Send feedback on an answer to ``POST /v1/feedback``.

        Raises:
            UserError: the server refuses it or does not answer.
        """
        try:
            with httpx.Client(**self._options(_FEEDBACK_S)) as client:
                reply = client.post("/v1/feedback", json={"id": response_id, **opinion})
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        if reply.is_error:
            raise _refusal(reply)


def _refusal(reply: httpx.Response, where: str | None = None) -> UserError:
    """Return the server's refusal in its own words."""
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):  # another program has taken the port
        message = f"The server answered with status {reply.status_code}"
    return UserError(str(message).rstrip("."), where=where)


def _unreachable(error: httpx.HTTPError) -> UserError:
    what = f"The server does not answer: {error}" if str(error) else "The server does not answer"
    return UserError(what, fix="Look at its state on the page Deploy.")
