"""The studio's application: routes, sign-in, and one page at a time on the project."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO
from urllib.parse import urlencode

from anyio import move_on_after, sleep, to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tunewright.api import Project
from tunewright.config import GatewayConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError, missing_extra
from tunewright.core.io import write_bytes
from tunewright.core.log import authored_by
from tunewright.core.progress import duration
from tunewright.core.text import capitalised, visible
from tunewright.render.html import page_templates
from tunewright.serving.gateway.server import serve
from tunewright.studio.access import (
    MAX_SIGN_IN,
    Access,
    ReadOnly,
    StudioSession,
    WithHeaders,
    keep_reviewer,
    kept_reviewer,
    read_form,
    require_form_token,
    require_same_origin,
    reviewer_name,
)
from tunewright.studio.computed import Computed, PageReporter
from tunewright.studio.jobs import Jobs, read_entry
from tunewright.studio.pages import HANDLERS
from tunewright.studio.pages.data import MAX_UPLOAD, UPLOADS
from tunewright.studio.pages.project import NEW_PROJECT
from tunewright.studio.playing import Playing
from tunewright.studio.visit import Cache, Handler, StillComputedError, Visit
from tunewright.studio.words import ROLES, advice, by_commands, note, version_name

_LOG_SHOWN = 100_000  # bytes from the end of a job's log
_WAIT_S = 2.0  # for a part of a page, in one request
_TYPED = ("question", "answer", "output", "note", "message")
"""Fields whose text is worth keeping when a session has ended."""
_MOST_ENDED = 8
"""Forms without a session that are read at one time, to return what was typed. Strangers can also send them."""
_MOST_NAME = 200  # bytes of an upload's name; file systems allow 255, and the temporary name is longer
_UPLOAD = "/data/upload"
_PAGES = {"alias": "/deploy/", "row": "/rows/", "tenant": "/tenants/"}
_LOOPBACK = ("127.0.0.1", "localhost")
_STATIC = Path(str(files("tunewright.studio") / "static"))


class _StaticFiles(StaticFiles):
    """The package's files. Their address changes with them, so browsers keep them for all pages."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "max-age=31536000, immutable"
        return response


class Studio:
    """The studio of one project; in a folder without a ``tunewright.yaml``, a page makes it.

    Browsers sign in by the password or, without one, by a token that is part of the printed address. A ``demo`` shows
    the project to everybody, without sign-in, and refuses to change anything.
    """

    def __init__(self, root: Path, reviewer: str, *, password: str | None = None, demo: bool = False) -> None:
        self._root = root.resolve()
        if not self._root.is_dir():
            raise UserError("There is no such folder", where=str(root), fix="Create it, or name another one.")
        if ProjectFolder(self._root).has_config:
            _ = ProjectFolder(self._root).config
        secret = secrets.token_urlsafe(24) if password is None else password
        self._token = secret if password is None and not demo else None
        self._reviewer = reviewer
        self._access = Access(secret, f"tunewright_studio_{secrets.token_hex(4)}", reviewer)
        # One session for all visitors: without forms, nothing distinguishes them.
        self._visitor = StudioSession(reviewer, read_only=True) if demo else None
        self._ended_forms = asyncio.Semaphore(_MOST_ENDED)
        self._lock = Lock()  # pages read and write the project's files one at a time
        self._cache = Cache(Playing(self._root), Computed(self._root))
        self._jobs = Jobs(self._root / ".tunewright" / "jobs", self._root)
        self._templates = page_templates("tunewright.studio", _PAGES)
        self._templates.filters |= {
            "commands": by_commands,
            "role": lambda name: ROLES.get(name, name),
            "capital": capitalised,
            "version": version_name,
            "duration": duration,
        }
        content = b"".join(path.read_bytes() for path in sorted(_STATIC.rglob("*")) if path.is_file())
        self._templates.globals["static"] = self._static = f"/static/{hashlib.sha256(content).hexdigest()[:12]}"
        self._templates.globals |= {"fix_advice": advice, "message_advice": note}

    def app(self, hosts: tuple[str, ...] = _LOOPBACK) -> Starlette:
        """Return the application, which answers for these host names only (``*``: for all)."""
        routes = [
            Route("/sign-in", self._sign_in_page, methods=["GET"]),
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route(_UPLOAD, self._upload, methods=["POST"]),
            Route("/jobs/{job}/events", self._events, methods=["GET"]),
            Route("/computed/{part}", self._wait_for_part, methods=["GET"]),
            Route("/playground/{question}/events", self._answer_events, methods=["GET"]),
            Route("/playground/{question}/answers", self._wait_for_answers, methods=["GET"]),
            *(Route(path, self._endpoint(handler, method), methods=[method]) for (method, path), handler in HANDLERS),
            Mount(self._static, _StaticFiles(directory=_STATIC)),
        ]
        fix = "Make a project of your own: tunewright studio in an empty folder."
        refusal = self._error(403, "This demo is read-only; nothing was changed", fix=fix)
        return Starlette(
            routes=routes,
            lifespan=self._until_shutdown,
            # A page of another site whose name points at this address (DNS rebinding) has another Host header.
            middleware=[
                Middleware(WithHeaders),
                Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
                *([Middleware(ReadOnly, refusal=refusal)] if self._visitor else []),
            ],
            exception_handlers={
                UserError: self._refused,
                ModuleNotFoundError: self._refused,
                HTTPException: self._failed,
                # The browser left in the middle of a form: nobody reads the answer, and nothing was stored.
                ClientDisconnect: lambda _request, _error: Response(status_code=400),
            },
        )

    @asynccontextmanager
    async def _until_shutdown(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self._cache.computed.close()

    def run(self, host: str, port: int, on_ready: Callable[[str], None]) -> None:
        """Serve until Ctrl-C or SIGTERM; ``on_ready`` is called with the address that signs a browser in."""
        local = host == "localhost"
        with suppress(ValueError):  # a name
            local = local or ipaddress.ip_address(host).is_loopback
        if not local and self._token is not None:
            fix = "Pass --password-file, or leave --host out."
            raise UserError("Other machines could reach the studio without a password", where=f"--host {host}", fix=fix)
        hosts = _LOOPBACK if local else ("*",)

        def ready(url: str) -> None:
            on_ready(self.address(url))
            if find_spec("torch") is not None:
                # Its files are read now, which takes many seconds, so that no part of a page waits for that.
                self._cache.computed.warm()

        try:
            serve(self.app(hosts), host, port, GatewayConfig(), on_ready=ready)
        finally:
            self.close()

    def close(self) -> None:
        """Free the playground's base."""
        with suppress(UserError):  # the base is still loading, and ends with the process
            self._cache.playing.unload()

    def address(self, url: str) -> str:
        """Return the address that signs a browser in. Browsers do not send the part after the #."""
        if self._visitor is not None:
            return url
        return f"{url}/sign-in" + ("" if self._token is None else f"#token={self._token}")

    def _session(self, request: Request) -> StudioSession | None:
        return self._visitor or self._access.session(request)

    def _require_session(self, request: Request) -> None:
        if self._session(request) is None:
            raise HTTPException(403)

    def _endpoint(self, handler: Handler, method: str) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            session = self._session(request)
            if session is None:
                back = urlencode({"back": request.url.replace(scheme="", netloc="")})
                sign_in = RedirectResponse(f"/sign-in?{back}", status_code=303)
                return sign_in if method == "GET" else await self._ended(request)
            form: dict[str, str] = {} if method == "GET" else await read_form(request)
            if method == "POST":
                require_form_token(session, form)
            answer: Response = await to_thread.run_sync(self._answer, handler, request, session, form)
            return answer

        return endpoint

    def _answer(self, handler: Handler, request: Request, session: StudioSession, form: dict[str, str]) -> Response:
        with self._lock:
            # Opened again for each request: another process may have changed it.
            folder = ProjectFolder(self._root)
            if folder.has_config:
                _ = folder.work  # with its .gitignore, before anything is written there
            elif request.url.path != NEW_PROJECT:
                return RedirectResponse(NEW_PROJECT, status_code=303)
            project = Project(folder, PageReporter())
            place = {name: str(value) for name, value in request.path_params.items()}
            query = dict(request.query_params)
            # An address that a form was sent to may have no page of its own.
            path = request.url.path if request.method == "GET" else "/"
            visit = Visit(project, session, form, path, place, query, self._cache, self._jobs, self._templates)
            # Several people use one studio: git's user.name is not theirs.
            with authored_by(session.reviewer):
                try:
                    return handler(visit)
                except StillComputedError as waiting:
                    return visit.page("computing.html.j2", "One moment", part=waiting.part)
                except (UserError, ModuleNotFoundError) as error:
                    refusal = missing_extra(error) or error
                    if not isinstance(refusal, UserError):
                        raise
                    page = visit.page("error.html.j2", "Not done", **self._shown(refusal))
                    page.status_code = 400
                    return page

    async def _sign_in_page(self, request: Request) -> Response:
        if self._visitor is not None:
            return RedirectResponse("/", status_code=303)
        return HTMLResponse(self._sign_in_text(request, "", request.query_params.get("back", "/")))

    async def _sign_in(self, request: Request) -> Response:
        form = await read_form(request, MAX_SIGN_IN)
        typed, back = form.get("reviewer", ""), form.get("back", "/")
        try:
            name = reviewer_name(typed) if typed.strip() else kept_reviewer(request)
        except UserError as refusal:
            page = self._sign_in_text(request, f"{refusal.what}. {refusal.fix}", back, reviewer=typed)
            return HTMLResponse(page, status_code=400)
        address = request.client.host if request.client else ""
        cookie = self._access.sign_in(form.get("secret", ""), address, name)
        if cookie is None:
            wrong = "That is not the secret of this studio."
            return HTMLResponse(self._sign_in_text(request, wrong, back), status_code=403)
        # One slash: two would begin the address of another host.
        answer = RedirectResponse(f"/{back.lstrip('/')}", status_code=303, headers={"Set-Cookie": cookie})
        return keep_reviewer(answer, name) if name else answer

    async def _ended(self, request: Request) -> Response:
        """Ask for the secret again, and return what was typed: the form's page is made again after the sign-in."""
        typed: list[str] = []
        if request.url.path != _UPLOAD and not self._ended_forms.locked():
            async with self._ended_forms:
                form = await read_form(request)
            typed = [form[name] for name in _TYPED if form.get(name, "").strip()]
        wrong = "Your session has ended, because the studio was started again. Nothing was recorded."
        # The page that has the form: its address may have no page of its own.
        back = request.headers.get("referer", "").partition("://")[2].partition("/")[2]
        return HTMLResponse(self._sign_in_text(request, wrong, f"/{back}", typed), status_code=403)

    def _sign_in_text(
        self, request: Request, wrong: str, back: str, typed: Sequence[str] = (), reviewer: str = ""
    ) -> str:
        kind, known = "token" if self._token is not None else "password", kept_reviewer(request)
        # Who started the studio is likely the first to open its address; with a password, everybody types a name.
        name = reviewer or known or (self._reviewer if kind == "token" else "")
        page = self._templates.get_template("sign_in.html.j2")
        return page.render(wrong=wrong, kind=kind, back=back, reviewer=name, known=known, typed=typed)

    async def _upload(self, request: Request) -> Response:
        """Store a file in the project's `UPLOADS`, whole or not at all."""
        session = self._session(request)
        if session is None:
            return await self._ended(request)
        require_same_origin(request)
        if not ProjectFolder(self._root).has_config:
            return RedirectResponse(NEW_PROJECT, status_code=303)
        size = request.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > MAX_UPLOAD:
            raise UserError(
                f"The file is larger than {MAX_UPLOAD:,} bytes",
                fix="Split it into smaller files. In a terminal, `tunewright data add FILE` adds files of any size.",
            )
        async with request.form(max_files=1, max_fields=1) as sent:
            file = sent.get("file")
            require_form_token(session, {"form_token": str(sent.get("form_token", ""))})
            if not isinstance(file, UploadFile) or not file.filename:
                raise UserError("No file was chosen", fix="Go back and choose one.")
            name = file.filename.replace("\\", "/").rpartition("/")[2]
            await to_thread.run_sync(_store, self._root / UPLOADS, name, file.file)
        return RedirectResponse(f"/data/check?{urlencode({'file': name})}", status_code=303)

    async def _events(self, request: Request) -> Response:
        """Stream a job's log as server-sent events: its end, then what is added; `finished` at the end.

        `progress` and `said` events repeat the texts that the page shows above the log.
        """
        self._require_session(request)
        job = self._jobs.find(str(request.path_params["job"]))

        async def lines() -> AsyncIterator[str]:
            at = 0
            while True:
                running = job.state == "running"
                with job.log.open("rb") as log:
                    at = max(at, log.seek(0, 2) - _LOG_SHOWN)
                    log.seek(at)
                    new = log.read()
                whole = new if not running else new[: max(new.rfind(b"\n"), new.rfind(b"\r")) + 1]
                at += len(whole)
                for line in whole.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n").splitlines():
                    entry = read_entry(line)
                    for text in entry.lines:
                        yield f"data: {text}\n\n"
                    if entry.progress:
                        yield f"event: progress\ndata: {entry.progress.as_json()}\n\n"
                    elif entry.message:
                        yield f"event: said\ndata: {entry.lines[0]}\n\n"
                if not running:
                    yield f"event: finished\ndata: {job.state}\n\n"
                    return
                await sleep(0.5)

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def _wait_for_part(self, request: Request) -> Response:
        """Answer when a part of a page has been computed, or after some time; the page is then read again."""
        self._require_session(request)
        key = str(request.path_params["part"])
        with move_on_after(_WAIT_S):
            while self._cache.computed.is_waiting(key) and not await request.is_disconnected():
                await sleep(0.1)
        return Response(status_code=204)

    async def _answer_events(self, request: Request) -> Response:
        """Stream the answers to a question; a browser that leaves ends their computation."""
        self._require_session(request)
        playing = self._cache.playing
        question = playing.question(str(request.path_params["question"]))
        return StreamingResponse(playing.events(question), media_type="text/event-stream")

    async def _wait_for_answers(self, request: Request) -> Response:
        """Compute the answers to a question, then show its page to browsers without scripts."""
        if self._session(request) is None:
            return RedirectResponse("/sign-in", status_code=303)
        name = str(request.path_params["question"])
        playing = self._cache.playing
        async with aclosing(playing.answers(playing.question(name))) as pieces:
            async for _ in pieces:
                if await request.is_disconnected():
                    break
        return RedirectResponse(f"/playground/{name}", status_code=303)

    async def _refused(self, _request: Request, error: Exception) -> Response:
        error = missing_extra(error) or error
        if not isinstance(error, UserError):
            raise error
        return self._error(400, **self._shown(error))

    def _shown(self, error: UserError) -> dict[str, str]:
        """Return a refusal's texts with paths relative to the project's folder."""
        texts = {"what": error.what, "where": error.where or "", "fix": error.fix or ""}
        return {name: text.replace(f"{self._root}/", "") for name, text in texts.items()}

    async def _failed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"There is no page {request.url.path}" if error.status_code == 404 else error.detail
        response = self._error(error.status_code, what)
        response.headers.update(error.headers or {})
        return response

    def _error(self, status: int, what: str, where: str = "", fix: str = "") -> Response:
        text = self._templates.get_template("error.html.j2").render(what=what, where=where, fix=fix)
        return HTMLResponse(text, status_code=status)


def _store(folder: Path, name: str, file: BinaryIO) -> None:
    """Write an uploaded file."""
    controls = visible(name) != name or any(c in name for c in "\t\r\n")
    if not name or name.startswith(".") or controls or len(name.encode()) > _MOST_NAME:
        fix = f"Rename it: at most {_MOST_NAME} bytes, without control characters or a dot in front."
        raise UserError(f"The file's name cannot be used: {name[:60]!r}", fix=fix)
    path = folder / name
    content = file.read()
    if not path.exists():
        write_bytes(path, content)
    elif path.read_bytes() != content:
        raise UserError(f"There is another file {name!r}", where=UPLOADS, fix="Rename yours, and upload it again.")
