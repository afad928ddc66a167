"""Access to the studio: a secret is exchanged for a session cookie, and each form carries its session's token."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Network
from urllib.parse import parse_qsl, quote, unquote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright.config import GatewayConfig
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.versions.diff import Mark

MAX_FORM = 1_000_000  # bytes: an edited answer, and some room
MAX_SIGN_IN = 4_096
MAX_WRONG = 5
"""Wrong secrets from one address in ``WRONG_S``; further secrets are not even compared."""
WRONG_S = 60.0
BODY_S = GatewayConfig().body_timeout_s
HEADERS = {
    # The browser itself refuses everything that does not come from the studio: the proof that it works offline.
    "Content-Security-Policy": "default-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "object-src 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_REVIEWER = "tunewright_reviewer"
"""Cookie with the reviewer's name. All studios of a host share it: the browser belongs to one person."""
_KEPT_S = 400 * 24 * 3600  # the longest that browsers keep a cookie
_LONGEST_NAME = 200  # bytes, as for the files of human evaluation
_NAME_FIX = f"Type at most {_LONGEST_NAME} letters. Accents and other scripts count several times."


@dataclass(frozen=True)
class ChangedText:
    """A message about a text that was changed, with the pieces of both texts."""

    text: str
    pieces: Sequence[tuple[Mark, str]]


@dataclass(frozen=True)
class ChangedRows:
    """A message about rows that were changed: each with its place, the change, and its text before and after."""

    text: str
    rows: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class RefusedVerdict:
    """A message about the row of this key, whose verdict was not recorded, with what was typed."""

    text: str
    key: str
    typed: Sequence[str]


Notice = str | ChangedText | ChangedRows | RefusedVerdict
"""A message on the next page."""


@dataclass
class StudioSession:
    """A browser that has signed in."""

    reviewer: str
    read_only: bool = False
    """True for a demo, where nothing can be changed."""
    form_token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    messages: list[Notice] = field(default_factory=list)
    """Shown on the next page, once."""
    refused_name: tuple[str, str] | None = None
    """A reviewer's name that was refused, and the reason; shown on the next page, once."""
    tenant_key: str = field(default="", repr=False)
    """The tenant's API key that the playground asks live aliases with; in memory only."""

    def take_messages(self) -> list[Notice]:
        """Return the messages and forget them."""
        taken, self.messages = self.messages, []
        return taken


class Access:
    """The sessions of one studio, in memory: they end with it.

    Cookies of one host are shared by all its ports, so each studio has a ``cookie`` of its own name. Reviews are
    recorded under the name ``reviewer`` until a session chooses another one.
    """

    def __init__(self, secret: str, cookie: str, reviewer: str) -> None:
        self._secret = secret.encode()
        self._cookie = cookie
        self._reviewer = reviewer
        self._sessions: dict[str, StudioSession] = {}
        self._tries: dict[str, tuple[float, int]] = {}  # by address: first time, number; oldest first

    def sign_in(self, secret: str, address: str, reviewer: str = "") -> str | None:
        """Return a new session's ``Set-Cookie`` value, or None if the secret is wrong.

        ``reviewer`` is the name of the person who signs in; empty: the studio's.
        """
        at, source = time.monotonic(), _source(address)
        while self._tries and next(iter(self._tries.values()))[0] <= at - WRONG_S:
            del self._tries[next(iter(self._tries))]
        since, tries = self._tries.get(source, (at, 0))
        if tries >= MAX_WRONG:
            wait = math.ceil(since + WRONG_S - at)
            what = f"There were {MAX_WRONG} wrong sign-ins from your address: try again in {count_of(wait, 'second')}"
            raise HTTPException(429, what, {"Retry-After": str(wait)})
        self._tries[source] = since, tries + 1
        if not secrets.compare_digest(secret.encode(), self._secret):
            return None
        del self._tries[source]
        key = secrets.token_urlsafe(32)
        self._sessions[key] = StudioSession(reviewer or self._reviewer)
        return f"{self._cookie}={key}; Path=/; HttpOnly; SameSite=Strict"

    def session(self, request: Request) -> StudioSession | None:
        """Return the request's session; None without a session, or if the studio was restarted since."""
        return self._sessions.get(request.cookies.get(self._cookie, ""))


def _source(address: str) -> str:
    """Return what counts as one address: for IPv6 the /64 network, which one machine may have."""
    try:
        return str(IPv6Network((address, 64), strict=False))
    except ValueError:
        return address


def reviewer_name(text: str) -> str:
    """Return the name that a person typed."""
    name = " ".join(text.split())
    if not name or not name.isprintable() or len(quote(name)) > _LONGEST_NAME:
        what = "empty" if not name else "too long" if name.isprintable() else "not printable"
        raise UserError(f"The reviewer's name is {what}", where="reviewer", fix=_NAME_FIX)
    return name


def kept_reviewer(request: Request) -> str:
    """Return the name that this browser's person chose earlier, even before a restart; empty if none."""
    with suppress(UserError):  # set by another program on this host
        return reviewer_name(unquote(request.cookies.get(_REVIEWER, "")))
    return ""


def keep_reviewer(response: Response, name: str) -> Response:
    """Have the browser keep the name of its person: sessions end with the studio."""
    response.set_cookie(_REVIEWER, quote(name), max_age=_KEPT_S, httponly=True, samesite="strict")
    return response


async def read_form(request: Request, limit: int = MAX_FORM) -> dict[str, str]:
    """Return the fields of a form in its URL-encoded body, of at most ``limit`` bytes, from the studio's own pages."""
    require_same_origin(request)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise UserError(f"The form is larger than {limit:,} bytes", fix="Shorten the text.")
    except TimeoutError:
        raise HTTPException(408, f"The form did not arrive within {BODY_S:g} seconds") from None
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=bool(body), errors="strict")
    except ValueError:
        raise UserError("The form cannot be read", fix="Reload the page and send it again.") from None
    # HTML sends line ends as CRLF, regardless of the text's own.
    return {name: value.replace("\r\n", "\n") for name, value in fields}


def require_same_origin(request: Request) -> None:
    """Refuse a form that a page of another site sent."""
    origin = request.headers.get("origin")
    if origin is not None and origin != f"{request.url.scheme}://{request.headers.get('host')}":
        raise UserError("The form was sent by another site", fix="Use the studio's own pages.")


def require_form_token(session: StudioSession, form: dict[str, str]) -> None:
    """Refuse a form that this session's pages did not send."""
    if not secrets.compare_digest(form.pop("form_token", "").encode(), session.form_token.encode()):
        raise UserError("The form belongs to an earlier session", fix="Go back, reload the page and send it again.")


class WithHeaders:
    """An application whose every response has `HEADERS`, unless it has its own value."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                new = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(each for each in new if each[0] not in there)]
            await send(message)

        await self._app(scope, receive, sent)


class ReadOnly:
    """An application that only answers requests which change nothing; it does not even read the body of others."""

    def __init__(self, app: ASGIApp, refusal: ASGIApp) -> None:
        self._app = app
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reads = scope["type"] != "http" or scope["method"] in ("GET", "HEAD")
        await (self._app if reads else self._refusal)(scope, receive, send)
